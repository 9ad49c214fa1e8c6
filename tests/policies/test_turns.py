"""Whole turns: what leaves is a turn, all of it; schedule, cache and engine agree with the oracle."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle.forward import run
from oracle.models import build, token_ids
from oracle.network import Network
from oracle.rules import Rule, simulate
from streams import TOLERANCE, feed, make_cache, nll_of, odd_sizes, rounding_bound

from sinkstream.engine import Engine
from sinkstream.policies import EvictionPolicy, PruneSchedule

TOKENS = 250
LENGTHS = (9, 14, 6, 30, 11, 8, 60, 5, 5, 12, 17, 9, 41, 10, 7, 19)  # of turns; 30 slots are the window of the tests
OPTIONS = {"sink": 4, "window": 30, "evict": "turns"}


def begins(lengths, first: int = 4) -> list[int]:
    """Indices of the tokens at which turns of these lengths begin, one after the other."""
    found = [first]
    for length in lengths:
        found.append(found[-1] + length)
    return found


def schedule_of(turns: list[int], **options) -> PruneSchedule:
    schedule = PruneSchedule(EvictionPolicy.build(evict="turns", **options))
    for turn in turns:
        schedule.begin_turn(turn)
    return schedule


@given(st.integers(0, 5), st.integers(1, 40), st.lists(st.integers(1, 60), max_size=30))
def test_the_schedule_agrees_with_the_oracle(sink, window, lengths):
    turns = begins(lengths, sink)
    schedule = schedule_of(turns, sink=sink, window=window)
    for want in simulate(Rule(sink, window, turns=frozenset(turns)), TOKENS):
        step = schedule.step()
        assert (step.drop, step.event, step.visible) == (want.drop_size, want.event, len(want.visible[None]))


@given(st.lists(st.integers(1, 60), max_size=20), st.lists(st.integers(1, 90), min_size=1, max_size=6))
def test_tokens_that_are_counted_at_once_are_those_counted_one_by_one(lengths, parts):
    one_by_one, at_once = (schedule_of(begins(lengths), sink=4, window=30) for _ in range(2))
    for part in parts:
        assert at_once.advance(part) == [one_by_one.step() for _ in range(part)]
        assert (at_once.seen, at_once.cached, at_once.oldest) == (one_by_one.seen, one_by_one.cached, one_by_one.oldest)


def test_turns_leave_whole_and_a_long_one_leaves_token_by_token():
    # sink 2, window 8: turns of 3, 4 and 5 tokens, then one of 20
    schedule = schedule_of(begins((3, 4, 5, 20), 2), sink=2, window=8)
    drops = [schedule.step().drop for _ in range(34)]
    assert {t: d for t, d in enumerate(drops[:24]) if d} == {10: 3, 13: 4, 17: 5, 22: 1, 23: 1}
    assert drops[22:34] == [1] * 12


def test_without_turns_eviction_is_strict():
    turns, strict = (
        PruneSchedule(EvictionPolicy.build(**OPTIONS)),
        PruneSchedule(EvictionPolicy.build(sink=4, window=30)),
    )
    assert [turns.step() for _ in range(90)] == [strict.step() for _ in range(90)]


@pytest.mark.parametrize(
    "more",
    [
        {"refresh": 3, "scorer": "uniform"},
        {"overlap": 2},
        {"max_drop": 4},
        {"compress_every": 4},
        {"slack": 3},
        {"evict": "pages"},
    ],
)
def test_what_does_not_go_with_turns_is_refused(more):
    with pytest.raises(ValueError, match="evict="):
        EvictionPolicy.build(**{"sink": 4, "window": 30, "evict": "turns"} | more)


def test_turns_are_told_in_order_and_ahead_of_their_tokens():
    schedule = schedule_of([4, 20], **{k: v for k, v in OPTIONS.items() if k != "evict"})
    with pytest.raises(ValueError, match="token 20"):
        schedule.begin_turn(20)
    for _ in range(30):
        schedule.step()
    with pytest.raises(ValueError, match="30 tokens have been appended"):
        schedule.begin_turn(29)


@given(st.lists(st.integers(1, 25), min_size=3, max_size=9), st.integers(0, 30), st.integers(0, 25))
def test_a_schedule_that_was_rewound_goes_on_as_if_nothing_had_come(lengths, tokens, back):
    turns = [t for t in begins(lengths) if t < tokens]
    plain, rewound = (schedule_of(turns, sink=4, window=30) for _ in range(2))
    for _ in range(tokens):
        plain.step(), rewound.step()
    for _ in range(min(back, 34 - tokens)):  # as long as nothing is evicted
        rewound.step()
    rewound.rewind(min(back, 34 - tokens))
    rewound.begin_turn(tokens + 1), plain.begin_turn(tokens + 1)
    assert [rewound.step() for _ in range(80)] == [plain.step() for _ in range(80)]


@pytest.mark.parametrize("positions", ["cache", "original"])
def test_the_cache_agrees_with_the_oracle(positions):
    model, ids, turns = build("llama"), token_ids(TOKENS), begins(LENGTHS)
    rule = Rule(4, 30, turns=frozenset(turns))
    expected = run(Network(model), ids, rule, positions=positions)
    strict = run(Network(model), ids, Rule(4, 30), positions=positions)
    assert sum(step.drop_size > 1 for step in expected.steps) > 5
    for sizes in (odd_sizes(), ()):
        cache = make_cache(model, OPTIONS, positions=positions)
        for turn in turns:
            cache.stream.begin_turn(turn)
        logits = feed(model, cache, ids[None], sizes)
        assert (nll_of(logits, ids[None])[0] - expected.nll).abs().max() < TOLERANCE
    assert (strict.nll - expected.nll).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("backend", ["ring", "kernels"])
def test_the_engine_agrees_with_the_oracle_fed_turn_by_turn(backend, tmp_path):
    model, ids, turns = build("llama"), token_ids(TOKENS), [t for t in begins(LENGTHS) if t < TOKENS]
    expected = run(Network(model), ids, Rule(4, 30, turns=frozenset(turns)))
    engine = Engine(model, backend=backend, rebase_at=60, **OPTIONS)
    engine.prefill(ids[:4])
    nll = []
    for i, (begin, end) in enumerate(zip(turns, [*turns[1:], TOKENS])):
        engine.begin_turn()
        middle = (begin + end) // 2  # a part as a prompt, the rest token by token
        if middle > begin:
            engine.prefill(ids[begin:middle])
        nll.append((middle, engine.score(ids[middle:end])))
        if i == 8:  # goes on elsewhere
            data = engine.dump()
            engine = Engine(model, backend=backend, rebase_at=60, **OPTIONS)
            engine.undump(data)
    for middle, found in nll:
        assert (found - expected.nll[middle - 1 : middle - 1 + len(found)]).abs().max() < TOLERANCE


@pytest.mark.gpu
def test_turns_under_one_graph_are_those_of_plain_steps():
    model, ids, turns = build("llama").half().cuda(), token_ids(TOKENS), [t for t in begins(LENGTHS) if t < TOKENS]
    scores = []
    for backend in ("ring", "fused"):
        engine = Engine(model, backend=backend, rebase_at=60, **OPTIONS)
        engine.prefill(ids[:4])
        for begin, end in zip(turns, [*turns[1:], TOKENS]):
            engine.begin_turn()
            scores.append((backend, begin, engine.score(ids[begin:end])))
        scores.append((backend, -1, torch.tensor(engine.stats()["events"])))
    ring, fused = ([s for name, _, s in scores if name == backend] for backend in ("ring", "fused"))
    assert ring[-1] == fused[-1]
    assert (torch.cat(ring[:-1]) - torch.cat(fused[:-1])).abs().max() < 10 * rounding_bound(model)


def test_an_engine_that_was_rewound_goes_on_as_if_nothing_had_come():
    model, ids = build("llama"), token_ids(120)
    engines = [Engine(model, streams=2, **OPTIONS) for _ in range(2)]
    for e in engines:
        e.begin_turn(4, stream=1)
        e.prefill(ids[:20], stream=1)
    engines[1].begin_turn(stream=1)
    engines[1].generate(ids[50:55], max_new_tokens=6, stream=1)
    engines[1].rewind(11, stream=1)
    with pytest.raises(ValueError, match="was rewound"):
        engines[1].generate([], max_new_tokens=3, stream=1)
    engines[1].undump(engines[1].dump(stream=1), stream=1)
    with pytest.raises(ValueError, match="was rewound"):
        engines[1].generate([], max_new_tokens=3, stream=1)
    with pytest.raises(ValueError, match="tokens=21 cannot be taken back; accepted: 0 to 20"):
        engines[1].rewind(21, stream=1)
    for e in engines:
        e.begin_turn(stream=1)
    assert engines[0].stats(stream=1) == engines[1].stats(stream=1)
    scores = [e.score(ids[20:], stream=1) for e in engines]
    assert torch.equal(scores[0][1:], scores[1][1:])


def test_what_cannot_be_rewound_is_refused():
    engine = Engine(build("llama"), sink=4, window=20, refresh=3, scorer="key-norm")
    engine.prefill(token_ids(50))
    with pytest.raises(ValueError, match="cannot be rewound"):
        engine.rewind(2)
    engine = Engine(build("llama"), **OPTIONS)
    engine.prefill(token_ids(100))
    with pytest.raises(ValueError, match="accepted: 0 to 30"):
        engine.rewind(31)
    assert engine.stats()["seen"] == 100
