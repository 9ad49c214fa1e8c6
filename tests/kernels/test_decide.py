"""The decision of an adaptive policy on the device: the schedule's own decisions, in the same float64 operations."""

import itertools
import random

import pytest
import torch
from ops_cases import DEVICE, IMPLEMENTATIONS, draw

from sinkstream.engine.decisions import AdaptiveRule
from sinkstream.kernels import decide
from sinkstream.kernels.layout import FIRST, FRAME_POSITION, LENGTH
from sinkstream.policies import SIGNALS, EvictionPolicy, PruneSchedule

ADAPTIVE = dict(sink=2, window=20, adaptive="entropy", adaptive_min=2, adaptive_every=5, adaptive_max=11)
POLICIES = {
    "adaptive": ADAPTIVE,
    "staged": ADAPTIVE | {"max_drop": 2},
    "with a bound": ADAPTIVE | {"slack": 7, "overlap": 3},
    "unsmoothed": ADAPTIVE | {"adaptive_smoothing": 0.0, "adaptive_quantile": 0.6, "compress_every": 9},
}
ROWS, RING = 64, 40


def play(options, risks, implementation):
    """Feed risks (tokens,) to the op, plan by plan; (cached, dropped so far) of every token, its table and its rows."""
    policy = EvictionPolicy.build(**options)
    rule, schedule = AdaptiveRule.of(policy), PruneSchedule(policy)
    table = torch.tensor([rule.row(schedule)] * 2, dtype=torch.float64, device=DEVICE)
    table[1, decide.ACTIVE] = 0
    before = table[1].clone()
    found, rows = [], []
    for first in range(0, len(risks), ROWS):
        plan = torch.zeros(ROWS, 2, 8, dtype=torch.int32, device=DEVICE)
        plan[..., FIRST], plan[..., LENGTH], plan[..., FRAME_POSITION] = RING - 1, 1000, 2000
        if first:
            decide.put_right(plan, torch.zeros(1, dtype=torch.int64, device=DEVICE), table, RING, False)
        given = torch.zeros(ROWS, 2, 1, device=DEVICE)
        given[:, :, 0] = torch.tensor(risks[first : first + ROWS], device=DEVICE)[:, None]
        for i in range(ROWS):
            risk = given[i, :, 0].clone()
            decide.decide(
                draw(2, 50), given, table, plan, torch.full((2,), i, device=DEVICE), signal="given", ring=RING,
                measure=lambda _, risk=risk: risk, original=False, implementation=implementation,
            )  # fmt: skip
            found.append((table[0, decide.CACHED].item(), table[0, decide.DROPPED].item()))
        rows.append(plan)
    assert torch.equal(table[1], before), "a stream that is not active was moved"
    return found, table[0], torch.cat(rows)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", POLICIES)
def test_decisions_and_state_are_the_schedules_bit_for_bit(name, implementation):
    random.seed(5)
    risks = [random.gammavariate(2, 1) * (1 + (i // 30) % 3) for i in range(4 * ROWS)]
    policy = EvictionPolicy.build(**POLICIES[name])
    rule, schedule = AdaptiveRule.of(policy), PruneSchedule(policy)
    expected, events, dropped = [], [], 0
    first = schedule.step()
    for i, risk in enumerate(risks):
        schedule.observe("entropy", float(torch.tensor(risk)))
        step = schedule.step()
        dropped += step.drop
        events += [i] if step.event else []
        expected.append((float(step.visible), float(dropped)))
    gaps = {b - a for a, b in itertools.pairwise(events)}
    assert first.drop == 0 and len(gaps) > 3, "control: prunes come earlier and later"
    found, table, rows = play(POLICIES[name], risks, implementation)
    assert found == expected
    state = schedule.states[rule.index]
    held = [state.risk, state.low.estimate, state.low.scale, state.high.estimate, state.high.scale]
    assert table[[decide.RISK, decide.LOW, decide.LOW_SCALE, decide.HIGH, decide.HIGH_SCALE]].tolist() == held
    assert rows[1:, 0, LENGTH].tolist() == [1000 - int(d) for _, d in expected[:-1]]
    assert rows[1:, 0, FIRST].tolist() == [(RING - 1 + int(d)) % RING for _, d in expected[:-1]]
    assert (rows[:, 1, LENGTH] == 1000).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("signal", decide.SIGNALS)
def test_risks_are_those_of_float64(signal, implementation):
    logits = draw(3, 5000) * 4
    logits[0, ::3] = -torch.inf
    logits[2] = -torch.inf
    logits[2, 7] = 3.0
    expected = SIGNALS[signal](logits.double().log_softmax(-1))
    policy = EvictionPolicy.build(**ADAPTIVE)
    row = AdaptiveRule.of(policy).row(PruneSchedule(policy))
    table = torch.tensor([row] * 3, dtype=torch.float64, device=DEVICE)
    risks, plan = torch.zeros(4, 3, 1, device=DEVICE), torch.zeros(4, 3, 8, dtype=torch.int32, device=DEVICE)
    decide.decide(
        logits, risks, table, plan, torch.ones(3, dtype=torch.int64, device=DEVICE), signal=signal, ring=9,
        measure=SIGNALS[signal], original=True, implementation=implementation,
    )  # fmt: skip
    assert (risks[1, :, 0] - expected).abs().max() < 1e-5
    assert torch.equal(table[:, decide.RISK], risks[1, :, 0].double())
    assert risks[[0, 2, 3]].eq(0).all() and expected[0] > 0.1, "control"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("signal", decide.SIGNALS)
def test_logits_that_are_not_numbers(signal, implementation):
    logits = draw(1, 3000)
    logits[0, 2500] = float("nan")
    table = torch.zeros(1, decide.COLUMNS, dtype=torch.float64, device=DEVICE)
    table[0, decide.ACTIVE] = 1
    risks, plan = torch.zeros(2, 1, 1, device=DEVICE), torch.zeros(2, 1, 8, dtype=torch.int32, device=DEVICE)
    decide.decide(
        logits, risks, table, plan, torch.zeros(1, dtype=torch.int64, device=DEVICE), signal=signal, ring=9,
        measure=SIGNALS[signal], original=True, implementation=implementation,
    )  # fmt: skip
    assert risks[0, 0].isnan().all(), "the schedule refuses them when the host reads the risk"


def test_policies_that_the_host_must_decide():
    assert AdaptiveRule.of(EvictionPolicy.build(**ADAPTIVE, refresh=4, scorer="uniform")) is None
    assert AdaptiveRule.of(EvictionPolicy.build(sink=2, window=20, compress_every=4)) is None


def test_mistakes_are_named():
    table = torch.zeros(1, decide.COLUMNS, dtype=torch.float64, device=DEVICE)
    arguments = dict(signal="top1", measure=SIGNALS["top1"], ring=9, original=False)
    risks, plan = torch.zeros(2, 1, 1, device=DEVICE), torch.zeros(2, 1, 8, dtype=torch.int32, device=DEVICE)
    cursor = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="table has dtype"):
        decide.decide(draw(1, 50), risks, table.float(), plan, cursor, **arguments)
    with pytest.raises(ValueError, match="risks has shape"):
        decide.decide(draw(1, 50), risks[..., 0], table, plan, cursor, **arguments)
