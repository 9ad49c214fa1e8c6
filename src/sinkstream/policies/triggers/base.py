"""The contract of a trigger: integers in, a decision out."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from sinkstream.policies.options import check_options
from sinkstream.registry import Registry

TRIGGERS: Registry = Registry("trigger")


@dataclass(frozen=True)
class Trigger(ABC):
    """Decides whether a prune event starts.

    Subclasses are frozen dataclasses whose first option switches them on. Mutable state (only adaptive has any) lives
    in the object that `start` returns, so that one trigger object can serve many runs.

    A trigger that looks at the model's output names the risk signal in `signal` and takes it in through `observe`.
    """

    def __post_init__(self):
        check_options(self)

    @property
    def signal(self) -> str | None:
        """Name of the risk signal (see `SIGNALS`) that must be observed after every token; None: none."""
        return None

    @property
    def needs(self) -> frozenset[str]:
        """What must be observed during the run: "risk" or nothing."""
        return frozenset({"risk"} if self.signal else ())

    @property
    @abstractmethod
    def growth(self) -> int:
        """The most tokens the visible cache runs past its target before this trigger fires."""

    @property
    def sure_growth(self) -> int:
        """Tokens past the target that surely gather before this trigger can fire, whatever is observed."""
        return self.growth

    @property
    def periodic(self) -> bool:
        """Whether, as long as nothing is observed, decisions depend on the number of cached entries only."""
        return True

    @abstractmethod
    def due(self, over: int, state: Any) -> bool:
        """Whether to prune now.

        Parameters
        ----------
        over : int
            Tokens past the target, the token about to be appended included.
        state : object
            What `start` returned for this run.
        """

    def drop(self, over: int, oldest: int, newest: int, state: Any) -> int:
        """How many entries an event of this trigger drops, at least `over`.

        Parameters
        ----------
        over : int
            As in `due`.
        oldest, newest : int
            Indices in the stream of the oldest window token and of the token about to be appended.
        state : object
            As in `due`.
        """
        return over

    def start(self) -> Any:
        """Fresh state for one run."""
        return None

    def begin_turn(self, state: Any, index: int, oldest: int) -> None:  # noqa: B027  (most triggers know no turns)
        """Take in that a turn begins at the token of this index; `oldest` is the index of the oldest window token."""

    def rewind(self, state: Any, seen: int) -> None:  # noqa: B027  (most triggers count nothing by themselves)
        """Forget what was taken in about tokens from index `seen` on."""

    def observe(self, state: Any, risk: float) -> None:
        """Take in the `signal` of the distribution that was predicted after one token."""
        raise NotImplementedError(f"{type(self).__name__} asks for signal={self.signal!r} and must define observe()")
