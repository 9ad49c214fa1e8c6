"""How large a difference is against its noise, and how many tokens it takes to see one."""

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

from sinkstream.statistics.delta import BLOCK_TOKENS, MIN_BLOCKS, block_sums


@dataclass(frozen=True)
class Resolution:
    """A mean paired difference against its noise.

    Attributes
    ----------
    mean : float
        Mean difference, nats a token.
    noise : float
        Long-run standard deviation a token: the variance of the mean of n tokens is noise² / n, correlation included.
    n_tokens : int
    effect_size : float or None
        mean / noise, a token (Cohen's d of paired differences); None without noise.
    z : float or None
        The mean in units of its standard error.
    """

    mean: float
    noise: float
    n_tokens: int

    @property
    def effect_size(self) -> float | None:
        return self.mean / self.noise if self.noise else None

    @property
    def z(self) -> float | None:
        return None if self.effect_size is None else self.effect_size * math.sqrt(self.n_tokens)

    def tokens_needed(self, delta_percent: float, *, confidence: float = 0.95, power: float = 0.8) -> int:
        """Tokens at which a true ΔPPL of that size gives an interval without zero in a share `power` of texts.

        Raises ValueError: a ΔPPL of 0 or of −100 % and less, or a confidence or power that is no probability.
        """
        if delta_percent <= -100 or delta_percent == 0:
            raise ValueError(f"delta_percent={delta_percent} is not accepted; accepted: above -100, and not 0")
        if not (0 < confidence < 1 and 0 < power < 1):
            raise ValueError(f"confidence={confidence}, power={power}: accepted: between 0 and 1")
        quantiles = stats.norm.ppf((1 + confidence) / 2) + stats.norm.ppf(power)
        return math.ceil((quantiles * self.noise / math.log1p(delta_percent / 100)) ** 2)


def resolution(
    values: np.ndarray, positions: np.ndarray | None = None, block_tokens: int = BLOCK_TOKENS
) -> Resolution | None:
    """Mean and long-run noise of paired differences, from the variance between blocks.

    Parameters
    ----------
    values, positions, block_tokens
        As in `block_sums`; values in nats.

    Returns
    -------
    Resolution or None
        None with fewer than `MIN_BLOCKS` blocks.
    """
    _, sums, counts = block_sums(values, positions, block_tokens)
    if counts.size < MIN_BLOCKS:
        return None
    n_tokens, mean = int(counts.sum()), float(sums.sum() / counts.sum())
    residual = sums - mean * counts
    variance = float(np.square(residual).sum()) * counts.size / (counts.size - 1) / n_tokens
    return Resolution(mean, math.sqrt(variance), n_tokens)
