"""Forwards under foreseen prunes at addresses that never change, so that CUDA graphs hold them.

One graph computes a padded chunk and reads its risks, and writes nothing to a stream; another one writes the tokens of
it that were foreseen rightly to their slots. Launching their kernels one by one takes longer than the kernels do.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from sinkstream.engine.prompt import Chunk, Coming, PromptForward
from sinkstream.engine.reading import TokensRead
from sinkstream.engine.short_chunks import WARMUPS, computed_by_kernels, idle_band
from sinkstream.kernels.band import SCALARS, Band

SIZES = (64, 256)  # padded sizes, below the most tokens of a forward


@dataclass
class Computed:
    """What a forward under foreseen prunes has computed, beside the streams.

    Attributes
    ----------
    x : Tensor, (tokens, hidden)
        Outputs of the last layer, with padding.
    read : TokensRead
    risks : Tensor, (signals, tokens), float32
    """

    x: torch.Tensor
    read: TokensRead
    risks: torch.Tensor
    held: list[tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]]


class ForeseenChunk:
    """The forward of a chunk of at most so many tokens, and the way of those that are kept to their slots.

    Parameters
    ----------
    forward : PromptForward
    size : int or None
        Tokens that a chunk is padded to; None: no padding, and new tensors for every chunk.
    """

    def __init__(self, forward: PromptForward, size: int | None):
        self.forward, self.size, device = forward, size, forward.state.device
        self._ids: torch.Tensor | None = None
        self.bands: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
        self._computed: Computed | None = None
        self._graphs: list[torch.cuda.CUDAGraph] = []
        if size is not None:
            with torch.inference_mode(False):
                self._ids = torch.zeros(size, dtype=torch.int64, device=device)
                first, second = torch.zeros(2, SCALARS + 2 * size, dtype=torch.int32, device=device)
            self.bands = first, second

    def compute(self, ids: torch.Tensor, coming: Coming) -> Computed:
        """Compute token ids ``(tokens,)``, whose band lies in the first table, and write nothing to the stream."""
        if self._ids is None:
            self._computed = self._compute(ids, coming.band)
            return self._computed
        self._ids[: len(ids)].copy_(ids)
        self._run(0, lambda: self._compute_padded(coming.band))
        assert self._computed is not None, "the forward has run"
        return self._computed

    def store(self, coming: Coming) -> None:
        """Write the first tokens of what was computed, as a band in the second table says, to their slots."""
        if self._ids is None:
            self._store(coming.band, len(coming.steps))
        else:
            self._run(1, lambda: self._store(coming.band, None))

    def capture(self) -> None:
        """Capture both in CUDA graphs, on one token that stays nowhere."""
        state, (first, second) = self.forward.state, self.bands
        assert self.size is not None and first is not None and second is not None, "captured at fixed addresses"
        band, name = idle_band(state, first), f"the forward of {self.size} tokens under foreseen prunes"
        graphs = [state.captures(lambda: self._compute_padded(band), name=name, warmups=WARMUPS)]
        band = idle_band(state, second)
        graphs.append(state.captures(lambda: self._store(band, None), name=f"storing after {name}", warmups=1))
        self._graphs = graphs

    def _run(self, which: int, work: Callable[[], None]) -> None:
        if self._graphs:
            self._graphs[which].replay()
        else:
            work()

    def _compute_padded(self, band: Band) -> None:
        assert self._ids is not None, "padded"
        self._computed = None  # it holds keys and values of every layer: those of two chunks are never there at once
        band.rotate()
        self._computed = self._compute(self._ids, band)

    def _compute(self, ids: torch.Tensor, band: Band) -> Computed:
        forward = self.forward
        chunk = Chunk(forward.span, band, forward.weights.rope_factor, holds=True)
        x = forward.layers(ids, chunk)
        read = forward.reader.read(ids, x, band)
        return Computed(x, read, torch.stack([*read.risks.values()]), chunk.held)

    def _store(self, band: Band, kept: int | None) -> None:
        forward = self.forward
        assert self._computed is not None, "what is stored was computed before"
        chunk = Chunk(forward.span, band, forward.weights.rope_factor)
        for layer, (query, key, value) in enumerate(self._computed.held):
            chunk.store(layer, None if query is None else query[:kept], key[:kept], value[:kept])


class ForeseenChunks:
    """`ForeseenChunk` of a few sizes.

    Parameters
    ----------
    forward : PromptForward
    most_tokens : int
        Of one forward.
    capture : bool
        Whether they are captured, each at the first chunk of its size, where kernels compute them and no scorer reads
        anything of their tokens.
    """

    def __init__(self, forward: PromptForward, most_tokens: int, *, capture: bool):
        self.forward, self.capture = forward, capture
        self.sizes = (*(size for size in SIZES if size < most_tokens), most_tokens)
        self._of_size: dict[int, ForeseenChunk] = {}

    def of(self, tokens: int) -> ForeseenChunk:
        """For a chunk of so many tokens."""
        if not self.captures():
            return ForeseenChunk(self.forward, None)
        size = next(size for size in self.sizes if size >= tokens)
        self.ready(size)
        return self._of_size[size]

    def due(self) -> list[int]:
        """Sizes that are not captured yet; the largest first, whose memory fits all."""
        return [size for size in reversed(self.sizes) if size not in self._of_size] if self.captures() else []

    def ready(self, size: int) -> None:
        """Capture the forward of a size, unless it is captured."""
        if size not in self._of_size:
            chunk = ForeseenChunk(self.forward, size)
            chunk.capture()
            self._of_size[size] = chunk

    def captures(self) -> bool:
        """Whether forwards are captured here."""
        return self.capture and self.forward.state.policy.scorer is None and computed_by_kernels(self.forward.state)
