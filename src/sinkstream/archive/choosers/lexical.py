"""Lexical chooser: an inverted index of token ids on the host."""

import copy
import math
from array import array
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np

from sinkstream.archive.choosers.base import CHOOSERS, Chooser, Evicted, Index, Query
from sinkstream.policies.options import option

SATURATION = 1.2  # of the count of a term in a block, as in BM25
FEW_BLOCKS = 2  # a term in so few blocks is rare, however small the archive is
SWEPT = 4  # ids whose postings are looked through for every token that leaves the archive
ROUNDING = 1e-6  # of a sum of scores, by which a bound is not missed
NONE = np.zeros(0, dtype=np.int64)


class _Posting:
    """Where one id stands: `places`, and the numbers of the blocks that they are in, each ascending.

    `latest` of the places are in the last block; no block has ever had more than `most`.
    """

    __slots__ = ("blocks", "latest", "most", "places")

    def __init__(self) -> None:
        self.places, self.blocks = array("i"), array("i")
        self.latest = self.most = 0

    def copy(self) -> "_Posting":
        """Places of its own."""
        other = _Posting()
        other.places, other.blocks = self.places[:], self.blocks[:]
        other.latest, other.most = self.latest, self.most
        return other


class _Term(NamedTuple):
    """A term of the query in the archive: places `low` to `high` of its posting, blocks, inverse document frequency."""

    posting: _Posting
    low: int
    high: int
    blocks: int
    idf: float

    @property
    def places(self) -> np.ndarray:
        """``(places,)``, int32, ascending; a view, which must be gone before tokens are added."""
        return np.frombuffer(self.posting.places, dtype=np.int32)[self.low : self.high]


class LexicalIndex(Index):
    """Places of every token id, ascending.

    A token costs as much late in a stream as early. Taking it in appends to two arrays, and giving it up lets a few ids
    be looked through for places that are gone. A query looks at the postings of its rarest terms alone: without one of
    them a block cannot reach ``query.least``, and of the others only those blocks are looked up.
    """

    def __init__(self, chooser: "Lexical"):
        self.chooser = chooser
        self.postings: dict[int, _Posting] = {}
        self._first: int | None = None  # tokens before this one are gone
        self._sweep: Iterator[int] = iter(())

    def add(self, evicted: Evicted) -> None:
        """Note where the ids are."""
        postings, block = self.postings, self.chooser.block
        self._first = evicted.first if self._first is None else self._first
        for index, token in enumerate(evicted.ids, evicted.first):
            posting = postings.get(token)
            if posting is None:
                posting = postings[token] = _Posting()
            posting.places.append(index)
            number = index // block
            if not posting.blocks or posting.blocks[-1] != number:
                posting.blocks.append(number)
                posting.latest = 0
            posting.latest += 1
            if posting.latest > posting.most:
                posting.most = posting.latest

    def forget(self, before: int) -> None:
        """Drop places that are gone, of a few ids for every token that has left; the next calls come to the others."""
        gone = 0 if self._first is None else before - self._first
        if gone <= 0:
            return
        self._first = before
        for _ in range(min(SWEPT * gone, len(self.postings))):
            token = next(self._sweep, None)
            if token is None:
                self._sweep = iter(list(self.postings))
            elif token in self.postings:
                self._trim(token, before)

    def _trim(self, token: int, before: int) -> None:
        places, blocks = self.postings[token].places, self.postings[token].blocks
        if places[-1] < before:
            del self.postings[token]
        elif places[0] < before:
            del places[: bisect_left(places, before)]
            del blocks[: bisect_left(blocks, places[0] // self.chooser.block)]

    def scores(self, query: Query) -> np.ndarray:
        """The largest of three scores of a block, each in units of its own level: shared terms, words in a row, a run.

        Shared terms: the sum over the rare terms of the query of idf to a power, times their saturated count in the
        block. Words in a row: the sum of the idf of the latest tokens that stand in the archive at the same distances
        from each other as in the query; it counts for the block in which the text would go on. A run: the same, but
        without a gap, and common terms count too. A brief query is answered by runs alone.
        """
        chooser, blocks = self.chooser, query.blocks(self.chooser.block)
        found, total = np.zeros(len(blocks)), len(blocks)
        once = math.log1p((total - 0.5) / 1.5)  # idf of a term that is in one block
        if not query.asked:
            level = chooser.run_level * once
            self._note(found, query, *self._runs(query, total, query.least * level), level)
        if query.brief:
            return found
        terms = {token: term for token in dict.fromkeys(query.ids) if (term := self._term(token, query, total))}
        most = max(FEW_BLOCKS, chooser.rare * total)
        level = chooser.level * once**chooser.idf_power
        numbers, score = self._shared([t for t in terms.values() if t.blocks <= most], query.least * level)
        np.maximum.at(found, numbers - blocks.start, score / level)
        if not query.asked:
            most, level = max(FEW_BLOCKS, chooser.row_rare * total), chooser.row_level * once
            latest = reversed(query.ids[max(0, len(query.ids) - chooser.row_tokens) :])
            row = [(terms[token], back) for back, token in enumerate(latest, 1) if token in terms]
            goes_on, score = _in_a_row([(t, back) for t, back in row if t.blocks <= most], query.least * level)
            self._note(found, query, goes_on, score, level)
        return found

    def _note(self, found: np.ndarray, query: Query, goes_on: np.ndarray, score: np.ndarray, level: float) -> None:
        """Put scores of places at which the text would go on into those of their blocks."""
        inside, block = goes_on < query.end, self.chooser.block
        np.maximum.at(found, goes_on[inside] // block - query.first // block, score[inside] / level)

    def _runs(self, query: Query, total: int, needed: float) -> tuple[np.ndarray, np.ndarray]:
        """Where the latest tokens stand without a gap: the places at which the text goes on, and the sums of idf.

        A run that reaches `needed` holds all of the latest terms whose idf add up to it. So the places of the rarest of
        these are looked up among those of the others.
        """
        latest, held = query.ids[::-1][: self.chooser.row_tokens], list[_Term]()
        sure = 0.0
        for token in latest:
            term = self._term(token, query, total)
            if term is None:
                break
            held.append(term)
            sure += term.idf
            if sure >= needed - ROUNDING:
                break
        if not held or sure < needed - ROUNDING:
            return NONE, NONE
        rarest = min(range(len(held)), key=lambda i: held[i].high - held[i].low)
        goes_on = held[rarest].places.astype(np.int64) + rarest + 1
        for back, term in enumerate(held, 1):
            if back != rarest + 1:
                goes_on = goes_on[_stands(term, goes_on - back)]
            if not len(goes_on):
                return NONE, NONE
        score, going = np.full(len(goes_on), sure), np.ones(len(goes_on), dtype=bool)
        for back, token in enumerate(latest[len(held) :], len(held) + 1):
            term = self._term(token, query, total)
            if term is None:
                break
            going &= _stands(term, goes_on - back)
            if not going.any():
                break
            score[going] += term.idf
        return goes_on, score

    def _term(self, token: int, query: Query, total: int) -> _Term | None:
        """A term of the query; None if the archive does not hold it."""
        posting = self.postings.get(token)
        if posting is None:
            return None
        places, block = posting.places, self.chooser.block
        low, high = bisect_left(places, query.first), bisect_left(places, query.end)
        if low == high:
            return None
        first = bisect_left(posting.blocks, places[low] // block)
        blocks = bisect_left(posting.blocks, places[high - 1] // block, first) + 1 - first
        return _Term(posting, low, high, blocks, math.log1p((total - blocks + 0.5) / (blocks + 0.5)))

    def _shared(self, terms: list[_Term], needed: float) -> tuple[np.ndarray, np.ndarray]:
        """Blocks that can reach `needed` by the terms that they share with the query: numbers and scores."""
        block, power = self.chooser.block, self.chooser.idf_power
        bounds = [term.idf**power * _saturated(term.posting.most) for term in terms]
        order, rare = _rarest(bounds, needed)
        if not rare:
            return NONE, NONE
        weights = np.array([terms[i].idf ** power for i in order])
        keys = [terms[i].places // block * np.int64(rare) + n for n, i in enumerate(order[:rare])]
        pairs, counts = np.unique(np.concatenate(keys), return_counts=True)
        numbers, score = _sums(pairs // rare, weights[pairs % rare] * _saturated(counts))
        rest = sum(bounds[i] for i in order[rare:])
        for n, i in enumerate(order[rare:], rare):
            numbers, score = _able(numbers, score, needed - rest)
            if not len(numbers):
                break
            places, begin = terms[i].places, (numbers * block).astype(np.int32)  # a search converts neither
            score += weights[n] * _saturated(places.searchsorted(begin + np.int32(block)) - places.searchsorted(begin))
            rest -= bounds[i]
        return numbers, score

    def copy(self) -> Self:
        """Places of its own."""
        other = copy.copy(self)
        other.postings = {token: posting.copy() for token, posting in self.postings.items()}
        other._sweep = iter(())
        return other


def _saturated(count: Any) -> Any:
    """The weight of a term that is in a block so many times."""
    return count * (1 + SATURATION) / (count + SATURATION)


def _rarest(bounds: list[float], needed: float) -> tuple[list[int], int]:
    """Terms by what they can add to a score, the largest first, and how many of them a score must have one of.

    The others together add less than `needed`; 0 terms: all together do.
    """
    order = sorted(range(len(bounds)), key=lambda i: -bounds[i])
    rest, rare = 0.0, len(order)
    while rare and (rest := rest + bounds[order[rare - 1]]) < needed - ROUNDING:
        rare -= 1
    return order, rare


def _in_a_row(row: list[tuple[_Term, int]], needed: float) -> tuple[np.ndarray, np.ndarray]:
    """Where the text goes on, and the sum of idf there, of all places that can reach `needed`.

    Parameters
    ----------
    row : list of (term, int)
        And how many tokens before the next one it stands.
    """
    order, rare = _rarest([term.idf for term, _ in row], needed)
    if not rare:
        return NONE, NONE
    keys = [(row[i][0].places + row[i][1]) * np.int64(rare) + n for n, i in enumerate(order[:rare])]
    pairs, weights = np.sort(np.concatenate(keys)), np.array([row[i][0].idf for i in order])
    goes_on, score = _sums(pairs // rare, weights[pairs % rare])
    rest = sum(row[i][0].idf for i in order[rare:])
    for term, back in (row[i] for i in order[rare:]):
        goes_on, score = _able(goes_on, score, needed - rest)
        if not len(goes_on):
            break
        score += term.idf * _stands(term, goes_on - back)
        rest -= term.idf
    return goes_on, score


def _stands(term: _Term, indices: np.ndarray) -> np.ndarray:
    """Whether a term stands at each index of the archive: ``(indices,)``, bool."""
    places, wanted = term.places, indices.astype(np.int32)  # a search converts neither
    return places[np.minimum(places.searchsorted(wanted), len(places) - 1)] == wanted


def _able(numbers: np.ndarray, score: np.ndarray, needed: float) -> tuple[np.ndarray, np.ndarray]:
    """Those whose score is not below `needed`, but for rounding."""
    able = score >= needed - ROUNDING
    return numbers[able], score[able]


def _sums(numbers: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each of the ascending numbers once, and the sum of its weights."""
    first = np.flatnonzero(np.diff(numbers, prepend=-1))
    return numbers[first], np.add.reduceat(weights, first)


@CHOOSERS.register("lexical")
@dataclass(frozen=True)
class Lexical(Chooser):
    """Blocks that share rare token ids with the query, or in which the latest tokens stand in a row.

    An inverted index on the host: no byte on the device. Source: BM25 (Robertson and Zaragoza, 2009), with the idf to a
    power of 2 and without common terms: without the two, blocks of common words outrank the statement. Words in a row:
    prompt lookup, by weight instead of an exact match. Runs: prompt lookup, by weight instead of a length.
    """

    foresees: ClassVar[bool] = True

    rare: float = option(0.03, "a term in a larger share of the blocks is not shared", minimum=0.0, maximum=1.0)
    idf_power: float = option(2.0, "power of the inverse document frequency of shared terms", minimum=0.0)
    level: float = option(3.6, "shared terms that open the gate, in terms that are in one block", minimum=1e-9)
    row_tokens: int = option(16, "latest tokens that are looked for in a row", minimum=0)
    row_rare: float = option(0.1, "a term in a larger share of the blocks is in no row", minimum=0.0, maximum=1.0)
    row_level: float = option(3.4, "terms in a row that open the gate, in terms that are in one block", minimum=1e-9)
    run_level: float = option(3.0, "the same of terms in a row without a gap", minimum=1e-9)

    def start(self) -> LexicalIndex:
        """No places."""
        return LexicalIndex(self)
