"""The MLPs of all families in float64, mixtures of experts included."""

import math

import torch


def silu(x: torch.Tensor) -> torch.Tensor:
    """x times its logistic function."""
    return x / (1 + torch.exp(-x))


def gelu(x: torch.Tensor) -> torch.Tensor:
    """x times the normal distribution function."""
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """`gelu` with a tanh in place of erf."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def bounded(x: torch.Tensor, cap: float | None) -> torch.Tensor:
    """Soft cap: a tanh that bends values towards plus and minus `cap`; None: nothing."""
    return x if cap is None else cap * torch.tanh(x / cap)


# family -> (name of the activation in the configuration, function); others have names that are not read
ACTIVATIONS = {
    "gpt_neox": ("gelu", gelu),
    "falcon": ("gelu", gelu),
    "gemma": ("gelu_pytorch_tanh", gelu_tanh),
    "gemma2": ("gelu_pytorch_tanh", gelu_tanh),
    "gemma3_text": ("gelu_pytorch_tanh", gelu_tanh),
} | dict.fromkeys(
    (
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "phi3",
        "olmo2",
        "olmo3",
        "granite",
        "stablelm",
        "smollm3",
        "mixtral",
        "qwen2_moe",
        "qwen3_moe",
        "gpt_oss",
    ),
    ("silu", silu),
)


class MLP:
    """What a layer computes of its normed hidden states, for one token a row.

    Parameters
    ----------
    kind : str
        ``config.model_type``.
    weights : dict of Tensor, float64
    """

    def __init__(self, kind: str, config, weights: dict[str, torch.Tensor]):
        self.kind, self.config, self.weights = kind, config, weights
        expected, self.activation = ACTIVATIONS[kind]
        names = ("hidden_activation", "hidden_act", "activation")
        found = next(getattr(config, name) for name in names if hasattr(config, name))
        if found != expected:
            raise ValueError(f"activation {found!r}; the oracle knows {expected!r} here")

    def __call__(self, prefix: str, x: torch.Tensor) -> torch.Tensor:
        """(batch, hidden) to (batch, hidden) by the layer whose weights have this prefix."""
        name = prefix + "mlp."
        if self.kind in ("gpt_neox", "falcon"):
            return self._linear(self.activation(self._linear(x, name + "dense_h_to_4h")), name + "dense_4h_to_h")
        if self.kind == "phi3":
            gate, up = self._linear(x, name + "gate_up_proj").chunk(2, -1)
            return self._linear(up * self.activation(gate), name + "down_proj")
        if name + "experts.gate_up_proj" in self.weights:
            return self._experts(name, x)
        return self._gated(x, name)

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        bias = self.weights.get(f"{name}.bias")
        y = x @ self.weights[f"{name}.weight"].T
        return y if bias is None else y + bias

    def _gated(self, x: torch.Tensor, name: str) -> torch.Tensor:
        gate = self.activation(self._linear(x, name + "gate_proj"))
        return self._linear(gate * self._linear(x, name + "up_proj"), name + "down_proj")

    def _experts(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """The best experts of every token, weighted by their softmax, over all or over themselves."""
        router = name + ("router" if self.kind == "gpt_oss" else "gate")
        scores = self._linear(x, router)
        best = scores.topk(self.config.num_experts_per_tok).indices
        share = torch.exp(scores - scores.amax(-1, keepdim=True))
        share = share / share.sum(-1, keepdim=True)
        share = share.gather(1, best)
        if self.kind in ("mixtral", "gpt_oss") or self.config.norm_topk_prob:
            share = share / share.sum(-1, keepdim=True)
        expert = self._clamped_expert if self.kind == "gpt_oss" else self._gated_expert
        rows = [
            sum(share[row, i] * expert(name, int(best[row, i]), x[row]) for i in range(best.shape[1]))
            for row in range(len(x))
        ]
        out = torch.stack(rows)
        if self.kind == "qwen2_moe":
            gate = torch.sigmoid(self._linear(x, name + "shared_expert_gate"))
            out = out + gate * self._gated(x, name + "shared_expert.")
        return out

    def _gated_expert(self, name: str, index: int, x: torch.Tensor) -> torch.Tensor:
        gate, up = (self.weights[name + "experts.gate_up_proj"][index] @ x).chunk(2)
        return self.weights[name + "experts.down_proj"][index] @ (up * self.activation(gate))

    def _clamped_expert(self, name: str, index: int, x: torch.Tensor) -> torch.Tensor:
        """An expert of gpt-oss: gate and up in turns, both clamped at 7, a steeper logistic function, up + 1."""
        parts = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
        into, into_bias, back, back_bias = (self.weights[f"{name}experts.{part}"][index] for part in parts)
        both = x @ into + into_bias
        gate, up = both[::2].clamp(max=7.0), both[1::2].clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate) @ back + back_bias
