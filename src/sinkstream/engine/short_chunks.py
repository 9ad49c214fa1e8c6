"""Short chunks of a prompt at addresses that never change, so that a CUDA graph holds the whole forward of one.

A chat turn is a few dozen tokens: launching the kernels of its forward one by one takes many times as long as the
kernels themselves. A chunk is padded to one of a few sizes; padded tokens come last, are seen by no query and are
written nowhere. Which stream, which slots and how many tokens is read from a table on the device, so one graph a size
serves all streams.
"""

from collections.abc import Callable

import numpy as np
import torch

from sinkstream.engine.state import StreamState
from sinkstream.kernels.band import SCALARS, Band
from sinkstream.kernels.runtime import HALF_DTYPES, use_triton

SHORT_SIZES = (16, 32, *range(64, 513, 64))
WARMUPS = 2


class ShortChunks:
    """The forward of chunks of at most so many tokens.

    Parameters
    ----------
    state : StreamState
    forward : callable
        ``forward(ids, band)`` appends padded token ids ``(size,)`` as the band says and writes the logits after the
        last token that is not padding; nothing that it launches may depend on the band's integers on the host.
    sizes : sequence of int
        Padded sizes, rising.
    capture : bool
        Whether the forwards are captured in CUDA graphs, each at the first chunk of its size, where kernels compute
        them; otherwise they are run as they are.
    written : callable
        Parts of the state that the forward of a token which stays nowhere writes of stream 0, beside logits, channels
        and queries.
    kind : str
        What the chunks do, for the name of their captures.
    """

    def __init__(
        self,
        state: StreamState,
        forward: Callable[[torch.Tensor, Band], None],
        sizes: tuple[int, ...] = SHORT_SIZES,
        *,
        capture: bool = True,
        written: Callable[[], list[torch.Tensor]] = list,
        kind: str = "",
    ):
        self.state, self.forward, self.sizes, self.capture = state, forward, sizes, capture
        self._written, self._kind = written, kind
        self._inputs: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def size(self, tokens: int) -> int | None:
        """The size that a chunk is padded to; None for a chunk that is not short, or that no kernel computes."""
        if self.capture and not computed_by_kernels(self.state):
            return None
        return next((size for size in self.sizes if size >= tokens), None)

    def table(self, size: int) -> torch.Tensor:
        """Where the band of the coming chunk of a size is written; captures the forward of that size before, once."""
        if self.capture:
            self.ready(size)
        return self._buffers(size)[1]

    def ready(self, size: int) -> None:
        """Capture the forward of a size, unless it is captured."""
        if size not in self._graphs:
            self._graphs[size] = self._capture(size)

    def due(self, tokens: int | None = None) -> list[int]:
        """Sizes of chunks of up to so many tokens that are not captured yet; the largest first, whose memory fits all.

        Parameters
        ----------
        tokens : int or None
            Default: all sizes.
        """
        if not (self.capture and computed_by_kernels(self.state)):
            return []
        largest = None if tokens is None else self.size(tokens)
        return [s for s in reversed(self.sizes) if s not in self._graphs and (largest is None or s <= largest)]

    def prepare(self, tokens: int | None = None) -> None:
        """Capture the forwards of chunks of up to so many tokens now, so that no chunk waits for a capture."""
        for size in self.due(tokens):
            self.ready(size)

    def __call__(self, ids: torch.Tensor, band: Band) -> None:
        """Append token ids ``(tokens,)`` as a band in the table of their size says."""
        padded, _ = self._buffers(band.rows)
        padded[: len(ids)].copy_(ids)
        if self.capture:
            self._graphs[band.rows].replay()
        else:
            self.forward(padded, band)

    def _buffers(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids ``(size,)`` int64 and the table of the band; padding is any token."""
        if size not in self._inputs:
            device = self.state.device
            with torch.inference_mode(False):
                self._inputs[size] = (
                    torch.zeros(size, dtype=torch.int64, device=device),
                    torch.zeros(SCALARS + 2 * size, dtype=torch.int32, device=device),
                )
        return self._inputs[size]

    def _capture(self, size: int) -> torch.cuda.CUDAGraph:
        """Capture the forward of one token that stays nowhere; what else it writes of stream 0 is put back."""
        state, (ids, table) = self.state, self._buffers(size)
        band = idle_band(state, table)
        written = [state.logits[0], *(channel[:, 0] for channel in state.channels.values())]
        written += self._written() + ([] if state.queries is None else [state.queries[:, 0]])
        before = [part.clone() for part in written]
        try:
            name = f"the forward of a chunk of {size} tokens {self._kind}".strip()
            return state.captures(lambda: self.forward(ids, band), name=name, warmups=WARMUPS)
        finally:
            for part, held in zip(written, before):
                part.copy_(held)


def computed_by_kernels(state: StreamState) -> bool:
    """Whether kernels compute a forward: their twins are cut up by the host, so a graph cannot hold them."""
    return state.keys.is_cuda and state.keys.dtype in HALF_DTYPES and use_triton(None, state.keys)


def short_chunk_sizes(chunk_tokens: int) -> tuple[int, ...]:
    """`SHORT_SIZES`, up to the first that a chunk of at most `chunk_tokens` tokens fits."""
    below = [size for size in SHORT_SIZES if size < chunk_tokens]
    return SHORT_SIZES[: len(below) + 1]


def idle_band(state: StreamState, table: torch.Tensor) -> Band:
    """The band of one token behind the sinks that sees itself and the sinks, and is written nowhere; row 0."""
    g = state.geometry
    return Band(
        np.zeros(1, dtype=np.int64),
        None if g.original else np.zeros(1, dtype=np.int64),
        state.spec.rope.frequencies(state.device),
        past=g.sink,
        length=0,
        stays=1,
        sinks=g.sink,
        table=table,
    )
