"""All layers of a decode step of one stream in one persistent kernel, for models with small layers.

Programs wait for each other at counters (`persistent_parts`), so all of them must run at the same time, which a
cooperative launch guarantees: the driver refuses a grid that does not fit. Each kind of layer has a kernel of its own:
`persistent_llama`, `persistent_neox`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from sinkstream.kernels.config import MAX_REGISTERS
from sinkstream.kernels.runtime import (
    HALF_DTYPES,
    INTERPRETED,
    NO_PREFETCH,
    Prefetch,
    check_tensor,
    launch,
    use_triton,
)

REGISTERS = 65536  # of a multiprocessor, 4 bytes each
LINE = 32  # int32 values of a cache line: every counter has its own


class PersistentLayers(ABC):
    """All layers of a step of one stream: what `persistent_layers` runs, with its buffers and its table of addresses.

    Parameters
    ----------
    layers : sequence of NamedTuple
        What the kernel reads of each layer, in the order of the table of addresses, and the layer's slots last: keys
        and values (1, kv_heads, slots, head_dim), as in `attention_decode`, the last slots of a larger buffer, or all
        of them. All others are contiguous.
    query_heads, pinned_slots : int
    rotary : int
        Rotated columns of a head, the first ones.
    eps : float
        Of all norms.
    config : configuration of the kernel

    Attributes
    ----------
    grid : object or None
        How phases are shared among programs; None on a CPU without room for all of them, where the twin needs none.

    Raises
    ------
    ValueError
        Naming what the kernel does not serve and what is accepted.
    """

    phases: ClassVar[tuple[str, ...]]
    counters_used: ClassVar[int]

    def __init__(
        self, layers: Sequence[Any], *, query_heads: int, pinned_slots: int, rotary: int, eps: float, config: Any
    ):
        self.layers, self.query_heads, self.pinned_slots, self.eps = tuple(layers), query_heads, pinned_slots, eps
        self.config, self.rotary, one = config, rotary, self.layers[0]
        _, self.kv_heads, self.slots, self.head_dim = one.keys.shape
        self.stride = one.keys.stride(1) // self.head_dim  # slots from one kv head to the next
        self.dtype, self.device = one[-3].dtype, one.keys.device
        self.hidden, self.intermediate = self.sizes()
        self._check()
        self.grid = self.share_out()
        if self.grid is None and one.keys.is_cuda:
            raise ValueError(self.unfit())
        addresses = [[t.data_ptr() for t in layer] for layer in self.layers]
        self.table = torch.tensor(addresses, dtype=torch.int64, device=self.device)
        self.buffer = torch.zeros(self.width(), dtype=self.dtype, device=self.device)
        splits = 0 if self.grid is None else self.grid.splits
        self.partials = torch.zeros(query_heads * splits * (self.head_dim + 2), device=self.device)
        self.counters = torch.zeros(LINE * self.counters_used + query_heads, dtype=torch.int32, device=self.device)

    # ---- what a kind of layer says ----

    @abstractmethod
    def sizes(self) -> tuple[int, int]:
        """Values of the residual stream, and between the layers of the MLP."""

    @abstractmethod
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of the tensors of a layer but keys and values, in their order."""

    @abstractmethod
    def width(self) -> int:
        """Values of the buffer in which phases leave what later phases read."""

    @abstractmethod
    def share_out(self) -> Any:
        """The grid; None if the shape is too large for one wave of programs."""

    @abstractmethod
    def arguments(self, prefetch: Prefetch) -> tuple[Any, tuple, dict[str, Any]]:
        """The kernel, its arguments behind the common ones, and its own constants."""

    @abstractmethod
    def twin(self, hidden: torch.Tensor, scalars: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
        """The twin of the kernel: the twins of the separate ops, one after the other, in float32."""

    # ---- what is alike ----

    def unfit(self) -> str:
        """Says that the kernel does not serve the shape, and what it serves."""
        return (
            f"layers of {self.hidden} and {self.intermediate} values with {self.query_heads} heads over {self.slots}"
            " slots; accepted by the persistent kernel: shapes of which a multiprocessor holds its share of a layer in"
            " registers"
        )

    def _check(self) -> None:
        """Check the tensors of all layers. Raises ValueError."""
        one, dim = self.layers[0], self.head_dim
        if dim < 16 or dim & (dim - 1):
            raise ValueError(f"head_dim={dim}; accepted by the persistent kernel: powers of two from 16 on")
        shapes = (*self.shapes(), *((1, self.kv_heads, self.slots, dim),) * 2)
        for i, layer in enumerate(self.layers):
            for name, tensor, shape in zip(layer._fields, layer, shapes, strict=True):
                check_tensor(
                    f"{name} of layer {i}", tensor, shape, dtypes=(self.dtype,), device=self.device,
                    contiguous=len(shape) < 4,
                )  # fmt: skip
                if len(shape) == 4 and (tensor.stride() != one.keys.stride() or tensor.stride(2) != dim):
                    raise ValueError(
                        f"{name} of layer {i} has strides {tensor.stride()}; accepted: slots of {dim} values in a row,"
                        f" and the strides of the keys of layer 0, {one.keys.stride()}"
                    )
                if tensor.data_ptr() % 16 or shape[-1] % 8:
                    raise ValueError(
                        f"{name} of layer {i} has rows of {shape[-1]} values at an address {tensor.data_ptr() % 16}"
                        " bytes past a multiple of 16; accepted: rows of a multiple of 8 values, aligned to 16 bytes"
                    )


def persistent_layers(
    hidden: torch.Tensor,
    other: torch.Tensor,
    layers: PersistentLayers,
    scalars: torch.Tensor,
    rope: torch.Tensor,
    *,
    prefetch: Prefetch = NO_PREFETCH,
    implementation: str | None = None,
) -> torch.Tensor:
    """Run all layers on the residual stream of one token, and append its keys and values.

    Parameters
    ----------
    hidden, other : Tensor, (1, hidden)
        The residual stream, and room for it; both are overwritten.
    layers : PersistentLayers
    scalars : Tensor, (1, 8), int32
    rope : Tensor, (1, 2, 2, rotary / 2), float32
        Both as in `attention_decode`.
    prefetch : Prefetch
        Buffers that the next kernel reads first, by a kernel that prefetches them.
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
    for name, tensor in (("hidden", hidden), ("other", other)):
        check_tensor(name, tensor, (1, layers.hidden), dtypes=(layers.dtype,), device=layers.device)
    check_tensor("scalars", scalars, (1, 8), dtypes=(torch.int32,), device=layers.device)
    check_tensor("rope", rope, (1, 2, 2, layers.rotary // 2), dtypes=(torch.float32,), device=layers.device)
    result = (hidden, other)[len(layers.layers) % 2]
    if not use_triton(implementation, hidden):
        return result.copy_(layers.twin(hidden, scalars, rope))
    if layers.dtype not in HALF_DTYPES:
        names = ", ".join(map(str, HALF_DTYPES))
        raise ValueError(f"weights of dtype {layers.dtype}; accepted by the kernel: {names}")
    if layers.grid is None:
        raise ValueError(layers.unfit())
    count, inputs = len(layers.layers), (hidden, other, layers.table, scalars, rope)
    if not INTERPRETED:
        _launch(layers, inputs, 0, count, -1, prefetch)
        return result
    for i in range(count):
        for phase in range(len(layers.phases)):
            _launch(layers, inputs, i, i + 1, phase, NO_PREFETCH)
    return result


def _launch(layers: PersistentLayers, inputs: tuple, first: int, end: int, phase: int, prefetch: Prefetch) -> None:
    assert layers.grid is not None, "checked before the first launch"
    grid, ring = layers.grid, layers.slots - layers.pinned_slots
    scale = math.log2(math.e) / math.sqrt(layers.head_dim)
    kernel, arguments, constants = layers.arguments(prefetch)
    cooperative = {} if INTERPRETED else {"launch_cooperative_grid": True}
    several = layers.config.per_sm > 1  # all programs must run at once
    registers = thread_registers(layers.config.warps, layers.config.per_sm) if several else 0
    launch(
        kernel, (grid.programs,), *inputs, layers.buffer, layers.partials, layers.counters, first, end,
        len(layers.layers), layers.eps, layers.pinned_slots, ring, grid.slots, grid.ring_programs, layers.stride,
        scale, *arguments, **constants, S=grid.splits, SP=power(grid.splits), PHASE=phase, COMPILED=not INTERPRETED,
        num_warps=layers.config.warps, pdl=False, registers=registers, **cooperative,
    )  # fmt: skip


def thread_registers(warps: int, per_sm: int) -> int:
    """The most registers of a thread with which so many programs fit a multiprocessor; they are given out in eights."""
    return min(MAX_REGISTERS, REGISTERS // (32 * warps * per_sm) // 8 * 8)


def power(value: int) -> int:
    """The least power of two that is not less, at least 16."""
    return max(16, 1 << (value - 1).bit_length())
