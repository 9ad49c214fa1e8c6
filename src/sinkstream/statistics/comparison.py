"""Comparing times: the ratio of two runs that took turns, with its interval, and the line of time against bytes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sinkstream.statistics.bootstrap import Bootstrap

MIN_PAIRS = 8
BOOTSTRAP = Bootstrap(resamples=5000, batch=None)


@dataclass(frozen=True)
class Ratio:
    """A ratio of sums with its 95 % bootstrap interval; `low` and `high` are None with fewer than 8 pairs."""

    value: float
    low: float | None
    high: float | None
    pairs: int

    def __str__(self) -> str:
        interval = "no interval" if self.low is None else f"{self.low:.4f} – {self.high:.4f}"
        return f"{self.value:.4f} [{interval}]"


def ratio_of_times(seconds: Sequence[float], base_seconds: Sequence[float]) -> Ratio:
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
        return Ratio(value, None, None, own.size)
    if np.ptp(own / base) == 0:
        return Ratio(value, value, value, own.size)
    return Ratio(value, *BOOTSTRAP.ratio_interval(own, base), own.size)


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
    from scipy import stats  # slow to import

    gb = np.asarray(sizes, dtype=np.float64) / 1e9
    found = stats.linregress(gb, np.asarray(milliseconds, dtype=np.float64))
    slope = float(found.slope)
    return TimeLine(float("inf") if slope == 0 else 1e3 / slope, slope, float(found.intercept), float(found.rvalue**2))
