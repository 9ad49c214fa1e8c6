"""`StreamSpan`: neighbouring streams of a state, as one decode step reads and writes them.

A step need not compute what nobody asks for: of many streams it takes the smallest block that holds all active ones,
whose number of streams is a power of two, so that a backend which captures CUDA graphs has few of them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from sinkstream.kernels.begin_step import read_plan
from sinkstream.kernels.layout import TOKEN
from sinkstream.kernels.sample import Draws
from sinkstream.policies import SIGNALS


class Block(NamedTuple):
    """The streams of a step: the first, and how many; whether recalled tokens stand in their frame."""

    first: int
    streams: int
    framed: bool = False


def block_of(active: Sequence[int], streams: int) -> Block:
    """The smallest block of streams that holds all active ones: 2^k streams from a multiple of 2^k on, or all."""
    low, high, size = min(active), max(active), 1
    while low // size != high // size:
        size *= 2
    first = low // size * size
    return Block(first, size) if first + size <= streams else Block(0, streams)


class StreamSpan:
    """Views of the buffers of `count` streams from `first` on; their addresses never change.

    Parameters
    ----------
    state : StreamState
    first, count : int
    framed : bool
        Whether the slots of recalled tokens are among those that are read.

    Attributes
    ----------
    streams : int
        `count`. All other attributes are those of `StreamBuffers`, of these streams only.
    """

    def __init__(self, state, first: int, count: int, framed: bool = False):
        which = slice(first, first + count)
        self.first, self.streams, self._state = first, count, state
        self.spec, self.policy, self.device = state.spec, state.policy, state.device
        self.geometry = state.geometry if framed else state.geometry.bare
        self.signals, self.structure = state.signals, state.structure
        slots = slice(state.geometry.slots - self.geometry.slots, None)
        self.keys, self.values = state.keys[:, which, :, slots], state.values[:, which, :, slots]
        self.queries = None if state.queries is None else state.queries[:, which]
        self.scores = None if state.scores is None else state.scores[:, which]
        self.score_sums = None if state.score_sums is None else state.score_sums[:, which]
        self.channels = {name: channel[:, which] for name, channel in state.channels.items()}
        self.plan, self.risks = state.plan[:, which], state.risks[:, which]
        self.logits, self.tokens = state.logits[which], state.tokens[which]
        self.cursor, self.scalars = state.cursor[which], state.scalars[which]

    @property
    def draws(self) -> Draws | None:
        """How these streams draw now; None while every stream of the state takes the likeliest token."""
        draws = self._state.sampling.draws
        return None if draws is None else draws.span(self.first, self.streams)

    def begin_row(self) -> None:
        """First thing in a step, on the device: its tokens and scalars (the op `begin_step` does the same)."""
        read_plan(self.tokens, self.logits, self.plan, self.cursor, self.scalars, self.draws)

    def end_row(self) -> None:
        """Last thing in a step, on the device: note what adaptive triggers read in the logits."""
        if self._state.decisions is not None:
            self._state.decisions.note()
        elif self.signals:
            log_probs = self.logits.log_softmax(-1)
            risks = torch.stack([SIGNALS[signal](log_probs) for signal in self.signals], -1)
            self.risks.index_copy_(0, self.cursor[:1], risks[None])

    def touched(self, stream: int) -> list[torch.Tensor]:
        """Views of what a step changes in a stream, by its index here, that has an idle row."""
        parts = [self.keys[:, stream, :, 0], self.values[:, stream, :, 0], self.logits[stream]]
        parts += [c[:, stream, :, 0] for c in self.channels.values()]
        return parts if self.queries is None else [*parts, self.queries[:, stream, :, 0]]

    def appended(self, first: int, end: int) -> torch.Tensor:
        """Token ids of rows `first` to `end` - 1 of the plan, ``(rows, streams)`` int64; a copy on the device."""
        return self.plan[first:end, :, TOKEN].long()
