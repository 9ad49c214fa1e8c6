"""The contract of a trigger: integers in, a decision out."""

from abc import ABC, abstractmethod
from typing import ClassVar

from sinkstream.policies.options import check_options
from sinkstream.registry import Registry

TRIGGERS: Registry = Registry("trigger")


class Trigger(ABC):
    """Decides whether a prune event starts.

    Subclasses are frozen dataclasses whose first option switches them on. Mutable state (only adaptive has any) lives
    in the object that `start` returns, so that one trigger object can serve many runs.

    Attributes
    ----------
    needs : frozenset of str
        Signals that must be observed after every token ("risk"), empty for the others.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self):
        check_options(self)

    @property
    @abstractmethod
    def growth(self) -> int:
        """The most tokens the visible cache runs past its target before this trigger fires."""

    @property
    def sure_growth(self) -> int:
        """Tokens past the target that surely gather before this trigger can fire, whatever is observed."""
        return self.growth

    @abstractmethod
    def due(self, over: int, state: object) -> bool:
        """Whether to prune now.

        Parameters
        ----------
        over : int
            Tokens past the target, the token about to be appended included.
        state : object
            What `start` returned for this run.
        """

    def start(self) -> object:
        """Fresh state for one run."""
        return None
