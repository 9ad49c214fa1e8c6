"""The prune schedule of one run: integers in, integers out.

Time is counted in appended tokens. Just before a token is appended, n counts the cached entries *with* that token; if
a trigger is due the drop happens first, so that no token's attention ever sees more than the cap.
"""

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

from sinkstream.policies.eviction import EvictionPolicy


@dataclass(frozen=True)
class Step:
    """What happens at one token.

    Attributes
    ----------
    drop : int
        Entries dropped just before the token is appended.
    event : bool
        Whether a prune event starts here; the later stages of a staged drop carry False.
    visible : int
        Entries that the token's attention sees, itself included.
    """

    drop: int
    event: bool
    visible: int


class Steps(Sequence[Step]):
    """The steps of tokens in a row, in arrays, so that no object is made for a token that nobody asks for.

    Attributes
    ----------
    drop : array, (tokens,), int64
    event : array, (tokens,), bool
    visible : array, (tokens,), int64
        As in `Step`.
    """

    def __init__(self, drop: np.ndarray, event: np.ndarray, visible: np.ndarray):
        self.drop, self.event, self.visible = drop, event, visible

    @classmethod
    def of(cls, steps: Sequence[Step]) -> "Steps":
        """The same steps, in arrays."""
        drops, events, visible = [s.drop for s in steps], [s.event for s in steps], [s.visible for s in steps]
        return cls(np.array(drops), np.array(events), np.array(visible))

    def __len__(self) -> int:
        return len(self.drop)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    @overload
    def __getitem__(self, index: int) -> Step: ...

    @overload
    def __getitem__(self, index: slice) -> "Steps": ...

    def __getitem__(self, index):
        if isinstance(index, slice):
            return Steps(self.drop[index], self.event[index], self.visible[index])
        return Step(int(self.drop[index]), bool(self.event[index]), int(self.visible[index]))


class PruneSchedule:
    """Counts entries and says before each token how many are dropped.

    Parameters
    ----------
    policy : EvictionPolicy
    """

    def __init__(self, policy: EvictionPolicy):
        self.policy = policy
        self.seen = self.cached = 0
        self.pruning = False
        self._states = [t.start() for t in policy.triggers]

    @property
    def oldest(self) -> int:
        """Index in the stream of the oldest window token, where no older tokens are pinned."""
        return self.seen - self.cached + self.policy.sink

    @property
    def states(self) -> list[Any]:
        """What each trigger of the policy has taken in, in their order."""
        return self._states

    def step(self) -> Step:
        """Account for one token. While pruning mode lasts every step drops; a new event starts only after it."""
        return Step(*self._step(), self.cached)

    def _step(self) -> tuple[int, bool]:
        """As `step`; gives what is dropped, and whether an event starts."""
        policy = self.policy
        n = self.cached + 1
        over = n - policy.target
        drop, event = 0, False
        if over > 0 and not self.pruning:
            for trigger, state in zip(policy.triggers, self._states):  # no generator: this runs for every token
                event = event or trigger.due(over, state)
        if self.pruning or event:
            drop = max(t.drop(over, self.oldest, self.seen, s) for t, s in zip(policy.triggers, self._states))
            if policy.max_drop is not None:
                drop = min(drop, policy.max_drop)
            self.pruning = drop < over
        self.seen += 1
        self.cached = n - drop
        return drop, event

    def copy(self) -> "PruneSchedule":
        """A schedule that can be stepped ahead without touching this one; observations are shared."""
        ahead = object.__new__(type(self))
        ahead.__dict__.update(self.__dict__)
        return ahead

    def fork(self) -> "PruneSchedule":
        """A schedule that goes on from here, with observations of its own."""
        other = self.copy()
        other._states = deepcopy(self._states)
        return other

    def plan(self, tokens: int) -> Steps:
        """The next `tokens` steps if nothing is observed meanwhile; this schedule is left as it is."""
        return self.copy().advance(tokens)

    def advance(self, tokens: int) -> Steps:
        """Account for `tokens` tokens between which nothing is observed.

        Stretches without a drop are counted at once, and what follows a state that has been met before is repeated:
        the work of the host does not grow with the prunes.
        """
        if tokens == 1:
            return Steps.of([self.step()])
        drop, event = np.zeros(tokens, dtype=np.int64), np.zeros(tokens, dtype=bool)
        before, done = self.cached, 0
        periodic = all(trigger.periodic for trigger in self.policy.triggers)
        met: dict[tuple[int, bool], int] = {}
        while done < tokens:
            quiet = self._skip(tokens - done)
            if quiet:
                done += quiet
                continue
            first = met.setdefault((self.cached, self.pruning), done)
            period = done - first if periodic else 0
            repeated = (tokens - done) // period * period if period else 0
            if repeated:
                for part in (drop, event):
                    part[done : done + repeated].reshape(-1, period)[:] = part[first:done]
                self.seen += repeated
                done += repeated
                continue
            drop[done], event[done] = self._step()
            done += 1
        return Steps(drop, event, before + np.arange(1, tokens + 1) - drop.cumsum())

    def foresee(self, risks: Mapping[str, Sequence[float]], tokens: int) -> Steps:
        """The next steps if the risks after them turn out like these; this schedule is left as it is.

        Parameters
        ----------
        risks : mapping of sequence of float
            Risk signal -> after the next token, the one behind it …; behind the last of them nothing is observed.
        tokens : int
            Steps that are asked for.
        """
        ahead, known = self.fork(), min([tokens, *map(len, risks.values())]) if risks else 0
        drop, event = np.zeros(tokens, dtype=np.int64), np.zeros(tokens, dtype=bool)
        done = 0
        while done < known:
            quiet = ahead._skip(known - done)
            if not quiet:
                drop[done], event[done] = ahead._step()
            ahead._observe(risks, done, done + max(1, quiet))
            done += max(1, quiet)
        if known < tokens:
            rest = ahead.advance(tokens - known)
            drop[known:], event[known:] = rest.drop, rest.event
        return Steps(drop, event, self.cached + np.arange(1, tokens + 1) - drop.cumsum())

    def follow(self, planned: Steps, risks: Mapping[str, Sequence[float]]) -> int:
        """Account for tokens that came as planned, up to the first about which the policy decides otherwise.

        Parameters
        ----------
        planned : Steps
        risks : mapping of sequence of float
            Risk signal -> after every token.

        Returns
        -------
        int
            How many tokens are accounted for.

        Raises
        ------
        NonFiniteRisk
            As `observe`; this schedule means nothing then.
        """
        first, drops, done = self.seen, planned.drop.tolist(), 0
        while done < len(drops):
            coming = drops[done : done + self.sure_steps()]
            quiet = self._skip(len(coming) if not any(coming) else 0)
            before = self.seen, self.cached, self.pruning
            if not quiet and self._step()[0] != drops[done]:
                self.seen, self.cached, self.pruning = before
                break
            self._observe(risks, done, done + max(1, quiet))
            done += max(1, quiet)
        for signal, values in risks.items():
            check_finite(signal, values[:done], first)
        return done

    def _skip(self, tokens: int) -> int:
        """Account for those of the next tokens before which there is surely no drop; returns how many."""
        quiet = min(self.sure_steps(), tokens)
        self.seen, self.cached = self.seen + quiet, self.cached + quiet
        return quiet

    def _observe(self, risks: Mapping[str, Sequence[float]], first: int, end: int) -> None:
        """Take in the risks of some tokens, unchecked."""
        for trigger, state in zip(self.policy.triggers, self._states):
            if trigger.signal is not None:
                for risk in risks[trigger.signal][first:end]:
                    trigger.observe(state, risk)

    def sure_steps(self) -> int:
        """How many tokens can surely be appended before the next drop, whatever is observed (0: the next may drop)."""
        return self._steps_to(self.policy.sure_growth)

    def possible_steps(self) -> int:
        """How many tokens can be appended before the next drop at the most, whatever is observed."""
        return self._steps_to(self.policy.growth)

    def _steps_to(self, growth: int) -> int:
        return 0 if self.pruning else max(0, self.policy.target + growth - self.cached)

    def begin_turn(self, index: int) -> None:
        """Take in that a turn of a conversation begins at the token of this index, which is not appended yet.

        Raises
        ------
        ValueError
            If the token has been appended already, or a later turn is known.
        """
        if index < self.seen:
            raise ValueError(f"a turn begins at token {index}, but {self.seen} tokens have been appended")
        for trigger, state in zip(self.policy.triggers, self._states):
            trigger.begin_turn(state, index, self.oldest)

    def rewind(self, tokens: int) -> None:
        """Take back the latest tokens; what was evicted when they came does not come back.

        A turn that began with the first of them, or later, is forgotten. A prune that is under way goes on.

        Raises
        ------
        ValueError
            If so many tokens are not in the window, or the policy cannot tell what to take back.
        """
        if self.policy.scorer is not None or self.signals():
            raise ValueError("a stream with pinned tokens or an adaptive trigger cannot be rewound")
        window = self.cached - (self.policy.sink if self.cached < self.seen else 0)
        if not 0 <= tokens <= window:
            raise ValueError(f"tokens={tokens} cannot be taken back; accepted: 0 to {window}, which are in the window")
        if not tokens:
            return
        self.seen -= tokens
        self.hold(self.cached - tokens)
        for trigger, state in zip(self.policy.triggers, self._states):
            trigger.rewind(state, self.seen)

    def hold(self, cached: int) -> None:
        """Take in that so many entries are cached now: tokens came back, or left, between two steps."""
        self.cached = cached
        self.pruning = self.pruning and cached > self.policy.target

    def observe(self, signal: str, risk: float) -> None:
        """Take in a risk signal of the distribution predicted after the latest token, for the triggers that want it.

        Raises
        ------
        NonFiniteRisk
            If the signal is no finite number: a running quantile would never be a number again.
        """
        check_finite(signal, [risk])
        for trigger, state in zip(self.policy.triggers, self._states):
            if trigger.signal == signal:
                trigger.observe(state, risk)

    def signals(self) -> set[str]:
        """Names of the risk signals that must be observed after every token."""
        return {t.signal for t in self.policy.triggers if t.signal}


class NonFiniteRisk(ValueError):
    """Logits that an adaptive policy reads are not finite."""


def check_finite(signal: str, risks: Sequence[float], first: int | None = None) -> None:
    """Raise NonFiniteRisk unless the risk signals of tokens ``first``, ``first + 1``, … are finite numbers."""
    wrong = next((i for i, risk in enumerate(risks) if not math.isfinite(risk)), None)
    if wrong is not None:
        where = "" if first is None else f" after token {first + wrong} of the stream"
        raise NonFiniteRisk(
            f"the logits{where} are not finite, and an adaptive policy reads them"
            f" ({signal}={risks[wrong]}); accepted: a model whose logits are finite (a wider dtype where half precision"
            " overflows), or a policy that does not read them"
        )
