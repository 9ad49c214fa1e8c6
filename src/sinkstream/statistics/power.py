"""How large a difference is against its noise, and how many tokens it takes to see one."""

import math
from dataclasses import dataclass

import numpy as np

from sinkstream.statistics.delta import BLOCK_TOKENS, MIN_BLOCKS, block_sums

CONFIDENCE, POWER = 0.95, 0.8  # of `Resolution.tokens_needed`


@dataclass(frozen=True)
class Resolution:
    """A mean paired difference against its noise."""

    mean: float  # mean difference, nats per token
    # long-run standard deviation a token: the variance of the mean of n tokens is noise² / n, correlation included
    noise: float
    n_tokens: int

    @property
    def effect_size(self) -> float | None:
        """mean / noise, a token (Cohen's d of paired differences); None without noise."""
        return self.mean / self.noise if self.noise else None

    @property
    def z(self) -> float | None:
        """The mean in units of its standard error."""
        return None if self.effect_size is None else self.effect_size * math.sqrt(self.n_tokens)

    def tokens_needed(self, delta_percent: float) -> int:
        """Tokens at which a true ΔPPL of that size gives a 95 % interval without zero in 80 % of all texts.

        Raises ValueError: a ΔPPL of 0 or of −100 % and less.
        """
        if delta_percent <= -100 or delta_percent == 0:
            raise ValueError(f"delta_percent={delta_percent} is not accepted; accepted: above -100, and not 0")
        from scipy import stats  # slow to import

        quantiles = stats.norm.ppf((1 + CONFIDENCE) / 2) + stats.norm.ppf(POWER)
        return math.ceil((quantiles * self.noise / math.log1p(delta_percent / 100)) ** 2)


def resolution(
    values: np.ndarray, positions: np.ndarray | None = None, block_tokens: int = BLOCK_TOKENS
) -> Resolution | None:
    """Mean and long-run noise of paired differences (nats), from the variance between blocks; parameters: `block_sums`.

    None with fewer than `MIN_BLOCKS` blocks.
    """
    _, sums, counts = block_sums(values, positions, block_tokens)
    if counts.size < MIN_BLOCKS:
        return None
    n_tokens, mean = int(counts.sum()), float(sums.sum() / counts.sum())
    residual = sums - mean * counts
    variance = float(np.square(residual).sum()) * counts.size / (counts.size - 1) / n_tokens
    return Resolution(mean, math.sqrt(variance), n_tokens)
