"""GPT-NeoX layers with parallel residual in one persistent kernel.

A layer has three phases: both norms with qkv and the up-projection, attention, and the output. The rows of a phase are
shared evenly among all programs, in tiles that are held in registers while a program waits.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from sinkstream.kernels.attention_decode_twin import attention_decode_twin
from sinkstream.kernels.config import PersistentNeoxConfig, count_programs
from sinkstream.kernels.linear_residual import linear_residual_twin
from sinkstream.kernels.norm_linear import norm_linear_twin
from sinkstream.kernels.persistent_layers import PersistentLayers, thread_registers
from sinkstream.kernels.persistent_neox_kernel import persistent_neox_kernel
from sinkstream.kernels.runtime import INTERPRETED, Prefetch, multiprocessors

MOST_HELD = 0.7  # share of a thread's registers that weights and slots take; more would leave none to compute with


class NeoxTensors(NamedTuple):
    """What the kernel reads of one layer, and the layer's slots.

    Attributes
    ----------
    norm, norm_bias, mlp_norm, mlp_norm_bias : Tensor, (hidden,)
        For the first ``3 * heads * head_dim`` rows of `weight_in`, and for the others.
    weight_in, bias_in : Tensor, (3 * heads * head_dim + intermediate, hidden) and its rows
        Queries, keys and values (per head q, k, v), then the up-projection.
    weight_out, bias_out : Tensor, (hidden, heads * head_dim + intermediate) and its rows
        Attention output and down-projection side by side.
    keys, values : Tensor, (1, heads, slots, head_dim)
    """

    norm: torch.Tensor
    norm_bias: torch.Tensor
    mlp_norm: torch.Tensor
    mlp_norm_bias: torch.Tensor
    weight_in: torch.Tensor
    bias_in: torch.Tensor
    weight_out: torch.Tensor
    bias_out: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True)
class NeoxGrid:
    """Programs of the kernel, and their shares: rows of qkv, up-projection, output; slots and splits of attention."""

    rows: tuple[int, int, int]
    slots: int
    splits: int
    ring_programs: int
    programs: int


class PersistentNeox(PersistentLayers):
    """GPT-NeoX layers with parallel residual; see `PersistentLayers`. `config`: a `PersistentNeoxConfig`."""

    phases = ("in", "attention", "out")
    counters_used = 5
    config: PersistentNeoxConfig

    def sizes(self) -> tuple[int, int]:
        hidden, columns = self.layers[0].weight_out.shape
        return hidden, columns - self.query_heads * self.head_dim

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        h, context = self.hidden, self.query_heads * self.head_dim
        rows = 3 * context + self.intermediate
        return (h,), (h,), (h,), (h,), (rows, h), (rows,), (h, context + self.intermediate), (h,)

    def width(self) -> int:
        return 4 * self.query_heads * self.head_dim + self.intermediate

    def columns(self, rows: int) -> int:
        """Columns of a weight tile of so many rows that all threads load at once, 8 each."""
        return 256 * max(1, self.config.warps // rows)

    def share_out(self) -> NeoxGrid | None:
        """A grid with as many splits of attention as there is room for, and as many programs for the rows."""
        config, heads = self.config, self.query_heads
        most = config.per_sm * multiprocessors(self.device)
        if self.kv_heads != heads:
            return None
        for splits in range(most // heads, 0, -1):
            per, of_ring, of_pinned = count_programs(splits, self.slots - self.pinned_slots, self.pinned_slots)
            if heads * (of_ring + of_pinned) > most:
                continue
            counts = 3 * heads * self.head_dim, self.intermediate, self.hidden
            q, u, o = (-(-count // most) for count in counts)
            programs = max(heads * (of_ring + of_pinned), *(-(-n // r) for n, r in zip(counts, (q, u, o), strict=True)))
            grid = NeoxGrid((q, u, o), per, of_ring + of_pinned, of_ring, programs)
            return grid if self._held(grid) <= MOST_HELD else None
        return None

    def _held(self, grid: NeoxGrid) -> float:
        """The largest share of a thread's registers that weights and slots take between two waits."""
        config, threads = self.config, 32 * self.config.warps

        def weights(share: int, rows: int, *widths: int) -> int:
            chunk = self.columns(rows)
            return -(-share // rows) * rows * sum(-(-width // chunk) * chunk for width in widths) * 2

        q, u = (weights(share, config.rows, self.hidden) for share in grid.rows[:2])
        slots = -(-grid.slots // config.slots) * config.slots * self.head_dim * 4
        out = weights(grid.rows[2], config.out_rows, self.query_heads * self.head_dim, self.intermediate)
        most = max(q + (u if config.early else 0) + (slots if config.early > 1 else 0), u + slots, out)
        return most / 4 / threads / thread_registers(config.warps, config.per_sm)

    def arguments(self, prefetch: Prefetch) -> tuple[Any, tuple, dict[str, Any]]:
        assert self.grid is not None
        config, grid, (q, u, o) = self.config, self.grid, self.grid.rows
        constants = dict(
            H=self.hidden, M=self.intermediate, QH=self.query_heads, D=self.head_dim, C=self.rotary // 2, RQ=q, RU=u,
            RO=o, BN=config.rows, BK=self.columns(config.rows), BO=config.out_rows, BC=self.columns(config.out_rows),
            BT=config.slots, TILES=-(-grid.slots // config.slots), LEAD=0 if INTERPRETED else config.lead,
            EARLY=0 if INTERPRETED else config.early, NEXT=bool(prefetch),
        )  # fmt: skip
        return persistent_neox_kernel, prefetch.arguments(self.layers[0].weight_in, grid.programs), constants

    def twin(self, hidden: torch.Tensor, scalars: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
        x, rows = hidden.float(), 3 * self.query_heads * self.head_dim
        for t in self.layers:
            qkv = norm_linear_twin(
                x, t.weight_in[:rows], t.norm, t.norm_bias, t.bias_in[:rows], self.eps, "layer", "none"
            )
            context = attention_decode_twin(
                qkv, t.keys, t.values, scalars, rope, self.query_heads, self.pinned_slots, "per-head", None, None, 0.0
            )
            middle = norm_linear_twin(
                x, t.weight_in[rows:], t.mlp_norm, t.mlp_norm_bias, t.bias_in[rows:], self.eps, "layer", "gelu"
            )
            x = linear_residual_twin(context, t.weight_out, middle, t.bias_out, x)
        return x
