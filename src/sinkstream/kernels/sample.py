"""Drawing the next token of every stream on the device, without sorting the vocabulary.

A draw is a race that the kernel of `likeliest` would run: each tile of the vocabulary finds its winner, and
`begin_step` finds the winner of the tiles. Streams with top-k, top-p or min-p need a threshold first. Its key, a whole
number of 30 bits, is found 5 bits a launch: each program adds up what its tile holds above 31 pivots, in whole numbers,
so that the order of additions changes nothing.
"""

from copy import copy
from dataclasses import dataclass

import torch

from sinkstream.kernels.layout import DRAWN, FIELDS, TOKEN
from sinkstream.kernels.likeliest import Tiles, streams_kernel
from sinkstream.kernels.runtime import (
    check_tensor,
    has_dependent_launch,
    launch,
    triton,
    use_triton,
)
from sinkstream.kernels.sample_kernels import prepare_kernel, race_kernel, search_kernel
from sinkstream.kernels.sample_table import NUMBERS, SETTINGS, SampleTable
from sinkstream.kernels.sample_twin import sample_twin

TILE = 512  # logits of one program
DIGIT = 5  # bits of a threshold that one launch finds
LAUNCHES = 6  # of one threshold


@dataclass(frozen=True)
class SampleKernels:
    """Which kernels the streams of an engine need for their draws; a captured step holds these.

    Attributes
    ----------
    thresholds : int
        How many of top-k and top-p the stream with most of them has: 0 to 2.
    tops : bool
        Whether a stream has top-k, top-p or min-p.
    tables : bool
        Whether a stream has penalties or biases.
    """

    thresholds: int = 0
    tops: bool = False
    tables: bool = False

    def __or__(self, other: "SampleKernels") -> "SampleKernels":
        return SampleKernels(
            max(self.thresholds, other.thresholds), self.tops or other.tops, self.tables or other.tables
        )


class SampleBuffers:
    """Room for the draws of all streams.

    Parameters
    ----------
    streams, vocab : int
        Axes of the logits.
    device : torch.device

    Attributes
    ----------
    tiles : Tiles
        The winner of each tile; `begin_step` finds the winner of the tiles.
    """

    def __init__(self, streams: int, vocab: int, device: torch.device):
        self.vocab, self.tiles = vocab, Tiles(streams, vocab, device, TILE)
        self.tops = torch.zeros(streams, self.tiles.count, dtype=torch.float32, device=device)
        self.sums = torch.zeros(streams, 2 * LAUNCHES, 1 << DIGIT, dtype=torch.int64, device=device)
        self.states = torch.zeros(streams, 2 * LAUNCHES, 4, dtype=torch.int64, device=device)
        self.processed: torch.Tensor | None = None
        self.below: torch.Tensor | None = None
        self.weights: torch.Tensor | None = None

    def span(self, first: int, count: int) -> "SampleBuffers":
        """Room for the draws of `count` streams from `first` on: views of this room, which is allocated before."""
        which, part = slice(first, first + count), copy(self)
        part.tiles = self.tiles.span(first, count)
        for name, buffer in vars(self).items():
            if isinstance(buffer, torch.Tensor):
                setattr(part, name, buffer[which])
        return part

    def allocate(self, kernels: SampleKernels) -> None:
        """Room that only some draws need, once: processed logits, keys and weights of all tokens."""
        shape, device = (len(self.tops), self.vocab), self.tops.device
        if kernels.tables and self.processed is None:
            self.processed = torch.zeros(shape, dtype=torch.float32, device=device)
        if kernels.thresholds and self.below is None:
            self.below = torch.zeros(shape, dtype=torch.int32, device=device)
            self.weights = torch.zeros(shape, dtype=torch.int64, device=device)

    def find(
        self,
        logits: torch.Tensor,
        tokens: torch.Tensor,
        plan: torch.Tensor,
        cursor: torch.Tensor,
        table: SampleTable,
        kernels: SampleKernels,
    ) -> bool:
        """Launch the draws of streams that are told `DRAWN`, and the search for those that are told `LIKELIEST`.

        Parameters
        ----------
        logits, tokens, plan, cursor
            As for `begin_step`.
        table : SampleTable
        kernels : SampleKernels
            What the rows of the table need.

        Returns
        -------
        bool
            As `Tiles.find`.
        """
        streams, vocab = logits.shape
        self.allocate(kernels)
        numbers, settings = table.numbers, table.settings
        processed = logits if self.processed is None else self.processed
        counts, bias = (logits if t is None else t for t in (table.counts, table.bias))
        early, grid = has_dependent_launch(logits.device), (self.tiles.count, streams)
        rounds = LAUNCHES * kernels.thresholds
        common = {"TILE": TILE, "DRAWN": DRAWN, "NUMBERS": NUMBERS, "SETTINGS": SETTINGS, "enable_fp_fusion": False}
        search = {
            "ROUNDS": rounds, "PIVOTS": 1 << DIGIT, "LAUNCHES": LAUNCHES, "DIGIT": DIGIT,
            "SIZE": triton.next_power_of_2(self.tiles.count),
        }  # fmt: skip
        if kernels.tops:
            launch(
                prepare_kernel, grid, tokens, logits, numbers, settings, counts, bias, processed, self.tops, self.sums,
                vocab, logits.stride(0), TABLES=kernels.tables, SUMS=rounds << DIGIT, EARLY=early, num_warps=4,
                pdl=False, **common,
            )  # fmt: skip
        source = processed if kernels.tables else logits
        for launched in range(rounds):
            launch(
                search_kernel, grid, tokens, source, numbers, settings, self.tops, self.below, self.weights, self.sums,
                self.states, launched, vocab, source.stride(0), START=launched == 0, num_warps=8, pdl=early, **common,
                **search,
            )  # fmt: skip
        launch(
            race_kernel, grid, tokens, logits, processed, numbers, settings, counts, bias, self.tops, self.sums,
            self.states, plan, cursor, self.tiles.values, self.tiles.indices, len(plan), plan.stride(0), vocab,
            logits.stride(0),
            THRESHOLDS=kernels.tops, TABLES=kernels.tables, FIELDS=FIELDS, TOKEN=TOKEN, EARLY=early, num_warps=4,
            pdl=early and kernels.tops, **common, **search,
        )  # fmt: skip
        return early


@dataclass
class Draws:
    """How the streams of an engine draw: options, what they need, and room for it."""

    table: SampleTable
    kernels: SampleKernels
    buffers: SampleBuffers

    def span(self, first: int, count: int) -> "Draws":
        """The draws of `count` streams from `first` on, in the same memory."""
        if use_triton(None, self.table.numbers):
            self.buffers.allocate(self.kernels)
        return Draws(self.table.span(first, count), self.kernels, self.buffers.span(first, count))

    def find(self, logits: torch.Tensor, tokens: torch.Tensor, plan: torch.Tensor, cursor: torch.Tensor) -> bool:
        """As `SampleBuffers.find`."""
        return self.buffers.find(logits, tokens, plan, cursor, self.table, self.kernels)

    def draw(self, logits: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """As `sample`."""
        return sample(logits, positions, self.table, self.kernels, buffers=self.buffers)


def sample(
    logits: torch.Tensor,
    positions: torch.Tensor,
    table: SampleTable,
    kernels: SampleKernels,
    *,
    buffers: SampleBuffers | None = None,
    implementation: str | None = None,
) -> torch.Tensor:
    """Draw the next token of every stream, as its row of the table says.

    Parameters
    ----------
    logits : Tensor, (streams, vocab), float32
    positions : Tensor, (streams,), int64
        How many tokens each stream holds: the count of its random numbers.
    table : SampleTable
        Read only.
    kernels : SampleKernels
        What the rows of the table need.
    buffers : SampleBuffers, optional
        Default: new ones.
    implementation : {"auto", "triton", "torch"}, optional

    Returns
    -------
    Tensor, (streams,), int64
        -1 where a logit is NaN or infinite, or all of them are minus infinity.

    Raises
    ------
    ValueError
        Naming the argument that the op cannot serve and what is accepted.
    """
    streams, device = len(logits), logits.device
    check_tensor("logits", logits, (None, None), dtypes=(torch.float32,), device=device, contiguous=False)
    check_tensor("positions", positions, (streams,), dtypes=(torch.int64,), device=device)
    check_tensor("numbers", table.numbers, (streams, NUMBERS), dtypes=(torch.float64,), device=device)
    check_tensor("settings", table.settings, (streams, SETTINGS), dtypes=(torch.int64,), device=device)
    if not use_triton(implementation, logits):
        return sample_twin(logits, positions, table)
    buffers = SampleBuffers(streams, logits.shape[1], device) if buffers is None else buffers
    plan = torch.zeros(1, streams, FIELDS, dtype=torch.int32, device=device)
    plan[0, :, TOKEN] = -1 - positions
    none = torch.full((streams,), -1, device=device)
    early = buffers.find(logits, torch.full_like(none, DRAWN), plan, none, table, kernels)
    tiles, out = buffers.tiles, torch.empty_like(none)
    launch(
        streams_kernel, (streams,), tiles.values, tiles.indices, out, tiles.count, logits.shape[1], REFUSE=True,
        SIZE=triton.next_power_of_2(tiles.count), num_warps=1, pdl=early,
    )  # fmt: skip
    return out
