"""What is tuned: published model shapes, and two small ones for tests."""

from dataclasses import dataclass

import torch
from transformers import GPTNeoXConfig, LlamaConfig, PreTrainedConfig

from sinkstream.kernels.plans import LLAMA_OPS, NEOX_OPS
from sinkstream.models.shapes import SHAPES as PUBLISHED
from sinkstream.models.shapes import shape_config

SINK = 4


@dataclass(frozen=True)
class Shape:
    """A model's configuration, the dtype of its weights, and the size and number of its streams."""

    name: str
    config: PreTrainedConfig
    dtype: torch.dtype
    cap: int = 2052
    streams: int = 1

    @classmethod
    def published(cls, name: str) -> "Shape":
        """The shape that `random:NAME` loads; GPT-NeoX in float16, Llama-like ones in bfloat16."""
        config = shape_config(name)
        return cls(name, config, torch.float16 if config.model_type == "gpt_neox" else torch.bfloat16)

    @property
    def neox(self) -> bool:
        return self.config.model_type == "gpt_neox"

    @property
    def layers(self) -> int:
        return self.config.num_hidden_layers

    @property
    def heads(self) -> int:
        return self.config.num_attention_heads

    @property
    def kv_heads(self) -> int:
        return getattr(self.config, "num_key_value_heads", self.heads)

    @property
    def head_dim(self) -> int:
        return self.config.hidden_size // self.heads

    @property
    def ops(self) -> tuple[str, ...]:
        """Ops of a layer, in order, and "head"."""
        return (*(NEOX_OPS if self.neox else LLAMA_OPS), "head")

    @property
    def linear_ops(self) -> tuple[str, ...]:
        """Ops whose configuration is a `LinearConfig`."""
        return tuple(op for op in self.ops if op not in ("attention", "attention_up"))

    @property
    def widths(self) -> dict[str, tuple[int, int]]:
        """(rows, columns) of the weight that an op reads."""
        c = self.config
        h, q, kv = c.hidden_size, self.heads * self.head_dim, self.kv_heads * self.head_dim
        sizes = {"qkv": (q + 2 * kv, h), "head": (c.vocab_size, h)}
        if self.neox:
            sizes["out"] = (h, q + c.intermediate_size)
            if self.streams > 1:  # the up-projection is in the product of `qkv`
                return sizes | {"qkv": (q + 2 * kv + c.intermediate_size, h)}
            return sizes | {"attention_up": (c.intermediate_size, h)}
        return sizes | {"o": (h, q), "gate_up": (2 * c.intermediate_size, h), "down": (h, c.intermediate_size)}

    def calls(self, op: str) -> int:
        """How often a step launches an op."""
        return 1 if op == "head" else self.layers

    def bytes_of(self, op: str) -> int:
        """Bytes that one call must read: weights, keys and values."""
        rows, columns = self.widths.get(op, (0, 0))
        cached = (
            2 * self.streams * self.kv_heads * self.cap * self.head_dim if op in ("attention", "attention_up") else 0
        )
        return (rows * columns + cached) * self.dtype.itemsize

    @property
    def step_bytes(self) -> int:
        """Bytes that a step must read."""
        return sum(self.calls(op) * self.bytes_of(op) for op in self.ops)


_SMALL = {"num_hidden_layers": 2, "vocab_size": 200, "max_position_embeddings": 512}
_SMALL_NEOX = GPTNeoXConfig(
    hidden_size=160,
    num_attention_heads=2,
    intermediate_size=320,
    rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
    **_SMALL,
)
_SMALL_LLAMA = LlamaConfig(
    hidden_size=256, num_attention_heads=4, num_key_value_heads=2, intermediate_size=256, **_SMALL
)
SHAPES = {
    s.name: s
    for s in (
        *map(Shape.published, PUBLISHED),
        Shape("smoke-neox", _SMALL_NEOX, torch.float16, 45),
        Shape("smoke-llama", _SMALL_LLAMA, torch.bfloat16, 45),
    )
}
