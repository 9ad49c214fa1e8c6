"""The interval of a share: Wilson's, which does not shrink to nothing where all or none are hits."""

from math import sqrt
from statistics import NormalDist

from sinkstream.statistics.bootstrap import Estimate


def proportion(hits: int, trials: int, confidence: float = 0.95) -> Estimate:
    """Share of hits with its Wilson score interval. Source: Wilson 1927, doi:10.1080/01621459.1927.10502953.

    Raises ValueError unless 0 <= hits <= trials.
    """
    if not 0 <= hits <= trials:
        raise ValueError(f"hits = {hits} of {trials} trials: must lie between 0 and the trials")
    if trials == 0:
        return Estimate(reason="nothing was asked")
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share, spread = hits / trials, z * z / trials
    middle = (share + spread / 2) / (1 + spread)
    half = z * sqrt(share * (1 - share) / trials + spread / (4 * trials)) / (1 + spread)
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return Estimate(share, 0.0 if hits == 0 else low, 1.0 if hits == trials else high)
