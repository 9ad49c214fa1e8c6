"""Oracle choosers: told which tokens are wanted when; what attending, or attending in time, can give back at most."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from sinkstream.archive.choosers.base import CHOOSERS, Chooser, Index, Query
from sinkstream.policies.options import option

TOLD = "(begin, end, first, last): for the tokens begin <= t < end, the tokens first <= p < last"


class OracleIndex(Index):
    """Remembers nothing: all is told."""

    def __init__(self, chooser: "Oracle"):
        self.chooser = chooser

    def scores(self, query: Query) -> np.ndarray:
        """At least 2 for the blocks that hold a token which is wanted now, or before the next choice, 0 for all others.

        Above 2, up to 3, for those to come, the next one first: slots that are too few for all hold what comes now.
        """
        chooser, blocks = self.chooser, query.blocks(self.chooser.block)
        found = np.zeros(len(blocks))
        for begin, end, first, last in chooser.told or ():
            if chooser.wanted(begin, end, query):
                low, high = first // chooser.block, (last - 1) // chooser.block + 1
                held = np.arange(max(low, blocks.start), min(high, blocks.stop))
                ahead = held - (first + max(0, query.now - begin)) // chooser.block
                found[held - blocks.start] = np.where(ahead >= 0, 2.0 + 1.0 / (1.0 + np.abs(ahead)), 2.0)
        return found

    def copy(self) -> "OracleIndex":
        """Itself."""
        return self


@CHOOSERS.register("oracle")
@dataclass(frozen=True)
class Oracle(Chooser):
    """Told which tokens are wanted when, and brings them before the first of them is needed: a ceiling.

    Attributes
    ----------
    told : rows of four int, or None
        What is wanted when; without rows nothing is wanted. None: nobody has said.

    Source: none, the ceiling of attending to what was brought back.
    """

    foresees: ClassVar[bool] = True

    told: tuple[tuple[int, int, int, int], ...] | None = None
    ahead: int = option(8, "tokens before `begin` from which on the told ones are wanted", minimum=0)

    def __post_init__(self):
        super().__post_init__()
        if self.told is None:
            return
        try:
            told = tuple(tuple(int(n) for n in row) for row in self.told)
        except (TypeError, ValueError):
            raise ValueError(f"recall_told={self.told!r} is not accepted; accepted: rows of {TOLD}") from None
        wrong = next((row for row in told if len(row) != 4 or row[0] >= row[1] or not 0 <= row[2] < row[3]), None)
        if wrong is not None:
            raise ValueError(f"recall_told row {wrong} is not accepted; accepted: {TOLD}")
        object.__setattr__(self, "told", told)

    def check(self, model: Any) -> None:
        """Raise ValueError where nobody says what is wanted: nothing would ever come back."""
        if self.told is None:
            raise ValueError(
                f"an oracle must be told what is wanted; accepted: recall_told, rows of {TOLD}, which sinkstream recall"
                " and streameval give by themselves"
            )

    def wanted(self, begin: int, end: int, query: Query) -> bool:
        """Whether what is wanted for the tokens `begin` to `end` is wanted at the choice of this query."""
        return begin - self.ahead < query.now < end

    def start(self) -> OracleIndex:
        """Nothing to remember."""
        return OracleIndex(self)


@CHOOSERS.register("late-oracle")
@dataclass(frozen=True)
class LateOracle(Oracle):
    """As the oracle, but only once some of the tokens have been read: a ceiling for every chooser that reads them.

    Source: none, the ceiling of a choice that must first see what it looks for.
    """

    late: int = option(5, "tokens after `begin` that must have been read", minimum=0)

    def wanted(self, begin: int, end: int, query: Query) -> bool:
        """As `Oracle.wanted`, later; a question has been read whole when its choice is made."""
        read = query.now + len(query.ids) if query.asked else query.now
        return begin + self.late <= read and query.now < end
