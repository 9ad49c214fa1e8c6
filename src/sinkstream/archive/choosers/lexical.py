"""Lexical chooser: an inverted index of token ids on the host."""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from sinkstream.archive.choosers.base import CHOOSERS, Chooser, Evicted, Hits, Index, Query
from sinkstream.archive.choosers.longest import ROUNDING, Find, LongestRun
from sinkstream.archive.choosers.postings import (
    Postings,
    Term,
    joined_counts,
    joined_numbers,
    joined_places,
    stands,
)
from sinkstream.archive.choosers.trigrams import Trigrams
from sinkstream.policies.options import option

SATURATION = 1.2  # of the count of a term in a block, as in BM25
FEW_BLOCKS = 2  # a term in so few blocks is rare, however small the archive is
JOINED = 512  # the most blocks, or places, of terms that are looked at in one go
SINGLY = 8  # the most places of a run that are compared one by one, without an array
SWEPT = 4  # ids whose postings are looked through for every token that leaves the archive
NONE = np.zeros(0, dtype=np.int32)
NOTHING = Hits(NONE, np.zeros(0))


class LexicalIndex(Index):
    """Places of every token id, ascending.

    A token costs as much late in a stream as early. Taking it in appends to three arrays, and giving it up lets a few
    ids be looked through for places that are gone. A query looks at the postings of its rarest terms alone: without one
    of them a block cannot reach ``query.least``, and of the others only those blocks are looked up. Of other blocks
    nothing is written.
    """

    def __init__(self, chooser: "Lexical"):
        self.chooser = chooser
        self.postings = Postings(chooser.block)
        self.trigrams, self._longest = Trigrams(), LongestRun(chooser.row_tokens)
        self._known: tuple[tuple[int, int], dict[int, Term | None]] | None = None  # of the latest archive
        self._first: int | None = None  # tokens before this one are gone
        self._sweep: Iterator[int] = iter(())

    def add(self, evicted: Evicted) -> None:
        """Note where the ids are."""
        self._first = evicted.first if self._first is None else self._first
        self._known = None
        self.postings.add(evicted.first, evicted.ids)
        self.trigrams.add(evicted.first, evicted.ids)

    def forget(self, before: int) -> None:
        """Drop places that are gone, of a few ids for every token that has left; the next calls come to the others."""
        held, gone = self.postings.held, 0 if self._first is None else before - self._first
        if gone <= 0:
            return
        self._first, self._known = before, None
        self.trigrams.forget(before)
        for _ in range(min(SWEPT * gone, len(held))):
            token = next(self._sweep, None)
            if token is None:
                self._sweep = iter(list(held))
            elif token in held:
                self.postings.trim(token, before)

    def scores(self, query: Query) -> np.ndarray:
        """As `hits`; of the other blocks 0."""
        blocks = query.blocks(self.chooser.block)
        numbers, found = self.hits(query, blocks)
        scores = np.zeros(len(blocks))
        scores[numbers - blocks.start] = found
        return scores

    def hits(self, query: Query, blocks: range) -> Hits:
        """The largest of three scores of a block, each in units of its own level: shared terms, words in a row, a run.

        Shared terms: the sum over the rare terms of the query of idf to a power, times their saturated count in the
        block. Words in a row: the sum of the idf of the latest tokens that stand in the archive at the same distances
        from each other as in the query; it counts for the block in which the text would go on. A run: the same, but
        without a gap, and common terms count too. A brief query is answered by runs alone.
        """
        chooser, total, found = self.chooser, len(blocks), list[Hits]()
        once = math.log1p((total - 0.5) / 1.5)  # idf of a term that is in one block
        find = self._find(query.first, query.end, total)
        if not query.asked:
            level = chooser.run_level * once
            runs = self._carried_runs(query, total, query.least * level, find)
            if len(runs[0]):
                found.append(self._blocks(query, runs, level))
        if query.brief:
            return _best(found) if found else NOTHING
        most, in_row = (max(FEW_BLOCKS, share * total) for share in (chooser.rare, chooser.row_rare))
        known = {token: find(token) for token in query.ids}
        terms = {token: term for token, term in known.items() if term and term.blocks <= max(most, in_row)}
        level = chooser.level * once**chooser.idf_power
        numbers, score = self._shared([t for t in terms.values() if t.blocks <= most], query.least * level)
        found.append(Hits(numbers, score / level))
        if not query.asked:
            level = chooser.row_level * once
            latest = reversed(query.ids[max(0, len(query.ids) - chooser.row_tokens) :])
            row = [(terms[token], back) for back, token in enumerate(latest, 1) if token in terms]
            goes_on = _in_a_row([(t, back) for t, back in row if t.blocks <= in_row], query.least * level)
            found.append(self._blocks(query, goes_on, level))
        return _best(found)

    def may_hit(self, latest: Sequence[int], least: float) -> bool:
        """Whether the latest tokens may stand in the archive in a row that is long enough."""
        if least * self.chooser.run_level <= 2 + ROUNDING:  # no idf is above that of a term in one block
            return True
        return len(latest) > 2 and self.trigrams.has(*latest[-3:])

    def _blocks(self, query: Query, found: tuple[np.ndarray, np.ndarray], level: float) -> Hits:
        """The blocks of ascending places at which the text would go on, and their scores in units of a level."""
        goes_on, score = found
        inside = int(goes_on.searchsorted(query.end))
        return Hits(goes_on[:inside] // self.chooser.block, score[:inside] / level)

    def _carried_runs(self, query: Query, total: int, needed: float, find: Find) -> tuple[np.ndarray, np.ndarray]:
        """As `_runs`; what the queries before have shown is not looked up again."""
        if needed <= ROUNDING:  # every token would be a run
            return self._runs(query, needed, find)
        if not self._longest.may_reach(query, total, needed, find, self.trigrams.has):
            return NONE, NONE
        found = self._runs(query, needed, find)
        if not len(found[0]):
            self._longest.missed(total, needed, find)
        return found

    def prepare(self, query: Query) -> None:
        """Answer it: all terms but one are looked up then, the longest run is carried, and code and postings are near.

        What the host has not touched for a millisecond takes two to three times as long.
        """
        self.hits(query, query.blocks(self.chooser.block))

    def _find(self, first: int, end: int, total: int) -> Find:
        """The term of an id in an archive, which is looked up once as long as the archive is the same."""
        if self._known is None or self._known[0] != (first, end):
            self._known = (first, end), {}
        term, known = self.postings.term, self._known[1]

        def find(token: int) -> Term | None:
            if token not in known:
                known[token] = term(token, first, end, total)
            return known[token]

        return find

    def _runs(self, query: Query, needed: float, find: Find) -> tuple[np.ndarray, np.ndarray]:
        """Where the latest tokens stand without a gap: the places at which the text goes on, and the sums of idf.

        A run that reaches `needed` holds all of the latest terms whose idf add up to it. So the places of the rarest of
        these are looked up among those of the others.
        """
        latest, held = query.ids[::-1][: self.chooser.row_tokens], list[Term]()
        sure = 0.0
        for i, token in enumerate(latest):
            if i > 1 and not self.trigrams.has(token, latest[i - 1], latest[i - 2]):
                return NONE, NONE
            term = find(token)
            if term is None:
                break
            held.append(term)
            sure += term.idf
            if sure >= needed - ROUNDING:
                break
        if not held or sure < needed - ROUNDING:
            return NONE, NONE
        fewest = sorted(range(len(held)), key=lambda i: held[i].high - held[i].low)
        rarest = held[fewest[0]]
        if rarest.high - rarest.low <= SINGLY:
            return _few_runs(held, fewest, sure, latest, find)
        goes_on = rarest.places + np.int32(fewest[0] + 1)
        for i in fewest[1:]:
            goes_on = goes_on[stands(held[i], goes_on - np.int32(i + 1))]
            if not len(goes_on):
                return NONE, NONE
        score, going = np.full(len(goes_on), sure), np.ones(len(goes_on), dtype=bool)
        for back, token in enumerate(latest[len(held) :], len(held) + 1):
            term = find(token)
            if term is None:
                break
            going &= stands(term, goes_on - np.int32(back))
            longer = np.count_nonzero(going)
            if not longer:
                break
            if longer == len(going):  # as a rule, and without an index
                score += term.idf
            else:
                score[going] += term.idf
        return goes_on, score

    def _shared(self, terms: list[Term], needed: float) -> tuple[np.ndarray, np.ndarray]:
        """Blocks that can reach `needed` by the terms that they share with the query: numbers and scores."""
        block, power = self.chooser.block, self.chooser.idf_power
        weights = [term.idf**power for term in terms]
        bounds = [weight * _saturated(term.most) for weight, term in zip(weights, terms)]
        order, rare = _rarest(bounds, needed)
        if not rare:
            return NONE, NONE
        rare, sizes = _in_one_go([terms[i].blocks for i in order], rare)
        first = [terms[i] for i in order[:rare]]
        weight = np.repeat([weights[i] for i in order[:rare]], sizes)
        numbers, score = _each(joined_numbers(first), weight * _saturated(joined_counts(first, block)), np.add)
        rest = sum(bounds[i] for i in order[rare:])
        for i in order[rare:]:
            numbers, score = _able(numbers, score, needed - rest)
            if not len(numbers):
                break
            held = terms[i].numbers
            place = held.searchsorted(numbers)
            there = (held.take(place, mode="clip") == numbers).nonzero()[0]
            if len(there):  # as a rule none of the blocks has the term
                score[there] += weights[i] * _saturated(terms[i].counts(block)[place[there]])
            rest -= bounds[i]
        return _able(numbers, score, needed)

    def copy(self) -> Self:
        """Places of its own."""
        other = copy.copy(self)
        other.postings = self.postings.copy()
        other.trigrams, other._longest = self.trigrams.copy(), LongestRun(self.chooser.row_tokens)
        other._sweep, other._known = iter(()), None
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


def _in_a_row(row: list[tuple[Term, int]], needed: float) -> tuple[np.ndarray, np.ndarray]:
    """Where the text goes on, and the sum of idf there, of all places that can reach `needed`.

    Parameters
    ----------
    row : list of (term, int)
        And how many tokens before the next one it stands.
    """
    order, rare = _rarest([term.idf for term, _ in row], needed)
    if not rare:
        return NONE, NONE
    ordered = [row[i] for i in order]
    rare, sizes = _in_one_go([term.high - term.low for term, _ in ordered], rare)
    first = [term for term, _ in ordered[:rare]]
    goes_on = joined_places(first) + np.repeat(np.array([back for _, back in ordered[:rare]], dtype=np.int32), sizes)
    goes_on, score = _each(goes_on, np.repeat([term.idf for term in first], sizes), np.add)
    rest = sum(term.idf for term, _ in ordered[rare:])
    for term, back in ordered[rare:]:
        goes_on, score = _able(goes_on, score, needed - rest)
        if not len(goes_on):
            break
        score += term.idf * stands(term, goes_on - np.int32(back))
        rest -= term.idf
    return _able(goes_on, score, needed)


def _in_one_go(sizes: list[int], rare: int) -> tuple[int, list[int]]:
    """How many terms, at least `rare`, to look at in one go where that is little to look at, and their sizes."""
    total = sum(sizes[:rare])
    while rare < len(sizes) and total + sizes[rare] <= JOINED:
        total += sizes[rare]
        rare += 1
    return rare, sizes[:rare]


def _few_runs(
    held: list[Term], fewest: list[int], sure: float, latest: Sequence[int], find: Find
) -> tuple[np.ndarray, np.ndarray]:
    """As `_runs`, where the rarest of the terms `held`, which add up to `sure`, has few places: one by one."""
    rarest, score = held[fewest[0]], list[float]()
    goes_on = [place + fewest[0] + 1 for place in rarest.places.tolist()]
    for i in fewest[1:]:
        goes_on = [place for place in goes_on if held[i].stands_at(place - i - 1)]
    for place in goes_on:
        total = sure
        for back, token in enumerate(latest[len(held) :], len(held) + 1):
            term = find(token)
            if term is None or not term.stands_at(place - back):
                break
            total += term.idf
        score.append(total)
    return (np.array(goes_on, dtype=np.int32), np.array(score)) if goes_on else (NONE, NONE)


def _able(numbers: np.ndarray, score: np.ndarray, needed: float) -> tuple[np.ndarray, np.ndarray]:
    """Those whose score is not below `needed`, but for rounding."""
    able = score >= needed - ROUNDING
    return (numbers, score) if np.count_nonzero(able) == len(able) else (numbers[able], score[able])


def _best(found: list[Hits]) -> Hits:
    """Each block once, ascending, and the largest of its scores."""
    some = [hits for hits in found if len(hits.blocks)]
    if not some:
        return NOTHING
    return _each(np.concatenate([h.blocks for h in some]), np.concatenate([h.scores for h in some]), np.maximum)


def _each(joined: np.ndarray, values: np.ndarray, reduce: np.ufunc) -> Hits:
    """Each number of several ascending lists once, ascending, and its values, which are reduced list by list."""
    if not len(joined):
        return Hits(NONE, values)
    order = joined.argsort(kind="stable")
    joined, new = joined[order], np.ones(len(joined), dtype=bool)
    np.not_equal(joined[1:], joined[:-1], out=new[1:])
    first = new.nonzero()[0]
    return Hits(joined[first], reduce.reduceat(values[order], first))


@CHOOSERS.register("lexical")
@dataclass(frozen=True)
class Lexical(Chooser):
    """Blocks that share rare token ids with the query, or in which the latest tokens stand in a row.

    An inverted index on the host: no byte on the device. Source: BM25 (Robertson and Zaragoza, 2009), with the idf to a
    power of 2 and without common terms: without the two, blocks of common words outrank the statement. Words in a row:
    prompt lookup, by weight instead of an exact match. Runs: prompt lookup, by weight instead of a length.
    """

    foresees: ClassVar[bool] = True
    alarms: ClassVar[int] = 4

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
