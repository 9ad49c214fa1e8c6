"""Comparing times: the ratio of two runs that took turns, with its interval, and the line of time against bytes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from sinkstream.statistics.bootstrap import ratio_interval

MIN_PAIRS = 8
RESAMPLES = 5000


@dataclass(frozen=True)
class Ratio:
    """A ratio of sums with its percentile-bootstrap interval; `low` and `high` are None with fewer than 8 pairs."""

    value: float
    low: float | None
    high: float | None
    pairs: int
    confidence: float

    def __str__(self) -> str:
        interval = "no interval" if self.low is None else f"{self.low:.4f} – {self.high:.4f}"
        return f"{self.value:.4f} [{interval}]"


def ratio_of_times(
    seconds: Sequence[float], base_seconds: Sequence[float], *, confidence: float = 0.95, seed: int = 0
) -> Ratio:
    """Time of one run over that of another, from chunks of equally many tokens that took turns.

    Pairs of chunks are resampled, so that a drift which both share cancels out.

    Parameters
    ----------
    seconds, base_seconds : (chunks,) float
        Seconds of chunk i of either run.

    Raises ValueError: the chunks do not pair, or there is none.
    """
    own, base = np.asarray(seconds, dtype=np.float64), np.asarray(base_seconds, dtype=np.float64)
    if own.shape != base.shape or own.ndim != 1 or own.size == 0:
        raise ValueError(f"chunks of shape {own.shape} and {base.shape}: expected equally many, at least one")
    value = float(own.sum() / base.sum())
    if own.size < MIN_PAIRS:
        return Ratio(value, None, None, own.size, confidence)
    if np.ptp(own / base) == 0:
        return Ratio(value, value, value, own.size, confidence)
    interval = ratio_interval(own, base, resamples=RESAMPLES, confidence=confidence, seed=seed)
    return Ratio(value, *interval, own.size, confidence)


@dataclass(frozen=True)
class TimeLine:
    """Time = `fixed_ms` + bytes / `gbs`, by least squares."""

    gbs: float  # speed at which more bytes are read, in GB/s (1e9 bytes): 1 / slope
    slope_ms_per_gb: float
    fixed_ms: float
    r_squared: float


def time_against_bytes(sizes: Sequence[float], milliseconds: Sequence[float]) -> TimeLine | None:
    """The least-squares line of time against bytes; None with fewer than three different sizes."""
    if len(set(sizes)) < 3:
        return None
    gb = np.asarray(sizes, dtype=np.float64) / 1e9
    found = stats.linregress(gb, np.asarray(milliseconds, dtype=np.float64))
    slope = float(found.slope)
    return TimeLine(float("inf") if slope == 0 else 1e3 / slope, slope, float(found.intercept), float(found.rvalue**2))
