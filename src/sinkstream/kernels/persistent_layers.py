"""All layers of a decode step of one stream in one persistent kernel, for Llama-like models with small layers.

A layer has five phases: norm and qkv, attention, output projection, norm with gate and up, and down. Every program has
at most one tile of each. Programs wait for each other at counters (`persistent_kernel`), so all of them must run at the
same time, which a cooperative launch guarantees: the driver refuses a grid that does not fit.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sinkstream.kernels.attention_decode_twin import attention_decode_twin
from sinkstream.kernels.config import PersistentConfig, count_programs
from sinkstream.kernels.norm_linear import norm_linear_twin
from sinkstream.kernels.persistent_kernel import persistent_layers_kernel
from sinkstream.kernels.runtime import (
    HALF_DTYPES,
    INTERPRETED,
    check_tensor,
    launch,
    multiprocessors,
    use_triton,
)

PHASES = ("qkv", "attention", "o", "gate_up", "down")
LINE = 32  # int32 values of a cache line: every counter has its own


@dataclass(frozen=True)
class LayerTensors:
    """What the kernel reads of one layer, and the layer's slots; all contiguous, but for the heads of keys and values.

    Attributes
    ----------
    norm, mlp_norm : Tensor, (hidden,)
    qkv, o, gate_up, down : Tensor
        Of half precision: ((query_heads + 2 * kv_heads) * head_dim, hidden), (hidden, query_heads * head_dim),
        (2 * intermediate, hidden) with all gate rows first, and (hidden, intermediate).
    keys, values : Tensor, (1, kv_heads, slots, head_dim)
        As in `attention_decode`: the last slots of a larger buffer, or all of them.
    """

    norm: torch.Tensor
    qkv: torch.Tensor
    o: torch.Tensor
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """In the order of the table of addresses."""
        return self.norm, self.qkv, self.o, self.mlp_norm, self.gate_up, self.down, self.keys, self.values


@dataclass(frozen=True)
class Grid:
    """Programs of the kernel, and their tiles: rows of qkv, o, gate and up, down; slots and splits of attention."""

    rows: tuple[int, ...]
    slots: int
    splits: int
    ring_programs: int
    programs: int


def grid_of(layer: LayerTensors, query_heads: int, pinned_slots: int, config: PersistentConfig) -> Grid | None:
    """A grid in which every phase has at most one tile a program; None if the shape is too large for one wave."""
    slots = layer.keys.shape[2]
    most = config.per_sm * multiprocessors(layer.keys.device)
    counts = len(layer.qkv), len(layer.o), len(layer.gate_up) // 2, len(layer.down)
    rows = []
    for count, tile in zip(counts, (1, 1, 2, 1), strict=True):
        tile *= config.warps
        while -(-count // tile) > most:
            tile *= 2
        rows.append(tile)
    if max(rows) > 4 * config.warps:  # more weights than registers hold
        return None
    for splits in range(1, most // query_heads + 1):
        per, of_ring, of_pinned = count_programs(splits, slots - pinned_slots, pinned_slots)
        if per <= config.slots and query_heads * (of_ring + of_pinned) <= most:
            tiles = (query_heads * (of_ring + of_pinned), *(-(-n // r) for n, r in zip(counts, rows, strict=True)))
            return Grid(tuple(rows), per, of_ring + of_pinned, of_ring, max(tiles))
    return None


class PersistentLayers:
    """All layers of a step of one stream: what `persistent_layers` runs, with its buffers and its table of addresses.

    Parameters
    ----------
    layers : sequence of LayerTensors
    query_heads, pinned_slots : int
    eps : float
        Of all norms.
    config : PersistentConfig

    Raises
    ------
    ValueError
        Naming what the kernel does not serve and what is accepted.
    """

    def __init__(
        self,
        layers: Sequence[LayerTensors],
        *,
        query_heads: int,
        pinned_slots: int,
        eps: float,
        config: PersistentConfig,
    ):
        self.layers, self.query_heads, self.pinned_slots, self.eps = tuple(layers), query_heads, pinned_slots, eps
        self.config, layer = config, self.layers[0]
        _, self.kv_heads, self.slots, self.head_dim = layer.keys.shape
        self.stride = layer.keys.stride(1) // self.head_dim  # slots from one kv head to the next
        self.hidden, self.intermediate = layer.down.shape
        check_layers(self.layers, query_heads)
        grid = grid_of(layer, query_heads, pinned_slots, config)
        if grid is None and layer.qkv.is_cuda:
            raise ValueError(
                f"layers of {self.hidden} and {self.intermediate} values with {query_heads} heads over {self.slots}"
                " slots; accepted by the persistent kernel: shapes of which a multiprocessor holds its share of a"
                " layer in registers"
            )
        self.grid, device, dtype = grid, layer.qkv.device, layer.qkv.dtype
        width = len(layer.qkv) + layer.o.shape[1] + self.hidden + self.intermediate
        addresses = [[t.data_ptr() for t in layer.tensors] for layer in self.layers]
        self.table = torch.tensor(addresses, dtype=torch.int64, device=device)
        self.buffer = torch.zeros(width, dtype=dtype, device=device)
        splits = 0 if grid is None else grid.splits  # a CPU needs none for the twin
        self.partials = torch.zeros(query_heads * splits * (self.head_dim + 2), device=device)
        self.counters = torch.zeros(LINE * 6 + query_heads, dtype=torch.int32, device=device)


def check_layers(layers: tuple[LayerTensors, ...], query_heads: int) -> None:
    """Check the tensors of all layers. Raises ValueError."""
    one = layers[0]
    (hidden, intermediate), (_, kv_heads, slots, dim) = one.down.shape, one.keys.shape
    shapes = (
        (hidden,), ((query_heads + 2 * kv_heads) * dim, hidden), (hidden, query_heads * dim), (hidden,),
        (2 * intermediate, hidden), (hidden, intermediate), (1, kv_heads, slots, dim), (1, kv_heads, slots, dim),
    )  # fmt: skip
    names = ("norm", "qkv", "o", "mlp_norm", "gate_up", "down", "keys", "values")
    if dim < 16 or dim & (dim - 1):
        raise ValueError(f"head_dim={dim}; accepted by the persistent kernel: powers of two from 16 on")
    for i, layer in enumerate(layers):
        for name, tensor, shape in zip(names, layer.tensors, shapes, strict=True):
            check_tensor(
                f"{name} of layer {i}", tensor, shape, dtypes=(one.qkv.dtype,), device=one.qkv.device,
                contiguous=len(shape) < 4,
            )  # fmt: skip
            if len(shape) == 4 and (tensor.stride() != one.keys.stride() or tensor.stride(2) != dim):
                raise ValueError(
                    f"{name} of layer {i} has strides {tensor.stride()}; accepted: slots of {dim} values in a row, and"
                    f" the strides of the keys of layer 0, {one.keys.stride()}"
                )
            if tensor.data_ptr() % 16 or shape[-1] % 8:
                raise ValueError(
                    f"{name} of layer {i} has rows of {shape[-1]} values at an address {tensor.data_ptr() % 16} bytes"
                    " past a multiple of 16; accepted: rows of a multiple of 8 values, aligned to 16 bytes"
                )


def persistent_layers(
    hidden: torch.Tensor,
    other: torch.Tensor,
    layers: PersistentLayers,
    scalars: torch.Tensor,
    rope: torch.Tensor,
    *,
    implementation: str | None = None,
) -> torch.Tensor:
    """Run all layers on the residual stream of one token, and append its keys and values.

    Parameters
    ----------
    hidden, other : Tensor, (1, hidden)
        The residual stream, and room for it; both are overwritten.
    layers : PersistentLayers
    scalars : Tensor, (1, 8), int32
    rope : Tensor, (1, 2, 2, head_dim / 2), float32
        Both as in `attention_decode`.
    implementation : {"auto", "triton", "torch"}, optional
        Interpreted, every phase is a launch of its own.

    Returns
    -------
    Tensor, (1, hidden)
        `hidden` or `other`: the residual stream after the last layer.

    Raises
    ------
    ValueError
        Naming the argument that the op cannot serve and what is accepted.
    """
    one, device = layers.layers[0], layers.table.device
    for name, tensor in (("hidden", hidden), ("other", other)):
        check_tensor(name, tensor, (1, layers.hidden), dtypes=(one.qkv.dtype,), device=device)
    check_tensor("scalars", scalars, (1, 8), dtypes=(torch.int32,), device=device)
    check_tensor("rope", rope, (1, 2, 2, layers.head_dim // 2), dtypes=(torch.float32,), device=device)
    result = (hidden, other)[len(layers.layers) % 2]
    if not use_triton(implementation, hidden):
        return result.copy_(persistent_layers_twin(hidden, layers, scalars, rope))
    if one.qkv.dtype not in HALF_DTYPES:
        names = ", ".join(map(str, HALF_DTYPES))
        raise ValueError(f"weights of dtype {one.qkv.dtype}; accepted by the kernel: {names}")
    if not INTERPRETED:
        _launch(hidden, other, layers, scalars, rope, 0, len(layers.layers), -1)
        return result
    for i in range(len(layers.layers)):
        for phase in range(len(PHASES)):
            _launch(hidden, other, layers, scalars, rope, i, i + 1, phase)
    return result


def _launch(hidden, other, layers, scalars, rope, first_layer, end_layer, phase):
    assert layers.grid is not None, "the interpreter has programs enough for every phase"
    grid, config, dim, ring = layers.grid, layers.config, layers.head_dim, layers.slots - layers.pinned_slots
    cooperative = {} if INTERPRETED else {"launch_cooperative_grid": True}
    launch(
        persistent_layers_kernel, (grid.programs,), hidden, other, layers.table, scalars, rope, layers.buffer,
        layers.partials, layers.counters, first_layer, end_layer, len(layers.layers), layers.eps, layers.pinned_slots,
        ring, grid.slots, grid.ring_programs, layers.stride, math.log2(math.e) / math.sqrt(dim),
        H=layers.hidden, M=layers.intermediate, QH=layers.query_heads, KVH=layers.kv_heads, D=dim, BK=256,
        BQ=grid.rows[0], BO=grid.rows[1], BG=grid.rows[2], BD=grid.rows[3], BT=_power(grid.slots), S=grid.splits,
        SP=_power(grid.splits), PHASE=phase, AHEAD=config.ahead and not INTERPRETED, COMPILED=not INTERPRETED,
        num_warps=config.warps, pdl=False, **cooperative,
    )  # fmt: skip


def _power(value: int) -> int:
    """The least power of two that is not less, at least 16."""
    return max(16, 1 << (value - 1).bit_length())


def persistent_layers_twin(hidden, layers: PersistentLayers, scalars, rope) -> torch.Tensor:
    """The twin of the kernel: the twins of the separate ops, one after the other, in float32."""
    x = hidden.float()
    for layer in layers.layers:
        qkv = norm_linear_twin(x, layer.qkv, layer.norm, None, None, layers.eps, "rms", "none")
        context = attention_decode_twin(
            qkv, layer.keys, layer.values, scalars, rope, layers.query_heads, layers.pinned_slots, "blocks", None, None,
            0.0,
        )  # fmt: skip
        x = x + context @ layer.o.float().T
        middle = norm_linear_twin(x, layer.gate_up, layer.mlp_norm, None, None, layers.eps, "rms", "swiglu")
        x = x + middle @ layer.down.float().T
    return x
