"""Adaptive prunes that the device decides: what it is told, and the host's account of its decisions, which may lag.

The host knows a decision once it has read the risks: it feeds them to the schedule, whose rule the kernel follows.
Until then it plans as if nothing were dropped, and the device puts each row right before it is read.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sinkstream.engine.geometry import Counters, rows_ahead
from sinkstream.engine.recorder import CopyInFlight
from sinkstream.kernels import decide
from sinkstream.policies import SIGNALS, EvictionPolicy, PruneSchedule
from sinkstream.policies.triggers.adaptive import Adaptive
from sinkstream.policies.triggers.lazy import Lazy
from sinkstream.policies.triggers.slack import Slack


@dataclass(frozen=True)
class AdaptiveRule:
    """What the kernel is told of a policy.

    Attributes
    ----------
    index : int
        Which trigger is the adaptive one.
    adaptive : Adaptive
    bound : float
        Tokens past the target that the other triggers let gather; infinite without any.
    target : int
    max_drop : float
        Infinite without a bound.
    """

    index: int
    adaptive: Adaptive
    bound: float
    target: int
    max_drop: float

    @classmethod
    def of(cls, policy: EvictionPolicy) -> "AdaptiveRule | None":
        """The rule of a policy; None if the device cannot follow it.

        A scorer must be asked at every prune, and only triggers that count tokens can stand beside the adaptive one.
        """
        found = [(i, t) for i, t in enumerate(policy.triggers) if type(t) is Adaptive]
        others = [t for t in policy.triggers if type(t) is not Adaptive]
        if policy.scorer is not None or len(found) != 1 or any(type(t) not in (Lazy, Slack) for t in others):
            return None
        bound = min((t.growth for t in others), default=float("inf"))
        max_drop = float("inf") if policy.max_drop is None else policy.max_drop
        return cls(*found[0], bound, policy.target, max_drop)

    @property
    def signal(self) -> str:
        """Name of the risk signal."""
        assert self.adaptive.signal is not None, "the option switches the trigger on"
        return self.adaptive.signal

    def row(self, schedule: PruneSchedule) -> list[float]:
        """A stream's row of the table, once the first token of the plan, about which the host decides, is appended."""
        given, state = self.adaptive, schedule.states[self.index]
        ahead = schedule.copy()
        ahead.step()
        low, high = state.low, state.high
        row = [0.0] * decide.COLUMNS
        row[decide.ACTIVE], row[decide.CACHED], row[decide.PRUNING] = 1.0, ahead.cached, ahead.pruning
        row[decide.OBSERVED], row[decide.RISK] = state.seen_tokens, state.risk or 0.0
        row[decide.LOW], row[decide.LOW_SCALE] = low.estimate or 0.0, low.scale
        row[decide.HIGH], row[decide.HIGH_SCALE] = high.estimate or 0.0, high.scale
        row[decide.TARGET], row[decide.BOUND], row[decide.MAX_DROP] = self.target, self.bound, self.max_drop
        row[decide.LEAST], row[decide.MIDDLE] = given.adaptive_min, given.adaptive_every
        row[decide.MOST], row[decide.WARMUP] = given.adaptive_max, given.warmup_tokens
        row[decide.KEEP], row[decide.TAKE] = given.adaptive_smoothing, 1 - given.adaptive_smoothing
        row[decide.RATE], row[decide.LOW_QUANTILE], row[decide.HIGH_QUANTILE] = low.rate, low.q, high.q
        return [float(value) for value in row]


class Decisions:
    """The decisions of all streams of a `StreamState`.

    Parameters
    ----------
    state : StreamState
    rule : AdaptiveRule
    """

    def __init__(self, state: Any, rule: AdaptiveRule):
        self.state, self.rule = state, rule
        with torch.inference_mode(False):
            self._parts = decide.risk_parts(state.logits)
            self._first_row = torch.zeros(1, dtype=torch.int64, device=state.device)
        self._ahead: dict[int, Counters] = {}
        self._kept: list[CopyInFlight] = []  # risks of earlier plans that are not counted yet
        self._kept_rows = self._counted = 0  # rows of these plans; rows of the present plan that are counted

    @torch.no_grad()
    def note(self) -> None:
        """Last thing in a step, on the device: take in the risk of the logits and decide about the next token."""
        state, rule = self.state, self.rule
        with torch.cuda.device_of(state.logits):
            decide.decide(
                state.logits,
                state.risks,
                state.decisions_table,
                state.plan,
                state.cursor,
                signal=rule.signal,
                measure=SIGNALS[rule.signal],
                ring=state.geometry.ring,
                original=state.geometry.original,
                parts=self._parts,
            )

    # ---- planning ----

    def begin(self, active: tuple[int, ...], count: int, schedules: list[PruneSchedule]) -> np.ndarray:
        """Tell the device where the active streams stand; gives the rows of a new plan."""
        state = self.state
        drops = {s: schedules[s].plan(1)[0].drop for s in active}
        table = torch.zeros(state.streams, decide.COLUMNS, dtype=torch.float64)
        for s in active:
            table[s] = torch.tensor(self.rule.row(schedules[s]), dtype=torch.float64)
        state.copy_in(state.decisions_table, table)
        self._ahead = {s: Counters(**vars(state.counters[s])) for s in active}
        return self._rows(count, drops)

    def goes_on(self, active: tuple[int, ...], rows: int, rebase_at: int) -> bool:
        """Whether the next plan can follow the present one, of so many rows, without the host's account."""
        counters = self.state.counters_so_far
        uncounted = self._kept_rows + rows - self._counted
        return all(s in self._ahead and counters[s].seen + uncounted - counters[s].base <= rebase_at for s in active)

    def go_on(self, active: tuple[int, ...], rows: int, count: int) -> np.ndarray:
        """Rows of the plan after the present one, as if the host's account were up to date."""
        while self._kept:  # of earlier plans, and on the host already, as a rule
            self._count(active, self._kept.pop(0).tolist())
        self._kept.append(CopyInFlight(self.state.risks[self._counted : rows].clone()))
        self._kept_rows, self._counted = rows - self._counted, 0
        return self._rows(count, {})

    def put_right(self) -> None:
        """Take what the device has dropped out of the first row of a plan that goes on."""
        state = self.state
        g = state.geometry
        decide.put_right(state.plan, self._first_row, state.decisions_table, g.ring, g.original)

    def _rows(self, count: int, first_drops: dict[int, int]) -> np.ndarray:
        """Rows, (steps, streams, 8), without a prune, but for the first: idle ones for streams that are not active."""
        rows = self.state.geometry.bare.idle_rows(count, self.state.streams)
        drops = np.zeros((count, len(self._ahead)), dtype=np.int64)
        drops[0] = [first_drops.get(s, 0) for s in self._ahead]
        rows[:, list(self._ahead)] = rows_ahead(list(self._ahead.values()), drops, 0)
        return rows

    # ---- the host's account ----

    def catch_up(self, active: tuple[int, ...], rows: int, check: bool) -> None:
        """Read what the device has decided in so many rows of the present plan; waits for the device.

        Parameters
        ----------
        check : bool
            Whether the device has run these rows and no more, so that both accounts must agree.

        Raises
        ------
        RuntimeError
            If the device has decided otherwise than the schedule.
        """
        if not self._kept and self._counted == rows:
            return
        while self._kept:
            self._count(active, self._kept.pop(0).tolist())
        self._kept_rows = 0
        self._count(active, self.state.risks[self._counted : rows].tolist())
        self._counted = rows
        if not check:
            return
        found = self.state.decisions_table[:, decide.CACHED].tolist()
        for s in active:
            ahead = self.state.schedules_so_far[s].copy()
            ahead.step()
            if ahead.cached != found[s]:
                raise RuntimeError(
                    f"the device keeps {found[s]:.0f} entries of stream {s}, and its schedule says {ahead.cached}:"
                    " a fault of sinkstream; reset the stream and use backend='ring'"
                )

    def discard(self) -> None:
        """Forget the present plan, once its steps are counted or its stream is cleared."""
        self._ahead, self._kept, self._kept_rows, self._counted = {}, [], 0, 0

    def _count(self, active: tuple[int, ...], risks: list) -> None:
        for row in risks:
            self.state.count(active)
            for s in active:
                self.state.schedules_so_far[s].observe(self.rule.signal, row[s][0])
