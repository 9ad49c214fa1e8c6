"""`LongestRun`: how many of the latest tokens stand in the archive in a row, carried from token to token."""

import math
from collections.abc import Callable

import numpy as np

from sinkstream.archive.choosers.base import Query
from sinkstream.archive.choosers.postings import Term, stands

ROUNDING = 1e-6  # of a sum of scores, by which a bound is not missed
FOLLOWED = 8  # the most tokens between two queries over which the run is carried
FIXED = 600  # what looking a run up costs before any place is compared, in places

Find = Callable[[int], Term | None]  # the term of an id in the archive of the query


class LongestRun:
    """An upper bound of the longest run that ends with the latest token, and its places once they have been looked up.

    With one more token the longest run is one token longer at most: without its last token it stood in the archive
    before. So nothing of it is looked up as long as the bound times the idf of its terms does not reach what is
    needed; and where the places of the longest run are known, only these are compared with the new token. A query that
    does not follow the one before begins anew.

    Parameters
    ----------
    tokens : int
        How many of the latest tokens count.
    """

    def __init__(self, tokens: int):
        self.tokens = tokens
        self._now, self._first, self._end = 0, 0, 0  # of the latest query
        self._latest: list[int] = []  # its latest ids, the newest first
        self._bound = 0
        self._places: np.ndarray | None = None  # where the text goes on behind every run of the longest ones
        # of the tokens within the bound, the newest first: an idf is at most log(1 + blocks) less it
        self._rarity: list[float] = []

    def may_reach(
        self, query: Query, total: int, needed: float, find: Find, follows: Callable[[int, int, int], bool]
    ) -> bool:
        """Whether a run whose idf add up to `needed` may end with the latest token; False is sure.

        Parameters
        ----------
        query : Query
            Without a question.
        total : int
            Blocks of the archive.
        find : callable
        follows : callable
            Whether three ids may have stood in a row; False is sure.
        """
        self._follow(query, find, follows)
        return self._adds_up(total, needed)

    def missed(self, total: int, needed: float, find: Find) -> None:
        """Take in that no run of the query that may have reached `needed` did: look up how long the longest one is."""
        if self._places is None:
            self._look_up(total, needed, find)

    def _adds_up(self, total: int, needed: float) -> bool:
        bound = self._bound
        return bound * math.log1p(total) - sum(self._rarity[:bound]) >= needed - 2 * ROUNDING

    def _follow(self, query: Query, find: Find, follows: Callable[[int, int, int], bool]) -> None:
        """Let the bound be that of a query."""
        tokens, before, latest = self.tokens, self._latest, list(query.ids[: -self.tokens - 1 : -1])
        new, bound = query.now - self._now, len(latest)
        if (
            0 <= new <= FOLLOWED
            and query.first == self._first
            and 0 <= query.end - self._end <= new
            and bound == len(before) == tokens
            and latest[new:] == before[: tokens - new]
        ):
            bound = min(bound, self._bound + new)
        else:
            new, self._places, self._rarity = bound, None, []
        self._now, self._first, self._end, self._latest = query.now, query.first, query.end, latest
        for i in range(min(new, bound - 2)):
            if not follows(latest[i + 2], latest[i + 1], latest[i]):
                bound = i + 2
                break
        terms: list[Term] = []
        for token in latest[: min(new, bound)]:
            term = find(token)
            if term is None:
                bound = len(terms)
                break
            terms.append(term)
        self._rarity = [*[math.log(term.blocks + 0.5) for term in terms], *self._rarity][:bound]
        if self._places is not None:
            self._places = self._longer(self._places, terms) if len(terms) == new else None
            if self._places is None:
                bound = min(bound, self._bound + max(0, new - 1))
        self._bound = bound

    @staticmethod
    def _longer(places: np.ndarray, terms: list[Term]) -> np.ndarray | None:
        """The places of the longest run with new tokens, the newest first; None where it has ended."""
        for term in reversed(terms):
            places = places[stands(term, places)] + np.int32(1)
        return places if len(places) else None

    def _look_up(self, total: int, needed: float, find: Find) -> None:
        """Look up the longest run, or a lower bound, which no run of the terms that add up to `needed` passes."""
        terms, rest = list[Term](), needed - 2 * ROUNDING
        for token, rarity in zip(self._latest, self._rarity):
            term = find(token)
            assert term is not None, "what stood in the archive stands there still"
            terms.append(term)
            rest -= math.log1p(total) - rarity
            if rest <= 0:
                break
        counts = [term.high - term.low for term in terms]
        # the fewer places the better, and the nearer: the bound is not above it if none of its places is in a run
        anchor = min(range(len(terms)), key=lambda i: (FIXED + counts[i]) / (len(terms) - i))
        places = terms[anchor].places + np.int32(anchor + 1)
        for i in sorted(range(anchor), key=counts.__getitem__):
            places = places[stands(terms[i], places - np.int32(i + 1))]
        length = anchor + 1
        while len(places) and length < self._bound:
            term = terms[length] if length < len(terms) else find(self._latest[length])
            assert term is not None, "what stood in the archive stands there still"
            further = places[stands(term, places - np.int32(length + 1))]
            if not len(further):
                break
            places, length = further, length + 1
        if len(places):
            self._bound, self._places = length, places
        else:
            self._bound = anchor
