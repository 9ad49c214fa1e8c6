"""What a lexical index carries from query to query, and what it looks at in one go: the hits are the same."""

from dataclasses import replace

import numpy as np
import pytest

from sinkstream.archive import Evicted, Query
from sinkstream.archive.choosers import lexical
from sinkstream.archive.choosers.lexical import Lexical, LexicalIndex
from sinkstream.archive.choosers.longest import LongestRun

LEVELS = {"block": 4, "run_level": 3.0, "row_tokens": 12}


def phrases(tokens: int, seed: int = 0) -> list[int]:
    """A text that repeats itself: few phrases of 2 to 12 tokens in any order, single tokens between them."""
    rng, ids = np.random.default_rng(seed), list[int]()
    held = [rng.integers(0, 60, rng.integers(2, 13)).tolist() for _ in range(25)]
    while len(ids) < tokens:
        ids += held[min(24, int(rng.zipf(1.4)) - 1)]
        ids += rng.integers(0, 200, int(rng.random() < 0.5)).tolist()
    return ids[:tokens]


class Plain(LexicalIndex):
    """Looks every run up."""

    def _carried_runs(self, query, total, needed, find):
        return self._runs(query, needed, find)


class Counting(LongestRun):
    """Counts the queries for which places are looked up."""

    looked = 0

    def _look_up(self, *args):
        self.looked += 1
        super()._look_up(*args)


class TooShort(LongestRun):
    """The control: a run that does not become longer with its text."""

    def _follow(self, *args):
        before = self._bound
        super()._follow(*args)
        self._bound = min(self._bound, before) if before else self._bound


def stream(index, plain, *, seed: int, window: int = 30, held: int | None = None, rewinds: bool = True):
    """Queries along a stream: gaps between them, leaps of the archive, tokens that are lost, tokens taken back.

    Gives the hits of both indices, what was needed of them, and whether the query was brief.
    """
    rng, ids, first, done = np.random.default_rng(seed), phrases(3_000, seed), 2, 2
    now, least = 60, 0.0
    while now < 3_000:
        end = now - window - int(rng.integers(0, 6)) * int(rng.random() < 0.1)  # an archive may lag
        if end > done:
            for one in (index, plain):
                one.add(Evicted(done, ids[done:end]))
            done = end
        if held is not None and end - first > held + 64:
            first = end - held
            for one in (index, plain):
                one.forget(first)
        if rng.random() < 0.05:
            least = float(rng.choice([0.0, 0.2, 0.6, 1.0, 1.3, 2.0]))
        for brief in (True, False) if now % 8 == 0 else (True,):
            asked = Query(now=now, ids=ids[now - 32 : now], asked=False, first=first, end=end, least=least, brief=brief)
            blocks = asked.blocks(4)
            yield index.hits(asked, blocks), plain.hits(asked, blocks), least, brief
        if rewinds and rng.random() < 0.02 and now > 200:  # other tokens than before come then
            back = int(rng.integers(1, 12))
            now -= back
            ids[now : now + back] = phrases(back, int(rng.integers(1 << 30)))
        now += 1 if rng.random() < 0.9 else int(rng.integers(1, 20))


@pytest.mark.parametrize("held", [None, 700])
@pytest.mark.parametrize("seed", range(4))
def test_the_hits_are_those_of_runs_that_are_looked_up_anew(seed, held):
    index, plain = Lexical(**LEVELS).start(), Plain(Lexical(**LEVELS))
    index._longest = Counting(LEVELS["row_tokens"])
    queries = opened = 0
    for found, wanted, least, brief in stream(index, plain, seed=seed, held=held):
        assert np.array_equal(found.blocks, wanted.blocks) and np.array_equal(found.scores, wanted.scores)
        if brief and least > 0:
            queries, opened = queries + 1, opened + (wanted.best >= least)
    assert queries / 50 < opened < queries / 2, "most runs are too short, and some are not"
    assert index._longest.looked < queries / 2


def test_a_run_that_is_not_carried_right_loses_hits():
    index, plain = Lexical(**LEVELS).start(), Plain(Lexical(**LEVELS))
    index._longest = TooShort(LEVELS["row_tokens"])
    lost = sum(len(found.blocks) < len(wanted.blocks) for found, wanted, *_ in stream(index, plain, seed=0))
    assert lost > 10


def test_a_copy_goes_on_by_itself():
    index, plain = Lexical(**LEVELS).start(), Plain(Lexical(**LEVELS))
    for n, _ in enumerate(stream(index, plain, seed=1, rewinds=False)):
        if n == 1_500:
            index = index.copy()
            break
    ids = phrases(3_000, 9)
    for one in (index, plain):
        one.add(Evicted(5_000, ids))
    for now in range(5_100, 6_100):
        asked = Query(now=now, ids=ids[now - 5_032 : now - 5_000], asked=False, first=5_000, end=now - 30, least=0.6)
        found, wanted = (one.hits(asked, asked.blocks(4)) for one in (index, plain))
        assert np.array_equal(found.blocks, wanted.blocks) and np.array_equal(found.scores, wanted.scores)


class Rehearsed(Plain):
    """Is asked before every full query what the token before would ask."""

    rehearsed = 0

    def hits(self, query, blocks):
        if not query.brief and not self.rehearsed:
            self.rehearsed = 1
            self.prepare(replace(query, now=query.now - 1, ids=query.ids[:-1]))
            self.rehearsed = 0
        return super().hits(query, blocks)


@pytest.mark.parametrize("held", [None, 700])
def test_a_rehearsal_changes_no_hit(held):
    index, plain, full = Rehearsed(Lexical(**LEVELS)), Plain(Lexical(**LEVELS)), 0
    for found, wanted, _, brief in stream(index, plain, seed=2, held=held):
        assert np.array_equal(found.blocks, wanted.blocks) and np.array_equal(found.scores, wanted.scores)
        full += not brief and len(found.blocks) > 0
    assert full > 50


def test_a_rehearsal_leaves_the_last_term_to_look_up():
    index, looked = Lexical(**LEVELS).start(), list[int]()
    index.add(Evicted(0, phrases(400)))
    term = index.postings.term
    index.postings.term = lambda token, *more: looked.append(token) or term(token, *more)  # type: ignore[method-assign]
    query = Query(now=500, ids=[*range(31), 150], asked=False, first=0, end=400)
    index.prepare(replace(query, now=499, ids=query.ids[:-1]))
    assert sorted(looked) == list(range(31))
    index.hits(query, query.blocks(4))
    assert looked[31:] == [150], "the others are known"


@pytest.mark.parametrize("keeps", [False, True])
def test_terms_are_looked_up_anew_once_their_postings_were_cut(keeps):
    """The control keeps them: their places lie elsewhere then."""
    ids = phrases(2_000)
    index, anew = (Lexical(**LEVELS, rare=0.5).start() for _ in range(2))
    for one in (index, anew):
        one.add(Evicted(0, ids))
    query = Query(now=2_040, ids=ids[1_940:1_972], asked=True, first=1_500, end=2_000)
    before, known = index.hits(query, query.blocks(4)), index._known
    for one in (index, anew):
        one.forget(1_500)
    index._known = known if keeps else index._known
    wanted = anew.hits(query, query.blocks(4))
    assert len(wanted.blocks) > 20 and np.array_equal(before.blocks, wanted.blocks)
    try:
        found = index.hits(query, query.blocks(4))
        same = np.array_equal(found.blocks, wanted.blocks) and np.array_equal(found.scores, wanted.scores)
    except (ValueError, IndexError):  # there are not so many places any more
        same = False
    assert same == (not keeps)


def test_hits_are_the_same_however_many_terms_are_looked_at_in_one_go(monkeypatch):
    """All terms at once and every run by itself, or as few terms and as few runs as possible that way."""
    few, found, counts = lexical._few_runs, list[list](), list[int]()

    def counted(*args):
        counts[-1] += 1
        return few(*args)

    monkeypatch.setattr(lexical, "_few_runs", counted)
    for most in (0, 1_000_000):
        monkeypatch.setattr(lexical, "JOINED", most)
        monkeypatch.setattr(lexical, "SINGLY", most)
        counts.append(0)
        index, plain = Lexical(**LEVELS).start(), Plain(Lexical(**LEVELS))
        found.append([hits for hits, *_ in stream(index, plain, seed=3, held=700)])
    assert counts[0] == 0 and counts[1] > 100
    for one, other in zip(*found, strict=True):
        assert np.array_equal(one.blocks, other.blocks)
        np.testing.assert_allclose(one.scores, other.scores, rtol=0, atol=1e-12)
    assert sum(len(hits.blocks) > 0 for hits in found[0]) > 200
