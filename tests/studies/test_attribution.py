"""Attribution against planted causes: every part is recovered, and the parts add up to the whole."""

import numpy as np
import pytest

from sinkstream.studies.diagnosis.attribution import PARTS, attribute, nll_at_length

N, CAP, TRAINED, PERIOD = 6400, 512, 500, 64
PART_OF = {"near": "near_event", "past": "past_trained", "elsewhere": "elsewhere"}


def planted(*, noise=0.0, near=0.0, past=0.0, elsewhere=0.0, slope=0.002, seed=0):
    """Runs whose NLL falls by `slope` nats a visible token, and a lazy policy with further damage by class of token."""
    rng = np.random.default_rng(seed)
    text, since = rng.gamma(4, 0.8, N), np.arange(N) % PERIOD
    sensitivity = slope * rng.uniform(0.5, 1.5, N)
    visible = CAP - PERIOD + 1 + since

    def seeing(length):
        return text - sensitivity * (np.minimum(length, TRAINED) - CAP)

    strict = {cap: seeing(cap) + noise * rng.standard_normal(N) for cap in (448, 480, TRAINED, CAP)}
    classes = {"past": visible > TRAINED, "near": since < 32}
    classes["elsewhere"] = ~classes["past"] & ~classes["near"]
    damage = {"past": past, "near": near, "elsewhere": elsewhere}
    nll = seeing(visible) + noise * rng.standard_normal(N) + sum(damage[name] * classes[name] for name in classes)
    return nll, visible, since, strict, {name: tokens.mean() for name, tokens in classes.items()}


def parts_of(found):
    return {name: part.value for name, part in found.parts.items()}


@pytest.mark.parametrize("cause", ["near", "past", "elsewhere", None])
def test_a_planted_cause_gets_its_part(cause):
    nll, visible, since, strict, shares = planted(**({cause: 0.3} if cause else {}))
    found = attribute(nll, visible, since, strict, cap=CAP, trained_positions=TRAINED)
    parts = parts_of(found)
    for name, part in PART_OF.items():
        assert shares[name] > 0.1
        assert parts[part] == pytest.approx(0.3 * shares[name] if name == cause else 0, abs=1e-9), part
    assert parts["fewer_tokens"] == pytest.approx(0.002 * (TRAINED - np.minimum(visible, TRAINED).mean()), rel=0.05)
    assert parts["varying_length"] == pytest.approx(0, abs=1e-3)
    assert sum(parts.values()) == pytest.approx(found.total.value)


def test_length_that_only_varies_is_told_from_fewer_tokens():
    """NLL that is convex in the length: seeing now more, now fewer costs more than seeing the mean."""
    rng = np.random.default_rng(0)
    text, since = rng.gamma(4, 0.8, N), np.arange(N) % PERIOD
    visible = 449 + since

    def seeing(length):
        return text + np.where(length < 480, 0.01 * (480.0 - length), 0)

    found = attribute(seeing(visible), visible, since, {c: seeing(np.full(N, c)) for c in (448, 480, 512)}, cap=512)
    parts = parts_of(found)
    assert parts["fewer_tokens"] == pytest.approx(0, abs=1e-9)
    assert parts["varying_length"] == pytest.approx(np.maximum(0.01 * (480 - visible), 0).mean(), rel=1e-6)
    assert parts["near_event"] == pytest.approx(0, abs=1e-9)
    assert found.shares()["varying_length"] == pytest.approx(1)


def test_intervals_hold_the_planted_parts():
    nll, visible, since, strict, shares = planted(noise=0.3, near=0.1)
    found = attribute(nll, visible, since, strict, cap=CAP)
    near = found.parts["near_event"]
    assert near.low < 0.1 * shares["near"] < near.high and near.above_zero
    assert not found.parts["past_trained"].excludes_zero
    assert sum(parts_of(found).values()) == pytest.approx(found.total.value)


def test_without_other_caps_lengths_are_unknown_and_the_classes_split_the_whole():
    nll, visible, since, strict, _ = planted(near=0.2)
    found = attribute(nll, visible, since, {CAP: strict[CAP]}, cap=CAP)
    assert found.parts["fewer_tokens"].value is None and "other caps" in found.parts["fewer_tokens"].reason
    known = [value for value in parts_of(found).values() if value is not None]
    assert len(known) == 3 and sum(known) == pytest.approx(found.total.value)


def test_a_policy_that_always_sees_the_cap_loses_nothing_to_length():
    nll, _, since, strict, _ = planted(near=0.2)
    found = attribute(nll, np.full(N, CAP), since, {CAP: strict[CAP]}, cap=CAP)
    assert parts_of(found)["fewer_tokens"] == parts_of(found)["varying_length"] == 0


def test_tokens_that_one_run_did_not_score_count_nowhere():
    nll, visible, since, strict, _ = planted(near=0.2)
    nll[::3], strict[448][::5] = np.nan, np.nan
    found = attribute(nll, visible, since, strict, cap=CAP)
    assert sum(found.tokens.values()) < N * 0.7
    assert set(found.parts) == set(PARTS)


def test_lengths_are_interpolated_token_by_token():
    runs = {10: np.array([1.0, 2, 3]), 20: np.array([2.0, 2, 5]), 40: np.array([4.0, 0, 5])}
    assert nll_at_length(runs, np.array([15, 30, 99])).tolist() == [1.5, 1.0, 5.0]
    assert nll_at_length(runs, np.array([1, 20, 20])).tolist() == [1.0, 2.0, 5.0]


def test_a_control_at_another_cap_is_refused():
    with pytest.raises(ValueError, match="no strict run at cap=512; there are: 448"):
        attribute(np.zeros(9), np.ones(9), np.zeros(9), {448: np.zeros(9)}, cap=512)
