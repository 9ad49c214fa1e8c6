"""Whole turns: what leaves a conversation is the oldest turn, all of it, so that no turn is cut apart."""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field

from sinkstream.policies.options import option
from sinkstream.policies.triggers.base import TRIGGERS, Trigger


@dataclass
class _TurnState:
    borders: list[int] = field(default_factory=list)  # indices in the stream at which turns begin, ascending


@TRIGGERS.register("turns")
@dataclass(frozen=True)
class Turns(Trigger):
    """Drop the oldest whole turn once the cache is full; a turn longer than the window leaves token by token.

    The caller says where turns begin (`PruneSchedule.begin_turn`). A text without turns is evicted strictly. The rest
    of a turn that is cut already leaves token by token too. Source: none; asked for in llama.cpp#15416, ollama#13641.
    """

    evict: str | None = option(None, "what one prune drops: the oldest whole turn", choices=lambda: ["turns"])

    @property
    def growth(self) -> int:
        return 0

    @property
    def periodic(self) -> bool:
        return False

    def start(self) -> _TurnState:
        return _TurnState()

    def due(self, over: int, state: _TurnState) -> bool:
        return over > 0

    def drop(self, over: int, oldest: int, newest: int, state: _TurnState) -> int:
        borders = state.borders
        place = bisect_left(borders, oldest)
        if place == len(borders) or borders[place] != oldest:  # the oldest turn is cut already
            return over
        following = bisect_left(borders, oldest + over)
        if following == len(borders) or borders[following] > newest:  # one turn fills the window
            return over
        return borders[following] - oldest

    def begin_turn(self, state: _TurnState, index: int, oldest: int) -> None:
        if state.borders and index <= state.borders[-1]:
            raise ValueError(f"a turn that begins at token {index} comes after one at token {state.borders[-1]}")
        del state.borders[: bisect_left(state.borders, oldest)]
        state.borders.append(index)

    def rewind(self, state: _TurnState, seen: int) -> None:
        del state.borders[bisect_right(state.borders, seen - 1) :]
