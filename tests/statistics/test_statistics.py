"""Block bootstrap against known answers: planted differences are found, noise is not, coverage is near nominal."""

import numpy as np
import pytest
from noise import correlated
from scipy import stats

from sinkstream.statistics import (
    MIN_BLOCKS,
    Bootstrap,
    Estimate,
    PairedDelta,
    block_sums,
    mean_interval,
    paired_delta_ppl,
    proportion,
    suitable_block_tokens,
)


def test_identical_arrays_have_no_difference():
    nll = np.random.default_rng(0).gamma(4, 0.8, 2000)
    found = paired_delta_ppl(nll, nll.copy())
    assert (found.delta_percent, found.low, found.high) == (0, 0, 0)
    assert not found.excludes_zero and found.n_tokens == 2000 and found.n_blocks == 32


def test_planted_difference_is_found_within_its_interval():
    rng = np.random.default_rng(1)
    control = rng.gamma(4, 0.8, 4096)
    nll = control + 0.02 + 0.05 * correlated((4096,), rng)
    found = paired_delta_ppl(nll, control)
    assert found.excludes_zero
    assert found.low < 100 * np.expm1(0.02) < found.high
    assert found.delta_percent == pytest.approx(100 * np.expm1(np.mean(nll - control)))


def test_pairing_is_what_finds_it():
    """Control of the method: the text's own variance, 30 times the effect, would hide it without pairing."""
    rng = np.random.default_rng(1)
    control = rng.gamma(4, 0.8, 4096)
    nll = control + 0.02 + 0.05 * correlated((4096,), rng)
    assert not paired_delta_ppl(nll, rng.permutation(control)).excludes_zero


def coverage(block_tokens, repetitions=300, n_tokens=2048):
    noise = correlated((repetitions, n_tokens), np.random.default_rng(2))
    control = np.zeros(n_tokens)
    found = [
        paired_delta_ppl(row, control, block_tokens=block_tokens, bootstrap=Bootstrap(resamples=500, seed=number))
        for number, row in enumerate(noise)
    ]
    return np.mean([not interval.excludes_zero for interval in found])


def test_coverage_on_correlated_noise_is_near_nominal():
    assert 0.90 <= coverage(block_tokens=64) <= 0.98


def test_blocks_of_one_token_would_claim_too_much():
    """Control: without blocks the same noise gives far too many findings, so the coverage test can fail."""
    assert coverage(block_tokens=1, repetitions=60) < 0.7


def test_only_tokens_that_both_scored_count():
    nll, control = np.full(1000, 2.0), np.full(1000, 1.0)
    nll[::3], control[::5] = np.nan, np.nan
    found = paired_delta_ppl(nll, control, block_tokens=50)
    assert found.n_tokens == sum(i % 3 > 0 and i % 5 > 0 for i in range(1000))
    assert found.delta_percent == pytest.approx(100 * np.expm1(1))


def test_too_few_blocks_give_no_interval_but_a_reason():
    nll = np.random.default_rng(0).random(64 * (MIN_BLOCKS - 1))
    found = paired_delta_ppl(nll, nll - 0.1)
    assert found.delta_percent == pytest.approx(100 * np.expm1(0.1))
    assert found.low is None and found.high is None and not found.excludes_zero
    assert f"{MIN_BLOCKS - 1} blocks" in found.reason


@pytest.mark.parametrize("n_tokens", [0, 5])
def test_nothing_scored(n_tokens):
    found = paired_delta_ppl(np.full(n_tokens, np.nan), np.zeros(n_tokens))
    assert found.delta_percent is None and found.n_tokens == 0 and found.reason


def test_last_block_may_be_shorter():
    starts, sums, counts = block_sums(np.ones(150), block_tokens=64)
    assert starts.tolist() == [0, 64, 128] and sums.tolist() == [64, 64, 22] and counts.tolist() == [64, 64, 22]


def test_blocks_follow_the_text_across_gaps():
    positions = np.array([100, 101, 170, 171, 172, 300])
    starts, sums, counts = block_sums(np.array([1.0, 2, 3, np.nan, 5, 6]), positions, block_tokens=64)
    assert starts.tolist() == [100, 164, 292]
    assert sums.tolist() == [3, 8, 6] and counts.tolist() == [2, 2, 1]


def test_the_interval_of_a_mean_holds_the_truth_and_is_reproducible():
    rng = np.random.default_rng(3)
    nll = 3 + 0.5 * correlated((8192,), rng)
    found = mean_interval(nll)
    assert found.low < 3 < found.high
    assert found.value == pytest.approx(nll.mean())
    assert found == mean_interval(nll) != mean_interval(nll, bootstrap=Bootstrap(seed=1))


def test_wider_confidence_is_a_wider_interval():
    nll = np.random.default_rng(4).gamma(4, 0.8, 2000)
    narrow, wide = (mean_interval(nll, bootstrap=Bootstrap(confidence=c)) for c in (0.8, 0.99))
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high


@pytest.mark.parametrize(("n_tokens", "expected"), [(20_000, 64), (400, 20), (100, 8), (0, 8)])
def test_suitable_block_tokens(n_tokens, expected):
    assert suitable_block_tokens(n_tokens) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_tokens": 0}, "block_tokens = 0"),
        ({"positions": np.arange(3)}, "positions"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        paired_delta_ppl(np.zeros(100), np.zeros(100), **options)
    with pytest.raises(ValueError, match="pair token by token"):
        paired_delta_ppl(np.zeros(100), np.zeros(99))


@pytest.mark.parametrize("option", [{"resamples": 0}, {"confidence": 95}])
def test_a_wrong_bootstrap_is_refused(option):
    with pytest.raises(ValueError, match=" = ".join(map(str, *option.items()))):
        Bootstrap(**option)


@pytest.mark.parametrize(
    ("low", "high", "excluded"),
    [
        (-1.0, 1.0, False),
        (1.0, 2.0, True),
        (-2.0, -1.0, True),
        (0.0, 1.0, False),
        (-1.0, None, False),
        (1.0, None, True),
    ],
)
def test_an_interval_without_an_upper_end_excludes_zero_by_its_lower_end(low, high, excluded):
    assert PairedDelta(0.0, low, high, 64, 8, 0.95).excludes_zero is excluded
    assert Estimate(0.0, low, high).excludes_zero is excluded


@pytest.mark.parametrize(("hits", "trials"), [(0, 5), (1, 5), (5, 5), (77, 150), (150, 150)])
def test_the_interval_of_a_share_is_that_of_scipy(hits, trials):
    found = proportion(hits, trials)
    exact = stats.binomtest(hits, trials).proportion_ci(0.95, method="wilson")
    assert found.value == hits / trials
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high), abs=1e-12)
    assert proportion(0, 0).value is None and proportion(0, 0).reason
    with pytest.raises(ValueError, match="must lie between 0 and the trials"):
        proportion(trials + 1, trials)
