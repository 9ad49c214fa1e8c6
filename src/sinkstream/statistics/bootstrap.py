"""Figures with their intervals, and the percentile bootstrap of a ratio of sums (by scipy) that gives these."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A figure and its interval."""

    value: float | None = None  # None if the figure does not exist
    # low, high: the interval; None with a `reason` where it cannot be given
    low: float | None = None
    high: float | None = None
    reason: str | None = None  # why value or interval is missing

    @property
    def above_zero(self) -> bool:
        """Whether the interval says that the figure is positive."""
        return self.low is not None and self.low > 0

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.above_zero or (self.high is not None and self.high < 0)


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are computed. Raises ValueError, naming the option, the value and what is accepted."""

    resamples: int = 2000
    confidence: float = 0.95  # nominal coverage
    seed: int = 0
    batch: int | None = 500  # resamples held in memory at once; None: all

    def __post_init__(self) -> None:
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence = {self.confidence}: must lie between 0 and 1")
        if self.resamples < 1:
            raise ValueError(f"resamples = {self.resamples}: must be 1 or more")

    def ratio_interval(self, tops: np.ndarray, bottoms: np.ndarray) -> tuple[float, float]:
        """Percentile interval of sum(tops) / sum(bottoms), each (pairs,), the pairs resampled together."""
        return _ratio_interval(
            self, *(part for array in (tops, bottoms) for part in (array.tobytes(), array.dtype.str))
        )


@lru_cache(maxsize=4096)
def _ratio_interval(
    how: Bootstrap, tops: bytes, top_dtype: str, bottoms: bytes, bottom_dtype: str
) -> tuple[float, float]:
    """As `Bootstrap.ratio_interval`, from the bytes of the arrays: a report asks for one interval in several tables."""
    from scipy import stats  # slow to import

    found = stats.bootstrap(
        (np.frombuffer(tops, top_dtype), np.frombuffer(bottoms, bottom_dtype)),
        lambda top, bottom, axis=-1: top.sum(axis=axis) / bottom.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=how.resamples,
        batch=how.batch,
        confidence_level=how.confidence,
        method="percentile",
        rng=np.random.default_rng(how.seed),
    ).confidence_interval
    return float(found.low), float(found.high)


DEFAULT = Bootstrap()
