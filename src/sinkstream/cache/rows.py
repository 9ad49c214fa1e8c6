"""`Rows`: the rows of one batch where they differ: in length, in their pads, or in what the policy observes of each.

Every row is a `Stream` of its own, with its own schedule, positions and pinned tokens. All keys and values lie in one
buffer, whose tail the rows share: a forward appends the same columns to all of them. A row that got fewer tokens starts
later, and a mask hides the columns before it. Pads are never counted: no query of a token sees one.

The cost: a prune takes its kernels once for every row, a chunk that crosses prunes gets copies of the pinned keys for
each of them, and every forward has a mask. Rows of equal length under a policy that observes nothing pay none of it.
"""

import copy
from collections.abc import Sequence

import torch

from sinkstream.cache.observe import AttentionObserver
from sinkstream.cache.recall import one_row
from sinkstream.cache.ring import SoftRing
from sinkstream.cache.stream import Stream, longest_forward
from sinkstream.policies import Step

CHUNK = 256  # tokens of one forward of a prompt, at the most: copies of pinned keys and a mask grow with its prunes


class Rows(Stream):
    """The rows of a batch, each a stream of its own, in one buffer.

    Parameters
    ----------
    source : Stream
        Whose rows these are, with buffers; not used any more afterwards.

    Attributes
    ----------
    rows : list of Stream
        Of batch 1; their rings are views of the buffers.
    keys, values : Tensor, (layers, batch, kv_heads, capacity, head_dim)
    tail : int
        First column that the next forward writes.
    last_steps : sequence of Step
        Of the row that got the most tokens.
    """

    rows: list[Stream]

    def __init__(self, source: Stream):
        source.own()
        super().__init__(**source.settings)
        ring = source.ring
        assert ring is not None, "the buffers are there"
        self.tail = ring.tail
        self._hold(ring.keys, ring.values, [(source, row) for row in range(ring.keys.shape[1])])

    def _hold(self, keys: torch.Tensor, values: torch.Tensor, origins: list[tuple[Stream, int]]) -> None:
        self.keys, self.values = keys, values
        with torch.inference_mode(False):
            self.rows = [
                row_stream(source, row, (keys[:, i : i + 1], values[:, i : i + 1]))
                for i, (source, row) in enumerate(origins)
            ]

    def start_over(self) -> Stream:
        """Forget everything; returns the stream to go on with, whose rows are equal again."""
        return Stream(**self.settings)

    @property
    def device(self) -> torch.device | None:
        return self.keys.device

    @property
    def batch(self) -> int:
        return len(self.rows) if self.seen else 0

    @property
    def row_seen(self) -> list[int]:
        return [row.seen for row in self.rows]

    @property
    def seen(self) -> int:
        return max(self.row_seen, default=0) if hasattr(self, "rows") else 0

    @property
    def kept(self) -> int:
        return max(row.kept for row in self.rows)

    def row_ids(self, row: int):
        return self.rows[row].row_ids(0)

    def stats(self) -> dict[str, int]:
        """Counts, each the largest of any row; bytes of all rows."""
        each = self.row_stats()
        held = sum(t.numel() * t.element_size() for t in (self.keys, self.values))
        return {n: max(row[n] for row in each) for n in each[0]} | {"bytes": held + sum(r["bytes"] for r in each)}

    def row_stats(self) -> list[dict[str, int]]:
        """Counts of every row; bytes are those beside the common buffers."""
        shared = sum(t.numel() * t.element_size() for t in (self.keys, self.values)) // len(self.rows)
        return [row.stats() | {"bytes": row.stats()["bytes"] - shared} for row in self.rows]

    def max_chunk_tokens(self) -> int:
        """The most columns that the next forward may append, whichever rows they are pads of."""
        return min(self.capacity() - self.kept, *(longest_forward(row, chooses=False) for row in self.rows))

    def make_room(self, tokens: int) -> None:
        """Ensure that `tokens` columns fit behind the tail and that nothing which counts lies there."""
        if self.tail + tokens > self.keys.shape[3]:
            self.tail = self.kept
            for row in self.rows:
                self._end_at(row, self.tail)
                delta = ring_of(row).rebase_if_far()
                if row.observer and delta is not None:
                    row.observer.rebase(delta)
        for row in self.rows:  # a failed forward may have moved a row that gets no tokens now
            if ring_of(row).tail > self.tail:
                self._end_at(row, self.tail)

    def place(self, row: Stream, pads: int) -> None:
        """Move what a row holds to where its new tokens follow, `pads` columns behind the tail."""
        self._end_at(row, self.tail + pads)

    def _end_at(self, row: Stream, end: int) -> None:
        ring = ring_of(row)
        ring.move(end - ring.live)

    def appended(self, tokens: int, steps: Sequence[Step]) -> None:
        """Count the columns of a forward, and keep the steps of its longest row."""
        self.tail += tokens
        self.last_steps = steps

    def begin_turn(self, ahead: int = 0) -> None:
        """As `Stream.begin_turn`, for every row: `ahead` counts the row's own tokens."""
        for row in self.rows:
            row.begin_turn(ahead)

    def fork(self, *, share: bool = True) -> "Rows":
        """As `Stream.fork`; rows are copied at once."""
        other = copy.copy(self)
        with torch.inference_mode(False):
            keys, values = self.keys.clone(), self.values.clone()
        other._hold(keys, values, [(row, 0) for row in self.rows])
        return other

    def select(self, indices: torch.Tensor) -> Stream:
        """As `selected`; one row alone becomes a stream without masks."""
        with torch.inference_mode(False):
            index = indices.to(self.keys.device)
            keys, values = (buffer.index_select(1, index) for buffer in (self.keys, self.values))
            chosen = [(self.rows[i], 0) for i in index.tolist()]
            if len(chosen) == 1:
                return row_stream(*chosen[0], (keys, values))
        self._hold(keys, values, chosen)
        return self


def ring_of(row: Stream) -> SoftRing:
    """The ring of a row, which has one from the start."""
    assert row.ring is not None, "a row has a ring"
    return row.ring


def row_stream(source: Stream, row: int, storage: tuple[torch.Tensor, torch.Tensor]) -> Stream:
    """A stream of batch 1 that goes on like one row of another.

    Parameters
    ----------
    storage : pair of Tensor, (layers, 1, kv_heads, capacity, head_dim)
        Keys and values, which hold the entries of the row already.
    """
    old, observer = ring_of(source), source.observer
    index, one = torch.tensor([row], device=old.keys.device), slice(row, row + 1)
    new = Stream(**source.settings)
    ring = new.ring = SoftRing(
        tuple(storage[0].shape),
        storage[0].dtype,
        storage[0].device,
        rope=old.rope,
        sink=old.sink,
        original_positions=old.original_positions,
        rebase_at=old.rebase_at,
        channels=[],
        storage=storage,
        ahead=old.ahead.prunes,
    )
    ring.take_pinned(old, index)
    ring.channels = {name: channel[:, one].clone() for name, channel in old.channels.items()}
    if observer is not None:
        new.observer = AttentionObserver(ring, observer.keep, observer.accumulate)
        new.observer.scaling = observer.scaling
        new.observer.queries = {layer: queries[one] for layer, queries in observer.queries.items()}
    new.schedule, new.events = source.schedule.fork(), source.events
    new.seen_ids = None if source.seen_ids is None else source.seen_ids.take(index)
    new.log_probs = None if source.log_probs is None else source.log_probs[one]
    new.last_steps = source.last_steps
    return new


def selected(stream: Stream, indices: torch.Tensor) -> Stream:
    """The stream with these rows, ``(any,)`` int64, in this order and as often as they are named, to go on with."""
    if isinstance(stream, Rows):
        return stream.select(indices)
    if stream.recall is not None and len(indices) != 1:
        raise one_row(len(indices))
    ring = ring_of(stream)
    with torch.inference_mode(False):
        rows = indices.to(ring.keys.device)
        stream.own()  # nobody else reads the buffers any more
        ring.select(rows)
        if stream.sliding is not None:
            stream.sliding.select(rows)
        if stream.seen_ids is not None:
            stream.seen_ids = stream.seen_ids.take(rows)
        if stream.observer is not None:
            stream.observer.queries = {i: q[rows] for i, q in stream.observer.queries.items()}
        if stream.log_probs is not None:
            stream.log_probs = stream.log_probs[rows]
    return stream
