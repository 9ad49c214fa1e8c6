"""Weights and the arithmetic of one token in float64: norms, projections, rotation, attention, MLP, output.

All of it is written out here; a transformers model gives its state dict and its configuration and nothing else.
"""

import math

import torch

F64 = torch.float64
# What a frequency may be off by where float32 takes base ** exponent, relative: half an ulp of the exponent times the
# logarithm of 10,000 is 5.5e-7, the power itself two ulps on some machines, each of two divisions half an ulp.
FLOAT32_POWER = 1e-6


def rope_frequencies(config) -> tuple[torch.Tensor, float]:
    """Angle per position of each rotary pair, and the factor on cos and sin.

    Returns
    -------
    frequencies : torch.Tensor
        (rotary_dims / 2,) float64, radians per position.
    factor : float
        1 except for yarn; it multiplies cos and sin, so it enters once through q and once through k.
    """
    rope = config.rope_parameters
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dims = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    pairs = torch.arange(dims // 2, dtype=F64)
    base, kind = rope["rope_theta"], rope["rope_type"]
    plain = base ** (-2 * pairs / dims)
    if kind == "default":
        return plain, 1.0
    if kind == "linear":
        return plain / rope["factor"], 1.0
    trained = rope["original_max_position_embeddings"] if kind in ("llama3", "yarn") else None
    if kind == "llama3":
        turns = trained * plain / (2 * math.pi)  # rotations of a pair over the trained length
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return plain * (keep + (1 - keep) / rope["factor"]), 1.0
    if kind == "yarn":
        return _yarn(rope, plain, pairs, dims, base, trained)
    raise ValueError(f"rope_type {kind!r} is unknown to the oracle; accepted: default, linear, llama3, yarn")


def _yarn(rope, plain, pairs, dims, base, trained) -> tuple[torch.Tensor, float]:
    """YaRN (arXiv 2309.00071): fast pairs keep their frequency, slow ones are divided by the factor, a ramp between."""
    if rope.get("mscale") or rope.get("mscale_all_dim"):
        raise ValueError("the oracle does not know yarn's mscale")

    def pair_turning(turns: float) -> float:
        return dims / 2 * math.log(trained / (2 * math.pi * turns), base)

    first, last = pair_turning(rope.get("beta_fast") or 32), pair_turning(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dims - 1)
    slow = ((pairs - first) / (last - first)).clamp(0, 1)
    given = rope.get("attention_factor")
    factor = given if given is not None else 0.1 * math.log(rope["factor"]) + 1
    return plain * (1 - slow + slow / rope["factor"]), factor


class Network:
    """Weights of a GPT-NeoX or Llama-like model in float64 and the arithmetic around attention.

    Build it with `Network(model)`: it reads `model.state_dict()` and `model.config` and calls nothing of the model.
    """

    def __init__(self, model):
        self.config = model.config
        self.weights = {key: value.detach().to(F64) for key, value in model.state_dict().items()}
        self.is_neox = self.config.model_type == "gpt_neox"
        if not self.is_neox and self.config.model_type not in ("llama", "mistral", "qwen2", "qwen3"):
            raise ValueError(f"model_type {self.config.model_type!r} is unknown to the oracle")
        expected_act = "gelu" if self.is_neox else "silu"
        if self.config.hidden_act != expected_act:
            raise ValueError(f"hidden_act {self.config.hidden_act!r}; the oracle knows {expected_act!r} here")
        self.layers = self.config.num_hidden_layers
        self.heads = self.config.num_attention_heads
        self.kv_heads = self.heads if self.is_neox else self.config.num_key_value_heads
        self.head_dim = getattr(self.config, "head_dim", None) or self.config.hidden_size // self.heads
        self.frequencies, self.rope_factor = rope_frequencies(self.config)

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        bias = self.weights.get(f"{name}.bias")
        y = x @ self.weights[f"{name}.weight"].T
        return y if bias is None else y + bias

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        if self.is_neox:
            x = x - x.mean(-1, keepdim=True)
            x = x / (x.pow(2).mean(-1, keepdim=True) + self.config.layer_norm_eps).sqrt()
            return x * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]
        return x / (x.pow(2).mean(-1, keepdim=True) + self.config.rms_norm_eps).sqrt() * self.weights[f"{name}.weight"]

    def _prefix(self, layer: int) -> str:
        return f"gpt_neox.layers.{layer}." if self.is_neox else f"model.layers.{layer}."

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """(batch,) token ids to (batch, hidden)."""
        return self.weights["gpt_neox.embed_in.weight" if self.is_neox else "model.embed_tokens.weight"][ids]

    def project(self, layer: int, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Unrotated q (batch, heads, dim), k and v (batch, kv_heads, dim) of one token; QK-norm applied."""
        prefix, batch = self._prefix(layer), hidden.shape[0]
        normed = self._norm(hidden, prefix + "input_layernorm")
        if self.is_neox:
            fused = self._linear(normed, prefix + "attention.query_key_value")
            fused = fused.reshape(batch, self.heads, 3, self.head_dim)
            return fused[:, :, 0], fused[:, :, 1], fused[:, :, 2]
        q, k, v = (
            self._linear(normed, f"{prefix}self_attn.{part}_proj").reshape(batch, -1, self.head_dim) for part in "qkv"
        )
        if prefix + "self_attn.q_norm.weight" in self.weights:
            q, k = self._norm(q, prefix + "self_attn.q_norm"), self._norm(k, prefix + "self_attn.k_norm")
        return q, k, v

    def finish(self, layer: int, hidden: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Output projection, MLP and residuals; context is (batch, heads, dim)."""
        prefix = self._prefix(layer)
        name = "attention.dense" if self.is_neox else "self_attn.o_proj"
        after = hidden + self._linear(context.flatten(1), prefix + name)
        parallel = self.is_neox and self.config.use_parallel_residual
        x = self._norm(hidden if parallel else after, prefix + "post_attention_layernorm")
        if self.is_neox:
            x = self._linear(x, prefix + "mlp.dense_h_to_4h")
            x = 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
            return after + self._linear(x, prefix + "mlp.dense_4h_to_h")
        gate = self._linear(x, prefix + "mlp.gate_proj")
        gate = gate / (1 + torch.exp(-gate))
        return after + self._linear(gate * self._linear(x, prefix + "mlp.up_proj"), prefix + "mlp.down_proj")

    def log_probabilities(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and log-probabilities of the next token, both (batch, vocab)."""
        hidden = self._norm(hidden, "gpt_neox.final_layer_norm" if self.is_neox else "model.norm")
        names = ("lm_head", "embed_out", "model.embed_tokens")  # the last one if tied and not stored twice
        logits = self._linear(hidden, next(name for name in names if f"{name}.weight" in self.weights))
        return logits, logits - torch.logsumexp(logits, -1, keepdim=True)

    def rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Rotate (..., dim) vectors to float64 positions of shape broadcastable to (...)."""
        angles = positions[..., None] * self.frequencies
        cos, sin = angles.cos() * self.rope_factor, angles.sin() * self.rope_factor
        half = len(self.frequencies)
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)

    def attend(self, q, k, q_positions, k_positions, allowed=None) -> torch.Tensor:
        """Attention probabilities of queries over keys, everything rotated from scratch.

        Parameters
        ----------
        q : torch.Tensor
            (batch, kv_heads, group, queries, dim) unrotated; `group` counts the q heads of a kv head.
        k : torch.Tensor
            (batch, kv_heads, keys, dim) unrotated.
        q_positions, k_positions : torch.Tensor
            (kv_heads, queries) and (kv_heads, keys).
        allowed : torch.Tensor, optional
            (kv_heads, queries, keys) bool; default all.

        Returns
        -------
        torch.Tensor
            (batch, kv_heads, group, queries, keys).
        """
        scores = self.rotate(q, q_positions[:, None].to(F64)) @ self.rotate(k, k_positions.to(F64))[:, :, None].mT
        scores = scores / math.sqrt(self.head_dim)
        if allowed is not None:
            scores = scores.masked_fill(~allowed[:, None], -math.inf)
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        return weights / weights.sum(-1, keepdim=True)
