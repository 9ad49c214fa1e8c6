"""`StreamCounts`: how far each stream is, by the host's account; where the device decides about prunes, it may lag."""

from collections.abc import Sequence
from typing import Any

from sinkstream.engine.buffers import StreamBuffers
from sinkstream.engine.decisions import AdaptiveRule, Decisions
from sinkstream.engine.geometry import Counters
from sinkstream.policies import EvictionPolicy, PruneSchedule, Step


class StreamCounts(StreamBuffers):
    """The buffers of several independent streams, and what has happened to each.

    Parameters
    ----------
    spec, policy, more
        As for `StreamBuffers`.

    Attributes
    ----------
    counters_so_far, schedules_so_far : list of Counters, list of PruneSchedule
        As `counters` and `schedules`, but without what the device has decided and the host has not read yet.
    decisions : Decisions or None
        Where the device decides about prunes; None where the host does.
    journal : list of Step or None
        What the policy did in the first stream, since `take_journal` was called last; None if it never was.
    """

    counters_so_far: list[Counters]
    schedules_so_far: list[PruneSchedule]
    _active: tuple[int, ...]
    _row: int

    def __init__(self, spec: Any, policy: EvictionPolicy, **more: Any):
        super().__init__(spec, policy, **more)
        rule = AdaptiveRule.of(policy)
        self.decisions = None if rule is None else Decisions(self, rule)
        self._last_steps: list[Step | None] = []
        self.journal: list[Step] | None = None

    @property
    def counters(self) -> list[Counters]:
        """How far each stream is; waits for the device if prunes are decided there."""
        self._catch_up()
        return self.counters_so_far

    @property
    def schedules(self) -> list[PruneSchedule]:
        """When each stream is pruned; waits for the device if prunes are decided there."""
        self._catch_up()
        return self.schedules_so_far

    @property
    def last_steps(self) -> list[Step | None]:
        """What the policy did in each stream at the latest step; waits as `counters`."""
        self._catch_up()
        return self._last_steps

    def count(self, active: Sequence[int]) -> None:
        """Account for one step of these streams."""
        self._last_steps = [None] * self.streams
        for s in active:
            done = self._last_steps[s] = self.schedules_so_far[s].step()
            self.counters_so_far[s].append(done.drop)
            self.counters_so_far[s].events += done.event
        if self.journal is not None and (first := self._last_steps[0]) is not None:
            self.journal.append(first)

    def take_journal(self) -> list[Step]:
        """What the policy did in the first stream at every step since the latest call; the first begins to keep it."""
        self._catch_up()
        steps, self.journal = self.journal or [], []
        return steps

    def _catch_up(self, check: bool = True) -> None:
        if self.decisions is not None:
            self.decisions.catch_up(self._active, self._row, check)

    def counts(self, stream: int) -> dict[str, int]:
        """Of one stream: seen, kept, evicted tokens, prune events, rebases."""
        c = self.counters[stream]
        evicted = c.seen - c.kept + c.recalled
        return {"seen": c.seen, "kept": c.kept, "evicted": evicted, "events": c.events, "rebases": c.rebases}

    def stats(self, stream: int) -> dict[str, int]:
        """As `counts`, and the bytes of all streams."""
        return self.counts(stream) | {"bytes": self.bytes}
