"""The longest run that is carried from token to token: the same hits as if every run were looked up anew."""

import numpy as np
import pytest

from sinkstream.archive import Evicted, Query
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
