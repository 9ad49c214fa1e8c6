"""`FrameSlots`: the slots of an engine's stream that recalled tokens stand in, and what is on its way there."""

import torch

from sinkstream.archive import Fetched
from sinkstream.cache.pinned import SLOT_AXIS, write_rotated
from sinkstream.engine.leaving import Leaving
from sinkstream.engine.state import StreamState


class FrameSlots:
    """Keys and values of recalled tokens are written as late as may be: a thread fetches them meanwhile.

    Parameters
    ----------
    state : StreamState
        Of one stream.
    leaving : Leaving
        Has the table of rotations.

    Attributes
    ----------
    shift : int
        How far in front of their place behind the sinks the recalled tokens stand.
    """

    def __init__(self, state: StreamState, leaving: Leaving):
        self.state, self._leaving = state, leaving
        self._coming: Fetched | None = None
        self.shift = 0

    def put(self, fetched: Fetched, count: int, shift: int) -> None:
        """Let so many tokens stand behind the sinks from the next plan on; `write` comes before its first step.

        Parameters
        ----------
        fetched : callable
            Waits for their keys and values, as `Archive.read` gives them.
        """
        state, counters = self.state, self.state.counters[0]
        g, sink = state.geometry, counters.sink
        if count and not counters.recalled:
            for part in (state.keys, state.values):
                part[..., :sink, :] = part[..., g.framed : g.framed + sink, :]
        counters.geometry = g if count else g.bare
        counters.recalled, self.shift = count, shift
        self._coming = fetched if count else None

    def write(self) -> None:
        """Write the keys, rotated, and the values, if they have not been written."""
        if self._coming is None:
            return
        state, sink = self.state, self.state.counters[0].sink
        with torch.no_grad():
            keys, values = self._coming()
            count = keys.shape[SLOT_AXIS]
            slots, phases = slice(sink, sink + count), self._leaving.turned_back(sink + self.shift, count).conj()
            write_rotated(state.spec.rope, state.keys[..., slots, :], keys, phases)
            state.values[..., slots, :] = values
        self._coming = None

    def forget(self) -> None:
        """What is on its way belongs to a stream that is gone."""
        self._coming = None
