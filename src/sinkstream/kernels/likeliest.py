"""The likeliest token of every stream, in two small kernels: one program alone is slow on a row of logits.

In a decode step the first of them comes before `begin_step`, whose kernel does what the second does.
"""

from copy import copy

import torch

from sinkstream.kernels.runtime import (
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
def first_largest(values, indices, none):
    """The largest value and the smallest index that has it; a value that is not a number counts as largest."""
    values = tl.where(values != values, float("inf"), values)
    top = tl.max(values, 0)
    return top, tl.min(tl.where(values == top, indices, none), 0)


@jit
def likeliest_of_tiles(value_ptr, index_ptr, stream, tiles, vocab, SIZE: tl.constexpr):
    """What the tiles of one stream come to: largest value, index int64; to be called once they are final."""
    column = tl.arange(0, SIZE)
    place = stream * tiles + column
    values = tl.load(value_ptr + place, mask=column < tiles, other=-float("inf"))
    indices = tl.load(index_ptr + place, mask=column < tiles, other=vocab - 1)
    top, index = first_largest(values, indices, vocab - 1)
    return top, index.to(tl.int64)


@jit
def _tiles_kernel(
    token_ptr, logit_ptr, value_ptr, index_ptr, vocab, stride, ALL: tl.constexpr, TILE: tl.constexpr,
    EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (tile, stream); without ALL only for streams without a token. EARLY: the next kernel may start now."""
    tile, stream = tl.program_id(0), tl.program_id(1)
    if EARLY:
        gdc_launch_dependents()
    wanted = ALL
    if not ALL:
        wanted = tl.load(token_ptr + stream) < 0
    if wanted:
        columns = tile * TILE + tl.arange(0, TILE)
        values = tl.load(logit_ptr + stream * stride + columns, mask=columns < vocab, other=-float("inf"))
        top, index = first_largest(values, columns, vocab - 1)
        place = stream * tl.num_programs(0) + tile
        tl.store(value_ptr + place, top)
        tl.store(index_ptr + place, index)


@jit
def streams_kernel(
    value_ptr, index_ptr, out_ptr, tiles, vocab, REFUSE: tl.constexpr, SIZE: tl.constexpr, PDL: tl.constexpr
):
    """One program a stream. REFUSE: -1 where the largest value is infinite."""
    stream = tl.program_id(0)
    if PDL:
        gdc_wait()
    top, index = likeliest_of_tiles(value_ptr, index_ptr, stream, tiles, vocab, SIZE)
    if REFUSE:
        index = tl.where((top == float("inf")) | (top == -float("inf")), -1, index)
    tl.store(out_ptr + stream, index)


class Tiles:
    """Room for the largest logit of every tile, and its index.

    Parameters
    ----------
    streams, vocab : int
        Axes of the logits.
    device : torch.device
    tile : int
        Logits of one program.

    Attributes
    ----------
    values, indices : Tensor, (streams, tiles), float32 and int32
    count : int
        Tiles of one stream.
    """

    def __init__(self, streams: int, vocab: int, device: torch.device, tile: int = TILE):
        self.count = -(-vocab // tile)
        self.values = torch.zeros(streams, self.count, dtype=torch.float32, device=device)
        self.indices = torch.zeros(streams, self.count, dtype=torch.int32, device=device)

    def span(self, first: int, count: int) -> "Tiles":
        """Room of `count` streams from `first` on, as views."""
        which, part = slice(first, first + count), copy(self)
        part.values, part.indices = self.values[which], self.indices[which]
        return part

    def find(self, logits: torch.Tensor, tokens: torch.Tensor | None = None) -> bool:
        """Launch the first half of the search.

        Parameters
        ----------
        logits : Tensor, (streams, vocab), float32
        tokens : Tensor, (streams,), int64 or int32, optional
            Only streams with a negative one are searched.

        Returns
        -------
        bool
            Whether the next kernel is to be launched early. Every program of it must then wait, whether it reads the
            tiles or not, so that what follows it finds this kernel ended as well.
        """
        streams, vocab = logits.shape
        early = has_dependent_launch(logits.device)
        launch(
            _tiles_kernel, (self.count, streams), logits if tokens is None else tokens, logits, self.values,
            self.indices, vocab, logits.stride(0), ALL=tokens is None, TILE=TILE, EARLY=early, num_warps=8, pdl=False,
        )  # fmt: skip
        return early


def likeliest(logits: torch.Tensor, *, implementation: str | None = None) -> torch.Tensor:
    """Index of the largest logit of every stream, the first of equals; one that is not a number counts as largest.

    Parameters
    ----------
    logits : Tensor, (streams, vocab), float32
    implementation : {"auto", "triton", "torch"}, optional

    Returns
    -------
    Tensor, (streams,), int64

    Raises
    ------
    ValueError
        Naming the argument that the op cannot serve and what is accepted.
    """
    check_tensor("logits", logits, (None, None), dtypes=(torch.float32,), device=logits.device, contiguous=False)
    if not use_triton(implementation, logits):
        return logits.argmax(-1)
    streams, vocab = logits.shape
    tiles = Tiles(streams, vocab, logits.device)
    out = torch.empty(streams, dtype=torch.int64, device=logits.device)
    early = tiles.find(logits)
    launch(
        streams_kernel, (streams,), tiles.values, tiles.indices, out, tiles.count, vocab, REFUSE=False,
        SIZE=triton.next_power_of_2(tiles.count), num_warps=1, pdl=early,
    )  # fmt: skip
    return out
