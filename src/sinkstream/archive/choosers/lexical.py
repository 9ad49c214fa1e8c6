"""Lexical chooser: an inverted index of token ids on the host."""

import copy
import math
from array import array
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from sinkstream.archive.choosers.base import CHOOSERS, Chooser, Evicted, Index, Query
from sinkstream.policies.options import option

SATURATION = 1.2  # of the count of a term in a block, as in BM25
FEW_BLOCKS = 2  # a term in so few blocks is rare, however small the archive is
STALE = 16_384  # tokens that have left the archive and are still in the postings, at the most


@dataclass(frozen=True)
class _Term:
    """A term of the query in the archive: places, blocks with the count in each, inverse document frequency."""

    places: np.ndarray
    blocks: np.ndarray
    counts: np.ndarray
    idf: float


class LexicalIndex(Index):
    """Places of every token id, ascending."""

    def __init__(self, chooser: "Lexical"):
        self.chooser = chooser
        self.places: dict[int, array] = {}
        self._stale_from = 0

    def add(self, evicted: Evicted) -> None:
        """Note where the ids are."""
        for index, token in enumerate(evicted.ids, evicted.first):
            found = self.places.get(token)
            if found is None:
                found = self.places[token] = array("i")
            found.append(index)

    def forget(self, before: int) -> None:
        """Drop places that are gone, once there are many of them."""
        if before - self._stale_from < STALE:
            return
        self._stale_from = before
        for token, places in list(self.places.items()):
            del places[: int(np.searchsorted(np.frombuffer(places, dtype=np.int32), before))]
            if not places:
                del self.places[token]

    def scores(self, query: Query) -> np.ndarray:
        """The larger of two scores of a block, each in units of its own level: shared terms, and words in a row.

        Shared terms: the sum over the rare terms of the query of idf to a power, times their saturated count in the
        block. Words in a row: the sum of the idf of the latest tokens that stand in the archive at the same distances
        from each other as in the query; it counts for the block in which the text would go on.
        """
        chooser, blocks = self.chooser, query.blocks(self.chooser.block)
        shared, most = np.zeros(len(blocks)), max(FEW_BLOCKS, chooser.rare * len(blocks))
        aligned = {} if query.asked else self._latest(query)
        starts, weights = list[np.ndarray](), list[np.ndarray]()
        for token in dict.fromkeys(query.ids):
            term = self._term(token, query, aligned)
            if term is None:
                continue
            if len(term.blocks) <= most:
                saturated = term.counts * (1 + SATURATION) / (term.counts + SATURATION)
                shared[term.blocks - blocks.start] += term.idf**chooser.idf_power * saturated
            for offset in aligned.get(token, ()):
                starts.append(term.places + offset)
                weights.append(np.full(len(term.places), term.idf))
        once = math.log1p((len(blocks) - 0.5) / 1.5)  # idf of a term that is in one block
        found = shared / (chooser.level * once**chooser.idf_power)
        if starts:
            goes_on, inverse = np.unique(np.concatenate(starts), return_inverse=True)
            in_a_row = np.bincount(inverse, weights=np.concatenate(weights)) / (chooser.row_level * once)
            inside = goes_on < query.end
            np.maximum.at(found, goes_on[inside] // chooser.block - blocks.start, in_a_row[inside])
        return found

    def _latest(self, query: Query) -> dict[int, list[int]]:
        """How many tokens before the next one each of the latest ids stands."""
        found: dict[int, list[int]] = {}
        latest = query.ids[max(0, len(query.ids) - self.chooser.row_tokens) :]
        for offset, token in zip(range(len(latest), 0, -1), latest):
            found.setdefault(token, []).append(offset)
        return found

    def _term(self, token: int, query: Query, aligned: dict[int, list[int]]) -> _Term | None:
        """A term of the query, unless it is nowhere or too common to be looked at."""
        chooser, held = self.chooser, self.places.get(token)
        if held is None:
            return None
        places = np.frombuffer(held, dtype=np.int32)
        places = places[slice(*np.searchsorted(places, (query.first, query.end)))]
        total = len(query.blocks(chooser.block))
        most = max(FEW_BLOCKS, (chooser.row_rare if token in aligned else chooser.rare) * total)
        if not len(places) or len(places) > most * chooser.block:
            return None
        blocks, counts = np.unique(places // chooser.block, return_counts=True)
        if len(blocks) > most:
            return None
        return _Term(places, blocks, counts, math.log1p((total - len(blocks) + 0.5) / (len(blocks) + 0.5)))

    def copy(self) -> Self:
        """Places of its own."""
        other = copy.copy(self)
        other.places = {token: places[:] for token, places in self.places.items()}
        return other


@CHOOSERS.register("lexical")
@dataclass(frozen=True)
class Lexical(Chooser):
    """Blocks that share rare token ids with the query, or in which the latest tokens stand in a row.

    An inverted index on the host: no byte on the device. Source: BM25 (Robertson and Zaragoza, 2009), with the idf to a
    power of 2 and without common terms: without the two, blocks of common words outrank the statement. Words in a row:
    prompt lookup, by weight instead of an exact match.
    """

    foresees: ClassVar[bool] = True

    rare: float = option(0.03, "a term in a larger share of the blocks is not shared", minimum=0.0, maximum=1.0)
    idf_power: float = option(2.0, "power of the inverse document frequency of shared terms", minimum=0.0)
    level: float = option(3.6, "shared terms that open the gate, in terms that are in one block", minimum=1e-9)
    row_tokens: int = option(16, "latest tokens that are looked for in a row", minimum=0)
    row_rare: float = option(0.1, "a term in a larger share of the blocks is in no row", minimum=0.0, maximum=1.0)
    row_level: float = option(3.4, "terms in a row that open the gate, in terms that are in one block", minimum=1e-9)

    def start(self) -> LexicalIndex:
        """No places."""
        return LexicalIndex(self)
