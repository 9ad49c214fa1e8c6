"""Intervals of paired differences of perplexity and of means, by a block bootstrap.

Per-token NLLs of a text are correlated, so tokens can not be resampled one by one. Contiguous blocks of tokens are
resampled instead, each carrying its sum and its number of scored tokens; a ratio of sums handles blocks of unequal
size. The interval is the percentile one: on correlated noise its coverage was as near nominal as BCa's, and it has no
degenerate cases.
"""

import math
from dataclasses import dataclass

import numpy as np

from sinkstream.statistics.bootstrap import DEFAULT, Bootstrap, Estimate

BLOCK_TOKENS = 64
MIN_BLOCKS = 8


@dataclass(frozen=True)
class PairedDelta:
    """Change of perplexity against a control on the same tokens, in percent, with its interval.

    `low` and `high` are None with a `reason` when there are too few blocks; `delta_percent` is None without any
    common token. Without a `reason` a figure that is None is infinite.
    """

    delta_percent: float | None
    low: float | None
    high: float | None
    n_tokens: int
    n_blocks: int
    confidence: float
    reason: str | None = None

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval says that there is a difference."""
        return Estimate(self.delta_percent, self.low, self.high).excludes_zero


def suitable_block_tokens(n_tokens: int) -> int:
    """64 tokens a block; for short texts fewer, so that 20 blocks remain, but never under 8 tokens."""
    return max(8, min(BLOCK_TOKENS, n_tokens // 20))


def paired_delta_ppl(
    nll: np.ndarray,
    control_nll: np.ndarray,
    *,
    positions: np.ndarray | None = None,
    block_tokens: int = BLOCK_TOKENS,
    bootstrap: Bootstrap = DEFAULT,
) -> PairedDelta:
    """Relative difference of perplexity, 100 (exp(mean(nll - control)) - 1), on the tokens that both have scored.

    Parameters
    ----------
    nll, control_nll : (tokens,) float
        NLL in nats of the same tokens in the same order; NaN = not scored.
    positions : (tokens,) int, optional
        Position of each token in the text, increasing, if the arrays have gaps; blocks are contiguous in the text.
    block_tokens : int, default=64
        Length of a block in the text; should exceed the range of the correlation.

    Raises ValueError: arrays of different shape, or an option out of range.
    """
    nll, control_nll = (np.asarray(array, dtype=np.float64) for array in (nll, control_nll))
    if nll.shape != control_nll.shape:
        raise ValueError(
            f"nll has shape {nll.shape} and control_nll {control_nll.shape}: they must pair token by token"
        )
    with np.errstate(invalid="ignore"):
        difference = nll - control_nll
    _, sums, counts = block_sums(difference, positions, block_tokens)
    return delta_of_blocks(sums, counts, block_tokens, bootstrap)


def delta_of_blocks(
    sums: np.ndarray, counts: np.ndarray, block_tokens: int, bootstrap: Bootstrap = DEFAULT
) -> PairedDelta:
    """As `paired_delta_ppl`, from the sums (blocks,) of nll − control_nll and the tokens (blocks,) of each block."""
    mean = mean_of_blocks(sums, counts, block_tokens, bootstrap)
    delta, low, high = (_percent(nats) for nats in (mean.value, mean.low, mean.high))
    return PairedDelta(delta, low, high, int(counts.sum()), counts.size, bootstrap.confidence, mean.reason)


def mean_interval(
    values: np.ndarray,
    *,
    positions: np.ndarray | None = None,
    block_tokens: int = BLOCK_TOKENS,
    bootstrap: Bootstrap = DEFAULT,
) -> Estimate:
    """Mean of the finite values with its interval; parameters as in `paired_delta_ppl`."""
    _, sums, counts = block_sums(values, positions, block_tokens)
    return mean_of_blocks(sums, counts, block_tokens, bootstrap)


def mean_of_blocks(sums: np.ndarray, counts: np.ndarray, block_tokens: int, bootstrap: Bootstrap = DEFAULT) -> Estimate:
    """As `mean_interval`, from the sum (blocks,) and the number (blocks,) of the values of each block."""
    n_tokens, n_blocks = int(counts.sum()), counts.size
    mean = float(sums.sum() / n_tokens) if n_tokens else None
    if n_blocks < MIN_BLOCKS:
        reason = f"{n_blocks} blocks of {block_tokens} tokens; an interval needs at least {MIN_BLOCKS}"
        return Estimate(mean, reason=reason)
    if np.ptp(sums / counts) == 0:
        return Estimate(mean, mean, mean)
    return Estimate(mean, *bootstrap.ratio_interval(sums, counts))


def share_of_blocks(
    part: np.ndarray, whole: np.ndarray, counts: np.ndarray, block_tokens: int, bootstrap: Bootstrap = DEFAULT
) -> Estimate:
    """What share of a mean a part of it makes up, sum(part) / sum(whole), with its interval.

    Blocks are resampled with both their sums. A share of nothing does not exist: without an interval of the whole that
    leaves out zero there is only a reason.

    Parameters
    ----------
    part, whole : (blocks,) float
        Sums over the tokens of each block.
    counts : (blocks,) int
        Tokens of each block.
    """
    if not mean_of_blocks(whole, counts, block_tokens, bootstrap).excludes_zero:
        return Estimate(reason="the interval of the whole holds zero")
    return Estimate(float(part.sum() / whole.sum()), *bootstrap.ratio_interval(part, whole))


def block_sums(
    values: np.ndarray, positions: np.ndarray | None = None, block_tokens: int = BLOCK_TOKENS
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sum and number of the finite values in each block of `block_tokens` positions that has any.

    Parameters
    ----------
    values : (tokens,) float
        NaN and infinite entries are left out.
    positions : (tokens,) int, optional
        Position of each value, increasing; default 0, 1, 2, ...
    block_tokens : int, default=64
        Positions a block, counted from the first position.

    Returns the first position of each block, its sum and its count, each (blocks,).
    """
    if block_tokens < 1:
        raise ValueError(f"block_tokens = {block_tokens}: must be 1 or more")
    values = np.asarray(values, dtype=np.float64)
    positions = np.arange(values.size) if positions is None else np.asarray(positions, dtype=np.int64)
    if values.ndim != 1 or positions.shape != values.shape:
        raise ValueError(f"values have shape {values.shape} and positions {positions.shape}: expected one each a token")
    origin = positions[0] if positions.size else 0
    finite = np.isfinite(values)
    blocks, inverse = np.unique((positions[finite] - origin) // block_tokens, return_inverse=True)
    sums = np.bincount(inverse, weights=values[finite], minlength=blocks.size)
    return origin + blocks * block_tokens, sums, np.bincount(inverse, minlength=blocks.size)


def _percent(nats: float | None) -> float | None:
    """A difference of mean NLL as a change of perplexity in percent; None if missing or infinite."""
    with np.errstate(over="ignore"):
        percent = math.inf if nats is None else float(100 * np.expm1(nats))
    return percent if math.isfinite(percent) else None
