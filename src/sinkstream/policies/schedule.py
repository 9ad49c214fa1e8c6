"""The prune schedule of one run: integers in, integers out.

Time is counted in appended tokens. Just before a token is appended, n counts the cached entries *with* that token; if
a trigger is due the drop happens first, so that no token's attention ever sees more than the cap.
"""

from dataclasses import dataclass

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


class PruneSchedule:
    """Counts entries and says before each token how many are dropped.

    Parameters
    ----------
    policy : EvictionPolicy
    """

    def __init__(self, policy: EvictionPolicy):
        self.policy = policy
        self.cached = 0
        self.pruning = False
        self._states = [t.start() for t in policy.triggers]

    def step(self) -> Step:
        """Account for one token. While pruning mode lasts every step drops; a new event starts only after it."""
        policy = self.policy
        n = self.cached + 1
        over = n - policy.target
        event = not self.pruning and over > 0 and any(t.due(over, s) for t, s in zip(policy.triggers, self._states))
        drop = 0
        if self.pruning or event:
            drop = over if policy.max_drop is None else min(over, policy.max_drop)
            self.pruning = drop < over
        self.cached = n - drop
        return Step(drop, event, self.cached)

    def copy(self) -> "PruneSchedule":
        """A schedule that can be stepped ahead without touching this one; observations are shared."""
        ahead = object.__new__(type(self))
        ahead.__dict__.update(self.__dict__)
        return ahead

    def plan(self, tokens: int) -> list[Step]:
        """The next `tokens` steps if nothing is observed meanwhile; this schedule is left as it is."""
        ahead = self.copy()
        return [ahead.step() for _ in range(tokens)]

    def sure_steps(self) -> int:
        """How many tokens can surely be appended before the next drop, whatever is observed (0: the next may drop)."""
        return self._steps_to(self.policy.sure_growth)

    def possible_steps(self) -> int:
        """How many tokens can be appended before the next drop at the most, whatever is observed."""
        return self._steps_to(self.policy.growth)

    def _steps_to(self, growth: int) -> int:
        return 0 if self.pruning else max(0, self.policy.target + growth - self.cached)

    def observe(self, signal: str, risk: float) -> None:
        """Take in a risk signal of the distribution predicted after the latest token, for the triggers that want it."""
        for trigger, state in zip(self.policy.triggers, self._states):
            if trigger.signal == signal:
                trigger.observe(state, risk)

    def signals(self) -> set[str]:
        """Names of the risk signals that must be observed after every token."""
        return {t.signal for t in self.policy.triggers if t.signal}
