"""The event-aligned curve of a paired difference, and the spike in it: peak, width, area, each with an interval.

Whole events are resampled, in contiguous groups of at least `block_tokens` tokens, so that the correlation within a
group is kept. With few groups percentiles of a bootstrap are too narrow; both kinds of interval are widened by
Student's t as Hesterberg (The American Statistician 69, 2015) does.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from sinkstream.statistics.bootstrap import DEFAULT, Bootstrap, Estimate
from sinkstream.statistics.delta import BLOCK_TOKENS, MIN_BLOCKS

BEFORE = AFTER = 32


@dataclass(frozen=True)
class EventCurve:
    """Mean paired difference by distance from the prune event, and the spike above the level before the event."""

    # (lags,) int: tokens since the event (0 is the first token that was predicted with the pruned cache); negative ones
    # count towards the next event
    lags: np.ndarray
    # mean, low, high: (lags,) float: mean difference at each lag in nats, and its pointwise interval (NaN where there
    # are too few events)
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    events: np.ndarray  # (lags,) int: events that each lag averages over
    level: Estimate  # mean difference over the negative lags, in nats per token
    # largest excess over the level in the first `AFTER` lags, in nats. The largest of noisy figures is too large on
    # average; the interval comes from a band that holds all lags at once, so it stays honest
    peak: Estimate
    peak_lag: int | None  # where the peak lies
    # equivalent width, area over peak, in tokens; only where the interval of the peak, and the area, are above zero
    width: Estimate
    area: Estimate  # sum of the excess over the first `AFTER` lags, in nats an event
    # n_events, n_blocks: events, and groups of events that were resampled
    n_events: int
    n_blocks: int
    confidence: float

    @property
    def found(self) -> bool:
        """Whether peak or area is above zero by its interval; on noise at most at the rate 1 − confidence.

        (Each of the two is wrong upwards at half that rate.)
        """
        return self.peak.above_zero or self.area.above_zero


def event_cycles(
    values: np.ndarray, positions: np.ndarray, events: np.ndarray, before: int = BEFORE
) -> tuple[np.ndarray, np.ndarray]:
    """Lay the values around each event side by side.

    A value counts for the last event at or before it, and for the next event if it is at most `before` tokens and at
    most half a cycle away: no value crosses an event, and no short cycle lends its spike to the level before the next.

    Parameters
    ----------
    values : (tokens,) float
        NaN = missing.
    positions : (tokens,) int
        Position of each value in the text, increasing.
    events : (events,) int
        Positions of the first values after each event, increasing.

    Returns the lags (lags,) int and a table (events, lags) float: NaN where an event has no value at a lag.
    """
    values, positions = np.asarray(values, dtype=np.float64), np.asarray(positions, dtype=np.int64)
    events = np.asarray(events, dtype=np.int64)
    if events.size == 0 or positions.size == 0:
        return np.arange(0), np.empty((events.size, 0))
    cycles = np.diff(events)
    typical = int(np.median(cycles)) if cycles.size else before
    last = np.searchsorted(events, positions, side="right") - 1
    since = positions - events[np.maximum(last, 0)]
    until = events[np.minimum(last + 1, events.size - 1)] - positions
    room = np.minimum(before, np.concatenate([[typical], cycles, [0]])[last + 1] // 2)
    after_longest = int(since[last >= 0].max(initial=0))
    lags = np.arange(-before, after_longest + 1)
    table = np.full((events.size, lags.size), np.nan)
    past = last >= 0
    table[last[past], since[past] + before] = values[past]
    ahead = (last + 1 < events.size) & (until <= room)
    table[last[ahead] + 1, before - until[ahead]] = values[ahead]
    return lags, table


def event_curve(
    values: np.ndarray,
    positions: np.ndarray,
    events: np.ndarray,
    *,
    block_tokens: int = BLOCK_TOKENS,
    bootstrap: Bootstrap = DEFAULT,
) -> EventCurve:
    """Average a paired difference by distance from the events, with intervals.

    The `BEFORE` tokens before an event give the level; a spike is looked for in the `AFTER` tokens from the event on.

    Parameters
    ----------
    values : (tokens,) float
        NLL minus the control's NLL on the same token, in nats; NaN = missing.
    positions, events
        As in `event_cycles`.
    block_tokens : int, default=64
        Least length of text that is resampled in one piece; should exceed the range of the correlation.

    Raises ValueError: an option out of range.
    """
    if block_tokens < 1:
        raise ValueError(f"block_tokens={block_tokens} is not accepted; accepted: a whole number of at least 1")
    lags, table = event_cycles(values, positions, events)
    known = np.isfinite(table)
    enough = known.sum(axis=0) >= min(MIN_BLOCKS, max(1, len(table) - 1))  # before the first event there may be no text
    lags, table, known = lags[enough], table[:, enough], known[:, enough]
    counts, totals = known.sum(axis=0), np.nansum(table, axis=0)
    mean = totals / np.maximum(counts, 1)
    group = max(1, math.ceil(block_tokens / max(1.0, float(np.median(np.diff(events)))))) if len(events) > 1 else 1
    starts = np.arange(0, len(table), group)
    n_blocks, unknown = len(starts), np.full_like(mean, np.nan)
    averages = partial(
        EventCurve, lags, mean, events=counts, n_events=len(table), n_blocks=n_blocks, confidence=bootstrap.confidence
    )
    window, level = (lags >= 0) & (lags < AFTER), lags < 0
    if not window.any() or not level.any():
        none = Estimate(reason="an event at every token, or none: there is no level before an event")
        return averages(unknown, unknown, level=none, peak=none, peak_lag=None, width=none, area=none)
    level_mean = float(totals[level].sum() / counts[level].sum())
    excess = mean[window] - level_mean
    if n_blocks < MIN_BLOCKS:
        reason = f"{n_blocks} groups of {group} events; an interval needs at least {MIN_BLOCKS}"
        return averages(
            unknown,
            unknown,
            level=Estimate(level_mean, reason=reason),
            peak=Estimate(float(excess.max()), reason=reason),
            peak_lag=int(excess.argmax()),
            width=Estimate(reason=reason),
            area=Estimate(float(excess.sum()), reason=reason),
        )
    sums = np.add.reduceat(np.nan_to_num(table), starts, axis=0)
    numbers = np.add.reduceat(known.astype(np.float64), starts, axis=0)
    rng, resamples = np.random.default_rng(bootstrap.seed), bootstrap.resamples
    draws = rng.multinomial(n_blocks, np.full(n_blocks, 1 / n_blocks), size=resamples)
    drawn_sums, drawn_numbers = draws @ sums, draws @ numbers
    with np.errstate(invalid="ignore", divide="ignore"):
        means = drawn_sums / drawn_numbers
        levels = drawn_sums[:, level].sum(axis=1) / drawn_numbers[:, level].sum(axis=1)
    means = np.where(np.isfinite(means), means, mean)  # a lag that a resample happens to miss
    quantiles = _widened(bootstrap.confidence, n_blocks)
    low, high = np.quantile(means, quantiles, axis=0)
    level_low, level_high = np.quantile(levels, quantiles)
    spike = _spike(excess, means[:, window] - levels[:, None], bootstrap.confidence, n_blocks)
    return averages(low, high, level=Estimate(level_mean, float(level_low), float(level_high)), **spike)


def _spike(excess: np.ndarray, drawn: np.ndarray, confidence: float, n_blocks: int) -> dict[str, Any]:
    """Peak, width and area of the excess `(lags,)`, from its resamples `(resamples, lags)`."""
    from scipy import stats  # slow to import

    error = drawn.std(axis=0, ddof=1) * math.sqrt(n_blocks / (n_blocks - 1))
    away = np.abs(drawn - excess)
    largest = np.divide(away, error, out=np.zeros_like(away), where=error > 0).max(axis=1)
    margin = stats.t.isf(stats.norm.sf(np.quantile(largest, confidence)), n_blocks - 1) * error
    at = int(excess.argmax())
    peak = Estimate(float(excess[at]), float((excess - margin).max()), float((excess + margin).max()))
    areas = drawn.sum(axis=1)
    area_low, area_high = np.quantile(areas, _widened(confidence, n_blocks))
    width = Estimate(reason="the interval of the peak is not above zero, or the area is not")
    if peak.above_zero and excess.sum() > 0:
        low, high = np.quantile(areas / drawn[:, at], _widened(confidence, n_blocks))
        width = Estimate(float(excess.sum() / excess[at]), float(low), float(high))
    area = Estimate(float(excess.sum()), float(area_low), float(area_high))
    return {"peak": peak, "peak_lag": at, "width": width, "area": area}


def _widened(confidence: float, n_blocks: int) -> tuple[float, float]:
    """Quantiles of a bootstrap whose interval has the length of Student's."""
    from scipy import stats  # slow to import

    tail = stats.t.ppf((1 - confidence) / 2, n_blocks - 1) * math.sqrt(n_blocks / (n_blocks - 1))
    return float(stats.norm.cdf(tail)), float(stats.norm.sf(tail))
