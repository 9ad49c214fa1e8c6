"""The percentile bootstrap of a ratio of sums, by scipy."""

import numpy as np
from scipy import stats


def ratio_interval(
    tops: np.ndarray, bottoms: np.ndarray, *, resamples: int, confidence: float, seed: int, batch: int | None = None
) -> tuple[float, float]:
    """Interval of sum(tops) / sum(bottoms), the pairs resampled together.

    Parameters
    ----------
    tops, bottoms : (pairs,) float or int
    confidence : float
        Nominal coverage.
    batch : int or None
        Resamples held in memory at once; default: all.
    """
    found = stats.bootstrap(
        (tops, bottoms),
        lambda top, bottom, axis=-1: top.sum(axis=axis) / bottom.sum(axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        batch=batch,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)
