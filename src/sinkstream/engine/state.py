"""`StreamState`: everything that streams keep between two steps, in buffers whose addresses never change.

The host counts (`Counters`, `PruneSchedule`) and writes the scalars of many coming steps into a small plan table on the
device; each step moves the cursor and reads its own row, so that a CUDA graph can run many tokens without the host.
What needs a decision of the host (a refresh, a rebase) ends the plan: the host decides, between two steps, and goes on.
Whether an adaptive trigger prunes is decided on the device, see `decisions`.
"""

from collections.abc import Sequence
from contextlib import contextmanager

import numpy as np
import torch

from sinkstream.cache import ModelSpec
from sinkstream.engine.buffers import PLAN_TOKENS
from sinkstream.engine.geometry import Counters, rows_ahead
from sinkstream.engine.graphs import GraphCaptures
from sinkstream.engine.planned import PlannedStreams
from sinkstream.engine.refresh import rebase_stream, refresh_if_due
from sinkstream.engine.span import Block
from sinkstream.policies import EvictionPolicy, PruneSchedule

FIRST_PLAN = 16  # tokens
REBASE_AT = 16_384  # float64 angles would allow more; kernels with float32 angles would not


class StreamState(PlannedStreams):
    """The buffers of several independent streams, their counts, and the life of one step.

    Parameters
    ----------
    rebase_at : int
        Window position past which positions are rebased; at least twice the policy's peak is used, so that a rebase
        stays rare.
    structure : Tensor or None, (vocab,), float32
        Structural weight of every token id, where the scorer needs it.
    spec, policy, positions, streams, vocab, device, max_sink, recall_slots, recall_queries
        As for `StreamBuffers`.

    Attributes
    ----------
    captures : GraphCaptures
        Of the steps and forwards that work on these streams.
    """

    block: Block  # which streams the present plan computes

    def __init__(
        self,
        spec: ModelSpec,
        policy: EvictionPolicy,
        *,
        positions: str,
        streams: int,
        vocab: int,
        device: torch.device,
        rebase_at: int,
        structure: torch.Tensor | None = None,
        max_sink: int | None = None,
        recall_slots: int = 0,
        recall_queries: int = 0,
    ):
        super().__init__(
            spec,
            policy,
            positions=positions,
            streams=streams,
            vocab=vocab,
            device=device,
            max_sink=max_sink,
            recall_slots=recall_slots,
            recall_queries=recall_queries,
        )
        self.rebase_at = max(rebase_at, 2 * policy.peak)
        self.structure = None if structure is None else structure.to(device)
        self.captures = GraphCaptures(device)
        self._planned = self._done = 0  # steps of the plan; launched of the one before
        self.clear()

    def clear(self, stream: int | None = None, *, sink: int | None = None) -> None:
        """Forget one stream, or all of them; addresses stay.

        Parameters
        ----------
        sink : int or None
            Of the stream from now on; default: the policy's.

        Raises
        ------
        ValueError
            If there are not so many slots for sinks; nothing has been forgotten then.
        """
        policy = self.policy_of(sink)
        which = range(self.streams) if stream is None else [stream]
        self.stale_logits.difference_update(which)
        if stream is None:
            self.schedules_so_far = [PruneSchedule(policy) for _ in which]
            self.counters_so_far = [Counters(self.geometry.bare, sink=policy.sink) for _ in which]
            self._idle = []
            self._keep_recorded()
            for told in self.between_steps:
                told.forget()
            for buffer in self._buffers().values():
                buffer.zero_()
            self._discard_plan()
            return
        self.settle()
        for told in self.between_steps:
            told.forget()
        self.schedules[stream] = PruneSchedule(policy)
        self.counters[stream] = Counters(self.geometry.bare, sink=policy.sink)
        for buffer in self.stream_buffers(stream).values():
            buffer.zero_()

    def rewind(self, tokens: int, stream: int) -> None:
        """Take back the latest tokens of a stream; its logits are those of no token then. Raises ValueError."""
        self.settle()
        before = self.schedules[stream].fork()
        before.rewind(tokens)
        for told in self.between_steps:
            told.rewind(tokens)
        self.schedules[stream] = before
        if tokens:
            self.counters[stream].seen -= tokens
            self.stale_logits.add(stream)

    # ---- the life of one step ----

    @contextmanager
    def step(self, active: Sequence[int]):
        """Plan if it is time, keep idle streams as they are, and count the step once it has run.

        Parameters
        ----------
        active : sequence of int
            Streams that append what `tokens` says.
        """
        active = tuple(active)
        for told in self.between_steps:
            told.before_step()
        if self._row == self._planned or active != self._active:
            self._plan(active)
        for recorder in self._recorders:
            recorder.due()
        try:
            yield
        except BaseException:
            self._catch_up(check=False)  # the device may have run the step that is not counted
            self.settle()
            raise
        self._row += 1
        self.stale_logits.difference_update(active)
        if self.decisions is None:
            self.count(active)

    def settle(self) -> None:
        """Take in what the steps so far have shown, and drop the rest of the plan."""
        if self.decisions is not None:
            self._catch_up()
        elif self.signals and self._row:
            for row in self.risks[: self._row].tolist():
                for s in self._active:
                    for signal, risk in zip(self.signals, row[s]):
                        self.schedules[s].observe(signal, risk)
        self._keep_recorded()
        self.wake_idle()
        self._discard_plan()

    def wake(self, streams: Sequence[int]) -> None:
        """Have the logits of these streams in `logits`, where steps of others may have left what means nothing."""
        if not set(streams) <= set(self._active):
            self.settle()

    @contextmanager
    def rehearsing(self, block: Block):
        """Steps inside the context are those of idle streams: no stream notices them, whatever it holds."""
        self.settle()
        self.put_aside(block, ())
        idle = torch.tensor(self.span(block).geometry.idle_row(), dtype=torch.int32, device=self.device)
        self.plan.copy_(idle.expand_as(self.plan))
        try:
            yield
        finally:
            self.wake_idle()
            self._discard_plan()

    # ---- planning ----

    def _plan(self, active: tuple[int, ...]) -> None:
        """Do what is due before the next token of each active stream and write the rows up to the next decision."""
        more = self.decisions
        if (
            more is not None
            and self._row
            and active == self._active
            and more.goes_on(active, self._row, self.rebase_at)
        ):
            self._keep_recorded()
            self._write_plan(more.go_on(active, self._row, PLAN_TOKENS), active)
            more.put_right()
            return
        self.settle()
        for s in active:
            refresh_if_due(self, s)
            if self.counters[s].seen - self.counters[s].base > self.rebase_at:
                rebase_stream(self, s)
        self.block = self.block_of(active)
        self.put_aside(self.block, active)
        if more is not None:
            self._write_plan(more.begin(active, PLAN_TOKENS, self.schedules), active)
            return
        horizon = min(PLAN_TOKENS, max(FIRST_PLAN, 2 * self._done))  # a plan that is cut short was work for nothing
        count = min([horizon, *(_sure_tokens(self, s) for s in active)])
        rows = self.geometry.bare.idle_rows(count, self.streams)
        ahead = [Counters(**vars(self.counters[s])) for s in active]
        drops = np.stack([self.schedules[s].plan(count).drop for s in active], 1)
        rows[:, list(active)] = rows_ahead(ahead, drops, self.observed_queries)
        self._write_plan(rows, active)

    def _write_plan(self, rows: np.ndarray, active: tuple[int, ...]) -> None:
        """Write rows, (steps, streams, 8) int32."""
        self._planned, self._active, self._row = len(rows), active, 0
        self.copy_in(self.plan[: len(rows)], torch.from_numpy(rows))
        for told in self.between_steps:
            told.planned()

    def _discard_plan(self) -> None:
        self._done = self._row or self._done
        self._row = self._planned = 0
        self._active = ()
        if self.decisions is not None:
            self.decisions.discard()
        self.cursor.fill_(-1)


def _sure_tokens(state: StreamState, stream: int) -> int:
    """How many tokens, at least 1, come before the next decision that is not known now, or the next rebase."""
    counters = state.counters[stream]
    to_rebase = counters.base + state.rebase_at + 1 - counters.seen
    if state.policy.plan_known:
        return to_rebase
    ahead = state.schedules[stream].copy()
    ahead.step()
    return min(to_rebase, 1 + ahead.sure_steps())
