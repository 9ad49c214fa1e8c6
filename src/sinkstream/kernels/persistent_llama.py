"""Llama-like layers in one persistent kernel.

A layer has five phases: norm and qkv, attention, output projection, norm with gate and up, and down. Every program has
at most one tile of each.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from sinkstream.kernels.attention_decode_twin import attention_decode_twin
from sinkstream.kernels.config import PersistentConfig, count_programs
from sinkstream.kernels.norm_linear import norm_linear_twin
from sinkstream.kernels.persistent_layers import PersistentLayers, power
from sinkstream.kernels.persistent_llama_kernel import persistent_llama_kernel
from sinkstream.kernels.runtime import INTERPRETED, Prefetch, multiprocessors


class LlamaTensors(NamedTuple):
    """What the kernel reads of one layer, and the layer's slots.

    Attributes
    ----------
    norm, mlp_norm : Tensor, (hidden,)
    qkv, o, gate_up, down : Tensor
        Of half precision: ((query_heads + 2 * kv_heads) * head_dim, hidden), (hidden, query_heads * head_dim),
        (2 * intermediate, hidden) with all gate rows first, and (hidden, intermediate).
    keys, values : Tensor, (1, kv_heads, slots, head_dim)
    """

    norm: torch.Tensor
    qkv: torch.Tensor
    o: torch.Tensor
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True)
class LlamaGrid:
    """Programs of the kernel, and their tiles: rows of qkv, o, gate and up, down; slots and splits of attention."""

    rows: tuple[int, ...]
    slots: int
    splits: int
    ring_programs: int
    programs: int


class PersistentLlama(PersistentLayers):
    """Llama-like layers, all heads rotated whole; see `PersistentLayers`. `config`: a `PersistentConfig`."""

    phases = ("qkv", "attention", "o", "gate_up", "down")
    counters_used = 6
    config: PersistentConfig

    def sizes(self) -> tuple[int, int]:
        hidden, intermediate = self.layers[0].down.shape
        return hidden, intermediate

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        h, m, queries = self.hidden, self.intermediate, self.query_heads * self.head_dim
        rows = queries + 2 * self.kv_heads * self.head_dim
        return (h,), (rows, h), (h, queries), (h,), (2 * m, h), (h, m)

    def width(self) -> int:
        layer = self.layers[0]
        return len(layer.qkv) + layer.o.shape[1] + self.hidden + self.intermediate

    def share_out(self) -> LlamaGrid | None:
        """A grid in which every phase has at most one tile a program."""
        layer, config, heads = self.layers[0], self.config, self.query_heads
        most = config.per_sm * multiprocessors(self.device)
        counts = len(layer.qkv), len(layer.o), self.intermediate, len(layer.down)
        rows = []
        for count, tile in zip(counts, (1, 1, 2, 1), strict=True):
            tile *= config.warps
            while -(-count // tile) > most:
                tile *= 2
            rows.append(tile)
        if max(rows) > 4 * config.warps:  # more weights than registers hold
            return None
        for splits in range(1, most // heads + 1):
            per, of_ring, of_pinned = count_programs(splits, self.slots - self.pinned_slots, self.pinned_slots)
            if per <= config.slots and heads * (of_ring + of_pinned) <= most:
                tiles = (heads * (of_ring + of_pinned), *(-(-n // r) for n, r in zip(counts, rows, strict=True)))
                return LlamaGrid(tuple(rows), per, of_ring + of_pinned, of_ring, max(tiles))
        return None

    def arguments(self, prefetch: Prefetch) -> tuple[Any, tuple, dict[str, Any]]:
        assert self.grid is not None
        q, o, g, d = self.grid.rows
        constants = dict(
            H=self.hidden, M=self.intermediate, QH=self.query_heads, KVH=self.kv_heads, D=self.head_dim, BK=256,
            BQ=q, BO=o, BG=g, BD=d, BT=power(self.grid.slots), AHEAD=self.config.ahead and not INTERPRETED,
        )  # fmt: skip
        return persistent_llama_kernel, (), constants

    def twin(self, hidden: torch.Tensor, scalars: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
        x = hidden.float()
        for layer in self.layers:
            qkv = norm_linear_twin(x, layer.qkv, layer.norm, None, None, self.eps, "rms", "none")
            context = attention_decode_twin(
                qkv, layer.keys, layer.values, scalars, rope, self.query_heads, self.pinned_slots, "blocks", None, None,
                0.0,
            )  # fmt: skip
            x = x + context @ layer.o.float().T
            middle = norm_linear_twin(x, layer.gate_up, layer.mlp_norm, None, None, self.eps, "rms", "swiglu")
            x = x + middle @ layer.down.float().T
        return x
