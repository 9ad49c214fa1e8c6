"""Weights and the arithmetic of one token in float64: norms, projections, attention, blocks, output.

All of it is written out here and in `rotation`, `mlp`; a transformers model gives its state dict and its configuration
and nothing else.
"""

import math

import torch

from .mlp import ACTIVATIONS, MLP, bounded
from .rotation import F64, rotation_of_layer

LAYERS = {"gpt_neox": "gpt_neox.layers.{}.", "falcon": "transformer.h.{}."}  # else model.layers
EMBEDDING = {"gpt_neox": "gpt_neox.embed_in", "falcon": "transformer.word_embeddings"}  # else model.embed_tokens
LAST_NORM = {"gpt_neox": "gpt_neox.final_layer_norm", "falcon": "transformer.ln_f"}  # else model.norm
MEAN_FREE = ("gpt_neox", "falcon", "stablelm")  # LayerNorm; the others RMSNorm
AROUND_ONE = ("gemma", "gemma2", "gemma3_text")  # the weight of a norm is 1 + w
POST_NORMED = ("olmo2", "olmo3", "gemma2", "gemma3_text")  # what attention and MLP add is normed
EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon")


def windows(config) -> list[int | None]:
    """Tokens that a query of each layer sees, where its layers slide; None: all."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [config.sliding_window if kind == "sliding_attention" else None for kind in kinds]


class Network:
    """Weights of a model in float64 and the arithmetic around attention.

    Build it with `Network(model)`: it reads `model.state_dict()` and `model.config` and calls nothing of the model.
    """

    def __init__(self, model):
        config = self.config = model.config
        self.kind = config.model_type
        if self.kind not in ACTIVATIONS:
            raise ValueError(f"model_type {self.kind!r} is unknown to the oracle")
        self.weights = {key: value.detach().to(F64) for key, value in model.state_dict().items()}
        self.layers, self.heads = config.num_hidden_layers, config.num_attention_heads
        self.kv_heads = self._count_kv_heads()
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.windows = windows(config)
        self.rotations = [rotation_of_layer(config, i) for i in range(self.layers)]
        self.eps = next(getattr(config, name) for name in EPSILONS if hasattr(config, name))
        self.scale = 1 / math.sqrt(self.head_dim)
        if self.kind in ("gemma2", "gemma3_text"):
            self.scale = config.query_pre_attn_scalar**-0.5
        if self.kind == "granite":
            self.scale = config.attention_multiplier
        self.mlp = MLP(self.kind, config, self.weights)

    def _count_kv_heads(self) -> int:
        if self.kind == "falcon":
            grouped = self.config.new_decoder_architecture  # keys are repeated for every query head and cached so
            many = self.heads if grouped else self.config.num_kv_heads
            return 1 if self.config.multi_query and not grouped else many
        return self.heads if self.kind == "gpt_neox" else self.config.num_key_value_heads

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        bias = self.weights.get(f"{name}.bias")
        y = x @ self.weights[f"{name}.weight"].T
        return y if bias is None else y + bias

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """A norm over the last axis; none where the model has none of that name."""
        weight, bias = self.weights.get(f"{name}.weight"), self.weights.get(f"{name}.bias")
        if weight is None:
            return x
        if self.kind in MEAN_FREE:
            x = x - x.mean(-1, keepdim=True)
        x = x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()
        x = x * (weight + 1 if self.kind in AROUND_ONE else weight)
        return x if bias is None else x + bias

    def _prefix(self, layer: int) -> str:
        return LAYERS.get(self.kind, "model.layers.{}.").format(layer)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """(batch,) token ids to (batch, hidden)."""
        found = self.weights[EMBEDDING.get(self.kind, "model.embed_tokens") + ".weight"][ids]
        if self.kind in AROUND_ONE:
            return found * math.sqrt(self.config.hidden_size)
        return found * self.config.embedding_multiplier if self.kind == "granite" else found

    def project(self, layer: int, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Unrotated q (batch, heads, dim), k and v (batch, kv_heads, dim) of one token; QK-norm applied."""
        prefix = self._prefix(layer)
        normed = self._norm(self._norm(hidden, prefix + "input_layernorm"), prefix + "ln_attn")  # a layer has one
        if self.kind == "gpt_neox":
            fused = self._linear(normed, prefix + "attention.query_key_value")
            return fused.unflatten(1, (self.heads, 3, -1)).unbind(2)
        if self.kind == "falcon":
            return self._falcon(self._linear(normed, prefix + "self_attention.query_key_value"))
        name = prefix + "self_attn."
        if self.kind == "phi3":
            sizes = [self.heads * self.head_dim, *2 * [self.kv_heads * self.head_dim]]
            q, k, v = self._linear(normed, name + "qkv_proj").split(sizes, 1)
        else:
            q, k, v = (self._linear(normed, f"{name}{part}_proj") for part in "qkv")
        return self._qk_norm(q, name + "q"), self._qk_norm(k, name + "k"), v.unflatten(1, (-1, self.head_dim))

    def _qk_norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """Split into heads, with the norm before (OLMo), after (Qwen3, Gemma 3), or one a head (StableLM)."""
        if self.kind in ("olmo2", "olmo3"):
            return self._norm(x, name + "_norm").unflatten(1, (-1, self.head_dim))
        x = self._norm(x.unflatten(1, (-1, self.head_dim)), name + "_norm")
        if f"{name}_layernorm.norms.0.weight" not in self.weights:
            return x
        return torch.stack([self._norm(head, f"{name}_layernorm.norms.{i}") for i, head in enumerate(x.unbind(1))], 1)

    def _falcon(self, fused: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if self.config.new_decoder_architecture:
            grouped = fused.unflatten(1, (self.config.num_kv_heads, -1, self.head_dim))
            q, k, v = grouped[:, :, :-2], grouped[:, :, -2:-1], grouped[:, :, -1:]
            return tuple(part.expand_as(q).flatten(1, 2) for part in (q, k, v))
        if self.config.multi_query:
            return fused.unflatten(1, (-1, self.head_dim)).split([self.heads, 1, 1], 1)
        return fused.unflatten(1, (self.heads, 3, -1)).unbind(2)

    def finish(self, layer: int, hidden: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Output projection, MLP and residuals; context is (batch, heads, dim)."""
        prefix, config = self._prefix(layer), self.config
        names = {"gpt_neox": "attention.dense", "falcon": "self_attention.dense"}
        attended = self._linear(context.flatten(1), prefix + names.get(self.kind, "self_attn.o_proj"))
        if self.kind in POST_NORMED:
            hidden = hidden + self._norm(attended, prefix + "post_attention_layernorm")
            added = self.mlp(prefix, self._norm(hidden, prefix + "pre_feedforward_layernorm"))
            return hidden + self._norm(added, prefix + "post_feedforward_layernorm")
        after = hidden + attended * (config.residual_multiplier if self.kind == "granite" else 1)
        if self.kind == "gpt_neox":
            read = hidden if config.use_parallel_residual else after
            return after + self.mlp(prefix, self._norm(read, prefix + "post_attention_layernorm"))
        if self.kind == "falcon" and (config.new_decoder_architecture or config.parallel_attn):
            own = prefix + "ln_mlp"
            normed = self._norm(hidden, own if f"{own}.weight" in self.weights else prefix + "input_layernorm")
            return after + self.mlp(prefix, normed)
        if self.kind == "stablelm" and config.use_parallel_residual:
            return after + self.mlp(prefix, self._norm(hidden, prefix + "input_layernorm"))
        added = self.mlp(prefix, self._norm(after, prefix + "post_attention_layernorm"))
        return after + added * (config.residual_multiplier if self.kind == "granite" else 1)

    def log_probabilities(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and log-probabilities of the next token, both (batch, vocab)."""
        hidden = self._norm(hidden, LAST_NORM.get(self.kind, "model.norm"))
        names = ("lm_head", "embed_out", "model.embed_tokens")  # the last one if tied and not stored twice
        logits = self._linear(hidden, next(name for name in names if f"{name}.weight" in self.weights))
        if self.kind == "granite":
            logits = logits / self.config.logits_scaling
        logits = bounded(logits, getattr(self.config, "final_logit_softcapping", None))
        return logits, logits - torch.logsumexp(logits, -1, keepdim=True)

    def as_cached(self, layer: int, keys: torch.Tensor) -> torch.Tensor:
        """Unrotated keys (..., dim) with the factor of yarn and longrope, which a cache finds in its keys."""
        frequencies, factor = self.rotations[layer]
        rotary = 0 if frequencies is None else 2 * len(frequencies)
        return torch.cat([keys[..., :rotary] * factor, keys[..., rotary:]], -1)

    def rotate(self, x: torch.Tensor, positions: torch.Tensor, layer: int = 0) -> torch.Tensor:
        """Rotate (..., dim) vectors to float64 positions of shape broadcastable to (...)."""
        frequencies, factor = self.rotations[layer]
        if frequencies is None:
            return x
        angles = positions[..., None] * frequencies
        cos, sin = angles.cos() * factor, angles.sin() * factor
        half = len(frequencies)
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)

    def attend(self, q, k, q_positions, k_positions, allowed=None, layer: int = 0) -> torch.Tensor:
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
        layer : int
            Whose rotation and whose learned sinks.

        Returns
        -------
        torch.Tensor
            (batch, kv_heads, group, queries, keys); with learned sinks they sum to less than 1.
        """
        q, k = self.rotate(q, q_positions[:, None].to(F64), layer), self.rotate(k, k_positions.to(F64), layer)
        scores = q @ k[:, :, None].mT * self.scale
        if self.kind == "gemma2":
            scores = bounded(scores, self.config.attn_logit_softcapping)
        if allowed is not None:
            scores = scores.masked_fill(~allowed[:, None], -math.inf)
        sinks = self.weights.get(f"{self._prefix(layer)}self_attn.sinks")
        if sinks is not None:
            sinks = sinks.view(self.kv_heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
            scores = torch.cat([scores, sinks], -1)
        weights = (scores - scores.amax(-1, keepdim=True)).exp()
        weights = weights / weights.sum(-1, keepdim=True)
        return weights if sinks is None else weights[..., :-1]
