"""The likeliest token of every stream, in two small kernels: one program alone is slow on a row of logits."""

import torch

from sinkstream.engine.ops.runtime import (
    check_tensor,
    gdc_launch_dependents,
    gdc_wait,
    has_dependent_launch,
    jit,
    launch,
    tl,
    triton,
    use_triton,
)

TILE = 2048  # logits of one program


@jit
def _first_largest(values, indices, none):
    """The largest value and the smallest index that has it; a value that is not a number counts as largest."""
    values = tl.where(values != values, float("inf"), values)
    top = tl.max(values, 0)
    return top, tl.min(tl.where(values == top, indices, none), 0)


@jit
def _tiles_kernel(
    logit_ptr, value_ptr, index_ptr, vocab, stride, TILE: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr
):
    """Program (tile, stream). EARLY: the kernel after it may start before it has ended."""
    tile, stream = tl.program_id(0), tl.program_id(1)
    if EARLY:
        gdc_launch_dependents()
    columns = tile * TILE + tl.arange(0, TILE)
    values = tl.load(logit_ptr + stream * stride + columns, mask=columns < vocab, other=-float("inf"))
    top, index = _first_largest(values, columns, vocab - 1)
    place = stream * tl.num_programs(0) + tile
    tl.store(value_ptr + place, top)
    tl.store(index_ptr + place, index)


@jit
def _streams_kernel(value_ptr, index_ptr, out_ptr, tiles, vocab, SIZE: tl.constexpr, PDL: tl.constexpr):
    """One program a stream."""
    stream, column = tl.program_id(0), tl.arange(0, SIZE)
    if PDL:
        gdc_wait()
    place = stream * tiles + column
    values = tl.load(value_ptr + place, mask=column < tiles, other=-float("inf"))
    indices = tl.load(index_ptr + place, mask=column < tiles, other=vocab - 1)
    tl.store(out_ptr + stream, _first_largest(values, indices, vocab - 1)[1].to(tl.int64))


def likeliest(logits: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """Index of the largest logit of every stream, the first of equals; one that is not a number counts as largest.

    Parameters
    ----------
    logits : Tensor, (streams, vocab), float32
    backend : {"auto", "triton", "torch"}, optional

    Returns
    -------
    Tensor, (streams,), int64

    Raises
    ------
    ValueError
        Naming the argument that the op cannot serve and what is accepted.
    """
    check_tensor("logits", logits, (None, None), dtypes=(torch.float32,), device=logits.device, contiguous=False)
    if not use_triton(backend, logits):
        return logits.argmax(-1)
    streams, vocab = logits.shape
    tiles = triton.cdiv(vocab, TILE)
    values = torch.empty(streams, tiles, device=logits.device)
    indices = torch.empty(streams, tiles, dtype=torch.int32, device=logits.device)
    out = torch.empty(streams, dtype=torch.int64, device=logits.device)
    early = has_dependent_launch(logits.device)
    launch(
        _tiles_kernel, (tiles, streams), logits, values, indices, vocab, logits.stride(0), TILE=TILE, EARLY=early,
        num_warps=8, pdl=False,
    )  # fmt: skip
    launch(
        _streams_kernel, (streams,), values, indices, out, tiles, vocab, SIZE=triton.next_power_of_2(tiles),
        num_warps=1, pdl=early,
    )  # fmt: skip
    return out
