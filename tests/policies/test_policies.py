"""Policies: what every prune schedule keeps to, the numbers by hand, the scorers, the options and their messages."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle.rules import Rule, simulate

from sinkstream.policies import (
    CAP_ACCOUNTING,
    SCORERS,
    SIGNALS,
    Candidates,
    EvictionPolicy,
    PruneSchedule,
    select,
    structural_weights,
)
from sinkstream.policies.triggers import Adaptive
from sinkstream.policies.triggers.adaptive import RunningQuantile

TOKENS = 250


# ---- properties over all geometries and triggers ----


@st.composite
def geometries(draw, adaptive: bool | None = None) -> dict:
    """Options of any accepted policy; `adaptive` says whether that trigger must, must not or may be among them."""
    options = {
        "sink": draw(st.integers(0, 6)),
        "window": draw(st.integers(1, 20)),
        "overlap": draw(st.integers(0, 8)),
        "max_drop": draw(st.none() | st.integers(2, 9)),
        "compress_every": draw(st.none() | st.integers(1, 20)),
        "slack": draw(st.none() | st.integers(0, 15)),
    }
    if draw(st.booleans()):
        options |= {"refresh": draw(st.integers(1, 6)), "scorer": draw(st.sampled_from(SCORERS.names()))}
    if adaptive or (adaptive is None and draw(st.booleans())):
        low, every, high = sorted(draw(st.lists(st.integers(1, 24), min_size=3, max_size=3)))
        signal = draw(st.sampled_from(SIGNALS.names()))
        options |= {"adaptive": signal, "adaptive_min": low, "adaptive_every": every, "adaptive_max": high}
    return {name: value for name, value in options.items() if value is not None}


risks = st.lists(st.floats(0, 12), min_size=8, max_size=40)


def steps_of(policy: EvictionPolicy, tokens: int = TOKENS, risk=(0.0,)) -> list:
    """The steps of a run that observes the given risks in turn."""
    schedule, steps = PruneSchedule(policy), []
    for t in range(tokens):
        steps.append(schedule.step())
        for signal in schedule.signals():
            schedule.observe(signal, risk[t % len(risk)])
    return steps


def visible_sets(policy: EvictionPolicy, steps: list, choose) -> list[list[int]]:
    """Indices that each token's attention sees, from the drops alone."""
    kept, pinned, sets = [], 0, []
    for t, step in enumerate(steps):
        if step.drop:
            sinks, rest = kept[: policy.sink], kept[policy.sink :]
            window = len(kept) - step.drop - policy.sink - policy.refresh
            older = rest[: len(rest) - window]
            stay = sorted(choose(older, policy.refresh))
            kept, pinned = sinks + stay + rest[len(rest) - window :], policy.refresh
        kept = [*kept, t]
        sets.append(list(kept))
    assert pinned == (policy.refresh if any(s.drop for s in steps) else 0)
    return sets


@given(geometries(), risks)
def test_the_cap_is_never_exceeded_and_sinks_and_order_are_kept(options, risk):
    policy = EvictionPolicy.build(**options)
    steps = steps_of(policy, risk=risk)
    sets = visible_sets(policy, steps, lambda older, keep: sorted(older, key=lambda i: i % 7)[:keep])
    for t, (step, visible) in enumerate(zip(steps, sets)):
        assert len(visible) == step.visible <= policy.peak
        assert visible == sorted(set(visible)) and visible[-1] == t
        assert visible[: policy.sink] == list(range(min(policy.sink, t + 1)))
        recent = visible[policy.sink + policy.refresh :] if t >= policy.peak else []
        assert recent == list(range(t + 1 - len(recent), t + 1))
        assert t < policy.peak or len(recent) >= policy.window + policy.overlap


@given(geometries(), risks)
def test_drops_are_bounded_and_no_event_starts_in_pruning_mode(options, risk):
    policy = EvictionPolicy.build(**options)
    pruning = False
    for step in steps_of(policy, risk=risk):
        assert step.drop <= (policy.max_drop or policy.growth + 1)
        assert not (step.event and pruning)
        assert (step.drop > 0) == (step.event or pruning)
        pruning = step.drop > 0 and step.visible > policy.target
    assert policy.max_drop is not None or not pruning


@given(geometries(adaptive=False))
def test_max_drop_does_not_make_events_more_frequent(options):
    policy = EvictionPolicy.build(**options | {"max_drop": None})
    at_once = [step.event for step in steps_of(policy)]
    for max_drop in (2, 3, 8):
        staged = [step.event for step in steps_of(EvictionPolicy.build(**options | {"max_drop": max_drop}))]
        assert sum(staged) <= sum(at_once)
        gaps = [b - a for a, b in zip(starts(staged), starts(staged)[1:])]
        assert all(gap >= policy.growth + 1 for gap in gaps)


def starts(events: list[bool]) -> list[int]:
    """Steps at which events start."""
    return [t for t, event in enumerate(events) if event]


@given(geometries(adaptive=True), risks)
def test_adaptive_gathers_between_its_bounds(options, risk):
    options = {k: v for k, v in options.items() if k not in ("compress_every", "slack")}
    policy = EvictionPolicy.build(**options)
    before = 0
    for step in steps_of(policy, risk=risk):
        gathered = before + 1 - policy.target
        assert gathered <= options["adaptive_max"]
        if step.event:
            assert gathered >= options["adaptive_min"]
        before = step.visible
    assert policy.growth == options["adaptive_max"] - 1 and policy.sure_growth == options["adaptive_min"] - 1


@given(geometries(), risks, st.integers(0, 200))
def test_sure_steps_are_sure(options, risk, tokens):
    """No drop comes before as many tokens as were promised, whatever is observed; a drop is possible right after."""
    policy = EvictionPolicy.build(**options)
    schedule = PruneSchedule(policy)
    for t in range(tokens):
        schedule.step()
        for signal in schedule.signals():
            schedule.observe(signal, risk[t % len(risk)])
    sure = schedule.sure_steps()
    assert not any(step.drop for step in schedule.plan(sure))
    if not schedule.pruning and "adaptive" not in options:
        assert schedule.plan(sure + 1)[-1].drop


@given(geometries(adaptive=False), st.integers(0, 120))
def test_a_plan_is_what_then_happens_and_changes_nothing(options, tokens):
    schedule = PruneSchedule(EvictionPolicy.build(**options))
    for _ in range(tokens):
        schedule.step()
    plan = schedule.plan(60)
    assert plan == schedule.plan(60) == [schedule.step() for _ in range(60)]


@given(geometries(adaptive=True), risks, st.integers(0, 120), st.integers(0, 90))
def test_foreseen_risks_that_come_true_are_followed_to_the_end(options, risk, tokens, known):
    """Foreseeing changes nothing; behind the last risk that is foreseen the policy goes on with what it has seen."""
    schedule = PruneSchedule(EvictionPolicy.build(**options))
    (signal,) = schedule.signals()
    coming = [risk[t % len(risk)] for t in range(tokens + 90)]
    for value in coming[:tokens]:
        schedule.step()
        schedule.observe(signal, value)
    one_by_one, expected = schedule.fork(), []
    for t in range(90):
        expected.append(one_by_one.step())
        if t < known:
            one_by_one.observe(signal, coming[tokens + t])
    foreseen = schedule.foresee({signal: coming[tokens:][:known]}, 90)
    assert foreseen == expected == schedule.foresee({signal: coming[tokens:][:known]}, 90)
    kept = schedule.follow(foreseen, {signal: coming[tokens:]})
    assert kept >= known and schedule.seen == tokens + kept
    again = schedule.fork()
    if kept < 90:
        assert again.step().drop != expected[kept].drop, "the first one that the policy decides otherwise"


def test_a_risk_that_is_no_number_is_refused_where_it_counts():
    """Behind a prune that was foreseen wrongly a risk means nothing: the token is computed again."""
    options = {"window": 4, "sink": 1, "adaptive": "top1", "adaptive_min": 2, "adaptive_every": 3, "adaptive_max": 9}
    schedule = PruneSchedule(EvictionPolicy.build(**options))
    right = schedule.foresee({}, 12)
    wrong = right[:7]
    wrong.drop[6] += 1
    nan = float("nan")
    assert schedule.fork().follow(wrong, {"top1": [0.5] * 6 + [nan]}) == 6
    with pytest.raises(ValueError, match=r"after token 2 of the stream are not finite.*top1=nan"):
        schedule.fork().follow(right, {"top1": [0.5, 0.5, nan, *[0.5] * 9]})


@given(geometries(adaptive=False))
def test_the_schedule_agrees_with_the_oracle(options):
    policy = EvictionPolicy.build(**options)
    rule = Rule(**{k: v for k, v in options.items() if k != "scorer"})
    assert (policy.target, policy.peak) == (rule.target, rule.cap)
    expected = simulate(rule, TOKENS, lambda older, keep, t, group: older[:keep])
    for step, want in zip(steps_of(policy), expected):
        assert (step.drop, step.event, step.visible) == (want.drop_size, want.event, len(want.visible[None]))


@given(geometries(adaptive=True), risks)
def test_the_adaptive_schedule_agrees_with_the_oracle_that_is_told_when(options, risk):
    policy = EvictionPolicy.build(**options)
    steps = steps_of(policy, risk=risk)
    events = set(starts([step.event for step in steps]))
    rule = Rule(**{k: v for k, v in options.items() if k in Rule.__dataclass_fields__} | {"adaptive": True})
    want = simulate(
        rule, TOKENS, lambda older, keep, t, group: older[:keep], want_prune=lambda t, gathered: t in events
    )
    assert [(s.drop, s.event) for s in steps] == [(w.drop_size, w.event) for w in want]


@settings(max_examples=50)
@given(geometries(), st.sampled_from(CAP_ACCOUNTING.names()), st.integers(1, 120), risks)
def test_a_cap_is_kept_and_a_cap_as_long_as_the_text_never_drops(options, accounting, cap, risk):
    options.pop("window")
    try:
        policy = EvictionPolicy.build(cap=cap, cap_accounting=accounting, **options)
    except ValueError as error:
        smallest = int(str(error).rsplit(" ", 1)[1])
        assert smallest > cap
        assert EvictionPolicy.build(cap=smallest, cap_accounting=accounting, **options).window == 1
        return
    assert policy.peak == cap + (policy.growth if accounting == "published" else 0)
    assert max(step.visible for step in steps_of(policy, risk=risk)) <= policy.peak
    surely = cap if "adaptive" not in options else policy.target + policy.sure_growth
    assert not any(step.drop for step in steps_of(policy, tokens=surely, risk=risk))
    if "adaptive" not in options:
        assert steps_of(policy, tokens=policy.peak + 1)[-1].drop


# ---- numbers by hand ----


def events_and_drops(tokens: int, **options) -> dict[int, int]:
    """Token -> drop size of the steps that drop, sinks 1 and window 3 (C₀ = 4)."""
    steps = steps_of(EvictionPolicy.build(sink=1, window=3, **options), tokens)
    return {t: step.drop for t, step in enumerate(steps) if step.drop}


BY_HAND = {
    "strict": ({"compress_every": 1}, {4: 1, 5: 1, 6: 1, 7: 1, 8: 1, 9: 1}),
    "strict is the default": ({}, {4: 1, 5: 1, 6: 1, 7: 1, 8: 1, 9: 1}),
    "lazy": ({"compress_every": 3}, {6: 3, 9: 3}),
    "overlap": ({"compress_every": 3, "overlap": 2}, {8: 3}),
    "slack": ({"slack": 2}, {6: 3, 9: 3}),
    "no slack": ({"slack": 0}, {4: 1, 5: 1, 6: 1, 7: 1, 8: 1, 9: 1}),
    "slack before lazy": ({"compress_every": 5, "slack": 1}, {5: 2, 7: 2, 9: 2}),
    "lazy before slack": ({"compress_every": 2, "slack": 4}, {5: 2, 7: 2, 9: 2}),
    "max_drop": ({"compress_every": 4, "max_drop": 2}, {7: 2, 8: 2, 9: 2}),
    "max_drop, last stage smaller": ({"compress_every": 3, "max_drop": 2}, {6: 2, 7: 2}),
    "refresh": ({"compress_every": 3, "refresh": 2, "scorer": "uniform"}, {8: 3}),
    "adaptive during warm-up": ({"adaptive": "top1", "adaptive_min": 1, "adaptive_every": 3}, {6: 3, 9: 3}),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_numbers_by_hand(name):
    options, drops = BY_HAND[name]
    assert events_and_drops(10, **options) == drops


def test_windows_that_a_cap_leaves_by_hand():
    build = EvictionPolicy.build
    assert build(cap=100).window == 96
    assert build(cap=100, compress_every=33).window == 64
    assert build(cap=100, compress_every=33, cap_accounting="published").window == 96
    assert build(cap=100, compress_every=33, slack=10).window == 86
    assert build(cap=100, sink=0, overlap=10, refresh=20, scorer="key-norm", slack=6).window == 64
    assert build(cap=100, adaptive="entropy", adaptive_max=65).window == 32


# ---- adaptive ----


def warmed_up(trigger: Adaptive, latest: float):
    """State after 100 risks between 1 and 2 and then some equal to `latest`."""
    state = trigger.start()
    for i in range(100):
        trigger.observe(state, 1 + (i * 0.618) % 1)
    for _ in range(10):
        trigger.observe(state, latest)
    return state


@pytest.mark.parametrize(("latest", "first"), [(3.0, 4), (0.1, 16), (1.5, 8)], ids=["high", "low", "middle"])
@pytest.mark.parametrize("signal", SIGNALS.names())
def test_high_risk_prunes_early_and_low_risk_waits(signal, latest, first):
    trigger = Adaptive(signal, adaptive_min=4, adaptive_every=8, adaptive_max=16, adaptive_smoothing=0)
    state = warmed_up(trigger, latest)
    assert [trigger.due(over, state) for over in range(1, 18)] == [over >= first for over in range(1, 18)]


def test_adaptive_waits_for_64_risks_and_smooths_them():
    trigger = Adaptive("entropy", adaptive_min=4, adaptive_every=8, adaptive_max=16, adaptive_smoothing=0.5)
    state = trigger.start()
    for i in range(63):
        trigger.observe(state, float(i))
        assert not trigger.due(7, state) and trigger.due(8, state)
    trigger.observe(state, 63.0)
    assert trigger.due(4, state)  # rising, so above its quantile
    trigger = Adaptive("entropy", adaptive_smoothing=0.75)
    state = trigger.start()
    for risk in (4.0, 0.0, 8.0):
        trigger.observe(state, risk)
    assert state.risk == pytest.approx((4 * 0.75) * 0.75 + 8 * 0.25)


def test_risk_signals_by_hand():
    p = torch.tensor([[0.5, 0.25, 0.25, 0.0], [1.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(SIGNALS["entropy"](p.log()), torch.tensor([1.5 * torch.log(torch.tensor(2.0)), 0.0]))
    torch.testing.assert_close(SIGNALS["top1"](p.log()), torch.tensor([0.5, 0.0]))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("q", [0.1, 0.25, 0.5, 0.75, 0.9])
def test_running_quantiles_converge_whatever_the_unit(q, scale):
    values = np.random.default_rng(0).exponential(size=6000)  # the same numbers on every machine
    quantile, below = RunningQuantile(q), []
    for i, value in enumerate((values * scale).tolist()):
        if i >= 1000:
            below.append(value <= quantile.estimate)
        quantile.update(value)
    assert abs(sum(below) / len(below) - q) < 0.03
    for value in (100 + values[:2000] * scale).tolist():  # it follows a shift
        quantile.update(value)
    assert quantile.estimate > 100


# ---- scorers ----


def candidates(count: int, **known) -> Candidates:
    """Candidates at positions 10, 11, … with the given quantities, (1, 1, 1, count) each."""
    known = {name: torch.as_tensor(values, dtype=torch.float32).view(1, 1, 1, -1) for name, values in known.items()}
    return Candidates(position=torch.arange(10, 10 + count).view(1, 1, 1, -1), **known)


VALUES = [0.3, 0.9, 0.1, 0.9, 0.5, 0.1]
KEPT = {  # scorer: (options, quantity, value of each candidate, the three that stay)
    "structural": ({}, "structure", [1, 3, 0, 2, 3, 0], [1, 3, 4]),
    "uncertainty": ({}, "nll", VALUES, [1, 3, 4]),
    "window-attention": ({}, "attention", VALUES, [1, 3, 4]),
    "accumulated-attention": ({}, "accumulated", VALUES, [1, 3, 4]),
    "last-query": ({}, "attention", VALUES, [1, 3, 4]),
    "key-norm": ({}, "key_norm", VALUES, [0, 2, 5]),
}


@pytest.mark.parametrize("name", KEPT)
def test_a_scorer_keeps_the_best(name):
    options, quantity, values, kept = KEPT[name]
    scorer = SCORERS[name](**options)
    assert quantity in scorer.needs
    assert select(scorer.score(candidates(6, **{quantity: values})), 3).flatten().tolist() == kept


@pytest.mark.parametrize("name", SCORERS)
def test_of_equals_the_more_recent_stays_and_heads_choose_for_themselves(name):
    scorer = SCORERS[name]()
    flat = {field: torch.full((2, 3, 4, 6), 0.7) for field in scorer.needs}
    position = torch.arange(10, 16) if scorer.needs else torch.full((6,), 10)
    score = scorer.score(Candidates(position=position.view(1, 1, 1, -1), **flat))
    kept = select(score, 2)
    assert score.shape[-1] == 6 and (kept == torch.tensor([4, 5])).all()
    assert scorer.per_head == (score.shape[:3] == (2, 3, 4)) or name in ("structural", "uncertainty")


def test_uncertainty_may_read_the_entropy():
    known = candidates(4, nll=[4.0, 3.0, 2.0, 1.0], entropy=[1.0, 2.0, 3.0, 4.0])
    assert select(SCORERS["uncertainty"]().score(known), 1).item() == 0
    assert select(SCORERS["uncertainty"](uncertainty="entropy").score(known), 1).item() == 3


def test_key_norms_that_differ_by_rounding_are_equal():
    norms = torch.tensor([2.0, 2.0 * (1 - 1e-6), 2.1])
    assert select(SCORERS["key-norm"]().score(candidates(3, key_norm=norms)), 1).item() == 1
    norms = torch.tensor([2.0, 2.0 * 1.01, 2.1])
    assert select(SCORERS["key-norm"]().score(candidates(3, key_norm=norms)), 1).item() == 0


def test_how_many_queries_a_scorer_looks_at():
    observed = {name: SCORERS[name]().observed_queries for name in SCORERS}
    assert observed["window-attention"] == 32 and observed["last-query"] == 1
    assert SCORERS["window-attention"](observation=5).observed_queries == 5
    assert all((observed[name] > 0) == ("attention" in SCORERS[name].needs) for name in SCORERS)


@pytest.mark.parametrize(("budget", "leaving"), [(8, 5), (16, 13), (31, 64)])
def test_uniform_stays_evenly_spread_over_a_long_run(budget, leaving):
    scorer, kept, end = SCORERS["uniform"](), torch.arange(0), 4
    while end < 8_000:
        older = torch.cat([kept, torch.arange(end, end + leaving)])
        end += leaving
        kept = older[select(scorer.score(Candidates(position=older)), min(budget, len(older)))]
        if end > 20 * budget:
            gaps = kept.diff()
            ideal = end / budget
            assert len(kept) == budget and gaps.max() <= 2 * gaps.min() <= 4 * ideal
            assert kept[0] <= 2 * ideal and end - kept[-1] <= 2.1 * ideal + leaving


class Pieces:
    """A tokenizer of a few pieces."""

    pieces = ("a", "\n", " .\n", "end.", "end?”", "!", '"', "it's", " ", "é", "。", ".5", "")

    def __len__(self):
        return len(self.pieces)

    def batch_decode(self, rows):
        return [self.pieces[i] for (i,) in rows]


def test_structural_weights_rank_newline_above_sentence_end_above_quote():
    assert structural_weights(Pieces()).tolist() == [0, 3, 3, 2, 2, 2, 1, 1, 0, 0, 2, 0, 0]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.integers(0, 30))
def test_select_keeps_the_best_in_order(scores, keep):
    keep = min(keep, len(scores))
    best = sorted(range(len(scores)), key=lambda i: (scores[i], i))[len(scores) - keep :]
    many = torch.tensor(scores).expand(2, 3, -1).float()
    assert select(many, keep).tolist() == [[sorted(best)] * 3] * 2
