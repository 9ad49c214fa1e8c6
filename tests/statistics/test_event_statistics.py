"""Event-aligned curves and resolution against known answers: planted spikes are found, noise is not."""

import numpy as np
import pytest
from noise import correlated

from sinkstream.statistics import Bootstrap, event_curve, event_cycles, paired_delta_ppl, resolution

PERIOD = 64


def noise_with(shape, *, repetitions, n_tokens=6400, period=PERIOD, level=0.0, seed=0):
    """Paired differences: correlated noise, a level, and `shape` added from every event on."""
    noise = correlated((repetitions, n_tokens), np.random.default_rng(seed), memory=0.5)
    cycle = np.zeros(period)
    cycle[: len(shape)] = shape
    return noise + level + np.tile(cycle, n_tokens // period + 1)[:n_tokens], np.arange(0, n_tokens, period)


def curves(values, events, **options):
    positions = np.arange(values.shape[1])
    ways = (Bootstrap(resamples=600, seed=i) for i in range(len(values)))
    return [event_curve(v, positions, events, bootstrap=way, **options) for v, way in zip(values, ways)]


def holds(estimates, truth):
    return np.mean([estimate.low <= truth <= estimate.high for estimate in estimates])


@pytest.mark.parametrize("shape", [np.full(6, 1.5), 2 * np.exp(-np.arange(30) / 6)], ids=["box", "decay"])
def test_a_planted_spike_is_found_at_its_size(shape):
    found = curves(*noise_with(shape, repetitions=40, level=0.2))
    assert all(curve.found for curve in found)
    assert holds([c.peak for c in found], shape.max()) >= 0.9
    assert holds([c.area for c in found], shape.sum()) >= 0.85
    assert holds([c.width for c in found], shape.sum() / shape.max()) >= 0.85
    assert holds([c.level for c in found], 0.2) >= 0.85
    one = found[0]
    assert one.lags.tolist() == list(range(-32, PERIOD)) and one.n_events == 100
    inside = (one.low <= np.r_[np.zeros(32), shape, np.zeros(PERIOD - len(shape))] + 0.2).mean()
    assert inside > 0.9, "the pointwise band lies around the truth"


def test_a_peak_amid_a_loss_has_no_width():
    (curve,) = curves(*noise_with(np.r_[2.0, np.full(20, -0.5)], repetitions=1))
    assert curve.peak.above_zero and curve.area.value < 0
    assert curve.width.value is None and "the area" in curve.width.reason


@pytest.mark.parametrize(("period", "n_tokens"), [(64, 6400), (16, 6400), (256, 3584)])
def test_noise_gives_findings_at_no_more_than_the_stated_rate(period, n_tokens):
    found = curves(*noise_with([], repetitions=150, n_tokens=n_tokens, period=period, level=0.3))
    assert np.mean([curve.found for curve in found]) <= 0.1


def test_a_pointwise_band_would_claim_too_much():
    """Control of the method: some lag of pure noise lies outside its own band nearly always."""
    found = curves(*noise_with([], repetitions=40))
    assert np.mean([(curve.low[32:] > curve.level.value).any() for curve in found]) > 0.3


def test_single_events_would_be_too_few_pieces():
    """Control of the grouping: at short periods events of correlated noise are not independent."""
    noise = correlated((30, 2048), np.random.default_rng(3), memory=0.95)
    events = np.arange(0, 2048, 4)

    def held(block_tokens):
        found = curves(noise, events, block_tokens=block_tokens)
        return holds([curve.level for curve in found], 0)

    assert held(256) > held(1) + 0.3


def test_cycles_are_laid_side_by_side():
    values = np.arange(100, 112).astype(float)
    lags, table = event_cycles(values, np.arange(10, 22), np.array([12, 18]), before=4)
    assert lags.tolist() == list(range(-4, 6))
    rows = [[x if np.isfinite(x) else None for x in row] for row in table]
    first = [None, None, 100, 101, 102, 103, 104, 105, 106, 107]
    second = [None, 105, 106, 107, 108, 109, 110, 111, None, None]  # at most half a cycle before the event
    assert rows == [first, second]


def test_missing_tokens_are_left_out():
    values, events = noise_with(np.full(4, 2.0), repetitions=1)
    values[0, 5::7] = np.nan
    keep = np.arange(values.shape[1]) % 11 > 0
    curve = event_curve(values[0][keep], np.flatnonzero(keep), events)
    assert curve.area.low <= 8 <= curve.area.high and curve.peak.above_zero
    assert curve.events.max() < 100


def test_an_event_at_every_token_has_no_spike():
    values = np.random.default_rng(0).normal(1, 1, 500)
    curve = event_curve(values, np.arange(500), np.arange(500))
    assert curve.area.value is None and "every token" in curve.area.reason and not curve.found


@pytest.mark.parametrize("n_events", [0, 1, 5])
def test_too_few_events_give_no_interval_but_a_reason(n_events):
    values = np.random.default_rng(0).normal(1, 1, 400)
    curve = event_curve(values, np.arange(400), np.arange(n_events) * 80)
    assert curve.area.low is None and curve.area.reason and not curve.found


@pytest.mark.parametrize("n_events", [2, 6])
def test_few_events_have_figures_where_the_run_begins_with_one(n_events):
    """Before the first event there is no text, so that one event fewer has a level; that is no reason to give none."""
    values = np.tile(np.r_[np.full(4, 0.5), np.zeros(60)], n_events)
    curve = event_curve(values, np.arange(values.size), np.arange(n_events) * 64)
    assert curve.area.value == pytest.approx(2) and curve.peak.value == pytest.approx(0.5)
    assert curve.area.low is None and f"{n_events} groups" in curve.area.reason and not curve.found


def test_no_difference_at_all_is_exactly_none():
    curve = event_curve(np.zeros(6400), np.arange(6400), np.arange(0, 6400, 64))
    assert (curve.peak.value, curve.peak.low, curve.peak.high, curve.area.high) == (0, 0, 0, 0)
    assert not curve.found


def test_blocks_without_tokens_are_refused():
    with pytest.raises(ValueError, match="block_tokens=0"):
        event_curve(np.zeros(100), np.arange(100), np.arange(0, 100, 10), block_tokens=0)


def test_noise_is_that_of_the_long_run():
    """AR(1) noise of unit innovation and memory 0.8 has a long-run deviation of 1 / (1 − 0.8)."""
    values = 0.1 + correlated((200_000,), np.random.default_rng(5), memory=0.8)
    seen = resolution(values, block_tokens=512)
    assert seen.noise == pytest.approx(5, rel=0.06)
    assert seen.z == pytest.approx(seen.mean / (seen.noise / np.sqrt(200_000)))
    assert resolution(values, block_tokens=1).noise < 2, "single tokens would promise too much"
    assert resolution(values[:100]) is None


def test_the_tokens_needed_are_enough_and_not_too_many():
    noise = correlated((1, 60_000), np.random.default_rng(6), memory=0.5)[0] * 0.05
    needed = resolution(noise).tokens_needed(1.0)
    rows = correlated((200, needed), np.random.default_rng(7), memory=0.5) * 0.05 + np.log1p(0.01)
    ways = (Bootstrap(resamples=300, seed=i) for i in range(len(rows)))
    found = [paired_delta_ppl(row, np.zeros(needed), bootstrap=way).excludes_zero for row, way in zip(rows, ways)]
    assert 0.68 <= np.mean(found) <= 0.92
    assert resolution(noise).tokens_needed(0.5) == pytest.approx(4 * needed, rel=0.03)
    with pytest.raises(ValueError, match="delta_percent=0"):
        resolution(noise).tokens_needed(0)
