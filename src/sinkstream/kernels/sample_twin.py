"""The twin of `sample`: the same integers in plain PyTorch functions, with a sort where the kernel searches."""

import torch

from sinkstream.kernels.fixed_point import (
    FRACTION,
    LIMIT,
    ONE,
    exp2_minus,
    log2_of_one_plus,
    log2_ratio,
    weight_of,
)
from sinkstream.kernels.sample_table import (
    FREQUENCY,
    KIND,
    MIN_P,
    MOST,
    PLAIN,
    PRESENCE,
    REPETITION,
    SCALE,
    SEED,
    THRESHOLD,
    TOP_K,
    TOP_P,
    SampleTable,
)

WORD = (1 << 32) - 1
MOST_KEY = 2.0**61  # keys of a float beyond are cut to it, so that they fit an int64
LOG2_LN2 = -8871228  # Q24


def processed(logits: torch.Tensor, table: SampleTable) -> torch.Tensor:
    """Logits with biases and penalties, ``(streams, vocab)`` float32; the others unchanged."""
    if table.counts is None or table.bias is None:
        return logits
    repetition, presence, frequency = (
        table.numbers[:, column, None].float() for column in (REPETITION, PRESENCE, FREQUENCY)
    )
    found = logits + table.bias
    seen, drawn = table.counts > 0, (table.counts & MOST).float()
    found = torch.where(seen, torch.where(found < 0, found * repetition, found / repetition), found)
    found = found - frequency * drawn
    return found - torch.where(drawn > 0, presence, 0.0)


def keys(logits: torch.Tensor, table: SampleTable) -> torch.Tensor:
    """Base-2 logarithm of unnormalised probabilities, Q24 int64, ``(streams, vocab)``; logits are `processed`.

    Of streams with thresholds relative to the likeliest token.
    """
    top = torch.where(logits.isnan(), torch.inf, logits).amax(-1, keepdim=True)
    base = torch.where(table.settings[:, KIND, None] == THRESHOLD, top, 0.0)
    key = (logits - base) * table.numbers[:, SCALE, None].float()
    return torch.where(key.isnan(), -MOST_KEY, key.clamp(-MOST_KEY, MOST_KEY)).long()


def largest_key(below: torch.Tensor, table: SampleTable) -> torch.Tensor:
    """The largest key that may be drawn, ``(streams, 1)`` int64.

    Parameters
    ----------
    below : Tensor, (streams, vocab), int64
        How far each token is below the likeliest one, in [0, LIMIT].
    """
    ascending = below.sort(-1).values
    k = table.settings[:, TOP_K, None]
    kth = ascending.gather(1, (k - 1).clamp(0, below.shape[1] - 1))
    limit = torch.where(k > 0, kth, LIMIT)
    weights = weight_of(ascending, exp2_minus) * (ascending <= limit)
    sums = weights.cumsum(-1)
    first = torch.searchsorted(ascending, ascending)  # the first of equal keys
    above = (sums - weights).gather(1, first)
    p = table.numbers[:, TOP_P, None]
    target = (sums[:, -1:].double() * p).long().clamp(min=1)
    reached = torch.where(above < target, ascending, 0).amax(-1, keepdim=True)
    limit = torch.where(p < 1, torch.minimum(limit, reached), limit)
    return torch.minimum(limit, table.settings[:, MIN_P, None])


def weights(logits: torch.Tensor, table: SampleTable) -> torch.Tensor:
    """Relative probabilities that streams with thresholds draw by, Q40 int64, ``(streams, vocab)``."""
    logits = processed(logits, table)
    below = (-keys(logits, table)).clamp(max=LIMIT)
    return weight_of(below, exp2_minus) * (below <= largest_key(below, table))


def philox(seeds: torch.Tensor, blocks: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Philox4x32-10.

    Parameters
    ----------
    seeds, positions : Tensor, (streams,), int64
        The key, and the second word of the counter.
    blocks : Tensor, (blocks,), int64
        The first word of the counter; the others are 0.

    Returns
    -------
    Tensor, (streams, blocks, 4), int64
        Whole numbers below 2^32.
    """
    c0 = blocks.expand(len(seeds), -1)
    c1 = (positions[:, None] & WORD).expand_as(c0)
    c2 = c3 = torch.zeros_like(c0)
    k0, k1 = seeds[:, None] & WORD, (seeds[:, None] >> 32) & WORD
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2  # of which bit 63 may be the sign
        c0, c1, c2, c3 = ((b >> 32) & WORD) ^ c1 ^ k0, b & WORD, ((a >> 32) & WORD) ^ c3 ^ k1, a & WORD
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return torch.stack([c0, c1, c2, c3], -1)


def log2(x: torch.Tensor) -> torch.Tensor:
    """Base-2 logarithm of whole numbers from 1, Q24 int64; of the nearest float32."""
    bits = x.float().view(torch.int32).long()
    return (((bits >> 23) - 127) << FRACTION) + (log2_of_one_plus((bits & 8388607) << 9) >> 6)


def log2_exponential(words: torch.Tensor) -> torch.Tensor:
    """Base-2 logarithm of exponential random numbers, Q24 int64, of random words below 2^32.

    A word v stands for V = (v + 1/2) / 2^32 and the number -ln(1 - V), so that small ones, which win, are exact.
    """
    small = words < 1 << 31
    x = 2 * torch.where(small, words, WORD - words) + 1
    logarithm = log2(x) - 33 * ONE
    near = logarithm + (log2_ratio(torch.where(small, words, 0)) >> 6)
    far = log2(-logarithm) - FRACTION * ONE + LOG2_LN2
    return torch.where(small, near, far)


def sample_twin(logits: torch.Tensor, positions: torch.Tensor, table: SampleTable) -> torch.Tensor:
    """As `sample`: next token of every stream, ``(streams,)`` int64; -1 where there is nothing to draw from."""
    logits = processed(logits, table)
    kind, vocab = table.settings[:, KIND, None], logits.shape[1]
    key = keys(logits, table)
    blocks = torch.arange(-(-vocab // 4), device=logits.device)
    words = philox(table.settings[:, SEED], blocks, positions).flatten(1)[:, :vocab]
    race = (key - log2_exponential(words)).float()
    race = race.masked_fill(logits.isneginf(), -torch.inf)
    if bool((kind == THRESHOLD).any()):
        below = (-key).clamp(0, LIMIT)
        allowed = (below <= largest_key(below, table)) | (kind != THRESHOLD)
        race = race.masked_fill(~allowed, -torch.inf)
    wrong = logits.isnan() | logits.isposinf()
    race = race.masked_fill(wrong, torch.inf)
    most = torch.finfo(torch.float32).max
    best = torch.where(kind == PLAIN, logits.nan_to_num(most), race).max(-1)
    return torch.where(best.values.isinf(), -1, best.indices)
