"""Where a token lives in the static ring, and how far a stream is: host integers only.

Token p < sink lives in pinned slot p. Any later token lives in slot ``pinned_slots + (p - sink) % ring``. Slots from
``sink`` to ``pinned_slots - 1`` belong to refreshed tokens and are empty until the first prune with refresh. A stream
with fewer sinks than there are slots for leaves the others empty.

With recall the slots in front of these are a second frame: copies of the sinks, then recalled tokens. While nothing is
recalled a step reads the slots behind it, as it would without recall; else all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from sinkstream.cache.pinned import window_base
from sinkstream.kernels.layout import (
    FIELDS,
    FIRST,
    FRAME_POSITION,
    IDLE,
    LENGTH,
    PINNED,
    QUERY,
    SLOT,
    TOKEN,
    WINDOW_POSITION,
)
from sinkstream.policies import EvictionPolicy


@dataclass(frozen=True)
class Geometry:
    """Slots of one stream.

    Attributes
    ----------
    sink, refresh : int
        Pinned slots of either kind; a stream may have fewer sinks (`Counters.sink`).
    ring : int
        Slots of the ring: what the largest window needs.
    original : bool
        Whether positions are indices in the stream instead of places in the cache.
    framed : int
        Slots of the frame of recalled tokens, its copies of the sinks included; 0 without recall.
    reserved : int
        Those of `sink` that the policy itself does not use: a stream with more sinks sees as much less of the ring.
    """

    sink: int
    refresh: int
    ring: int
    original: bool
    framed: int = 0
    reserved: int = 0

    @classmethod
    def of(
        cls, policy: EvictionPolicy, positions: str, max_sink: int | None = None, recall_slots: int = 0
    ) -> "Geometry":
        """The slots that a policy needs, for streams of `policy.sink` to `max_sink` sinks (None: no more).

        Parameters
        ----------
        recall_slots : int
            The most tokens that are recalled at once; 0: no recall.
        """
        sink = policy.sink if max_sink is None else max_sink
        framed = sink + recall_slots if recall_slots else 0
        ring, original = max(1, policy.peak - policy.sink), positions == "original"
        return cls(sink, policy.refresh, ring, original, framed, sink - policy.sink)

    @property
    def bare(self) -> "Geometry":
        """The slots that are read while nothing is recalled: the last ones."""
        return replace(self, framed=0)

    @property
    def pinned_slots(self) -> int:
        """Slots in front of the ring."""
        return self.framed + self.sink + self.refresh

    @property
    def most_visible(self) -> int:
        """The most slots that a query sees."""
        return self.slots - self.reserved

    @property
    def slots(self) -> int:
        """All slots of one stream."""
        return self.pinned_slots + self.ring

    def idle_row(self) -> list[int]:
        """Scalars of a stream that sits a step out: everything it touches is slot 0."""
        row = [0] * FIELDS
        row[TOKEN] = IDLE
        row[PINNED], row[LENGTH] = (1, 0) if self.pinned_slots else (0, 1)
        return row

    def idle_rows(self, steps: int, streams: int) -> np.ndarray:
        """Scalars of streams that sit steps out, (steps, streams, 8) int32."""
        return np.full((steps, streams, FIELDS), self.idle_row(), dtype=np.int32)


@dataclass
class Counters:
    """How far one stream is.

    Attributes
    ----------
    seen : int
        Tokens appended since the beginning.
    first_window : int
        Index of the oldest window token; the window is everything from there on.
    pruned : bool
        Whether a prune has happened: from then on all pinned slots are in use.
    base : int
        Token index that window position 0 stands for.
    events, rebases : int
        Counts.
    refreshed_at : int
        Token index before which pinned tokens were last chosen, so that no prune chooses twice; -1: never.
    sink : int
        Sinks of this stream; -1: as many as there are slots for.
    recalled : int
        Tokens that stand behind the sinks and have come back.
    """

    geometry: Geometry
    seen: int = 0
    first_window: int = 0
    pruned: bool = False
    base: int = 0
    events: int = 0
    rebases: int = 0
    refreshed_at: int = -1
    sink: int = -1
    recalled: int = 0

    def __post_init__(self):
        if self.sink < 0:
            self.sink = self.geometry.sink
        self.first_window = max(self.first_window, self.sink)

    @property
    def pinned(self) -> int:
        """Pinned entries cached now."""
        refreshed = self.geometry.refresh if self.pruned else 0
        return min(self.seen, self.sink) + refreshed + self.recalled

    @property
    def window(self) -> int:
        """Window entries cached now."""
        return max(0, self.seen - self.first_window)

    @property
    def kept(self) -> int:
        """All entries cached now."""
        return self.pinned + self.window

    def slot(self, token: int) -> int:
        """Slot of a token, by its index in the stream."""
        return token if token < self.sink else self.geometry.pinned_slots + self.ring_index(token)

    def ring_index(self, token: int) -> int:
        """Where in the ring a window token lies, by its index in the stream."""
        return (token - self.sink) % self.geometry.ring

    def leaving(self, drop: int) -> int:
        """How many tokens leave the window if the cache shrinks by `drop`: the first prune also fills the refresh."""
        return drop + (0 if self.pruned else self.geometry.refresh)

    def append(self, drop: int) -> None:
        """Account for one token and the drop before it."""
        if drop:
            self.first_window += self.leaving(drop)
            self.pruned = True
        self.seen += 1

    def rebased(self) -> int:
        """The base that puts the oldest window token where it stands in the cache now."""
        return window_base(self.first_window, self.pinned, self.geometry.original)

    def row(self, queries: int) -> list[int]:
        """Scalars of the token appended last; `queries` is how many of the latest queries are kept."""
        g, t = self.geometry, self.seen - 1
        row = [0] * FIELDS
        row[SLOT], row[WINDOW_POSITION] = self.slot(t), t - self.base
        row[FRAME_POSITION] = t - self.base if g.original else self.kept - 1
        row[PINNED], row[FIRST], row[LENGTH] = self.pinned, self.ring_index(self.first_window), self.window
        row[TOKEN], row[QUERY] = -1 - t, t % max(1, queries) if t else -1
        return row


def rows_ahead(streams: Sequence[Counters], drops: np.ndarray, queries: int) -> np.ndarray:
    """Account for the next tokens of streams of one geometry; gives the rows of all, (tokens, streams, 8) int32.

    Parameters
    ----------
    streams : sequence of Counters
    drops : array, (tokens, streams), int64
        Before each token.
    queries : int
        As for `Counters.row`.
    """
    g, tokens = streams[0].geometry, len(drops)
    seen, base, first, sink, pruned_before, recalled = np.array(
        [(c.seen, c.base, c.first_window, c.sink, c.pruned, c.recalled) for c in streams]
    ).T
    t = seen + np.arange(tokens)[:, None]
    dropped = drops.cumsum(0)
    pruned = (dropped > 0) | (pruned_before > 0)
    first_window = first + dropped + g.refresh * (pruned & (pruned_before == 0))
    pinned = np.minimum(t + 1, sink) + g.refresh * pruned + recalled
    window = np.maximum(0, t + 1 - first_window)
    rows = np.zeros((*t.shape, FIELDS), dtype=np.int32)
    rows[..., SLOT] = np.where(t < sink, t, g.pinned_slots + (t - sink) % g.ring)
    rows[..., WINDOW_POSITION] = t - base
    rows[..., FRAME_POSITION] = t - base if g.original else pinned + window - 1
    rows[..., PINNED], rows[..., FIRST], rows[..., LENGTH] = pinned, (first_window - sink) % g.ring, window
    rows[..., TOKEN], rows[..., QUERY] = -1 - t, np.where(t > 0, t % max(1, queries), -1)
    if tokens:
        for c, first_now, pruned_now in zip(streams, first_window[-1].tolist(), pruned[-1].tolist()):
            c.seen, c.first_window, c.pruned = c.seen + tokens, first_now, pruned_now
    return rows
