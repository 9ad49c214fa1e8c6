"""Spans: the tokens that come back for the best blocks of a chooser: block and neighbours, cut at borders."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sinkstream.archive.choosers import Hits


@dataclass(frozen=True)
class Span:
    """Tokens ``first <= index < end`` of the stream that came back.

    Attributes
    ----------
    first, end : int
    turn : int or None
        Number of the turn that the first token is in, where turns were told.
    text : str or None
        Where the cache has the tokenizer.
    """

    first: int
    end: int
    turn: int | None = None
    text: str | None = None


def chosen_tokens(
    hits: Hits,
    block: int,
    *,
    held: range,
    budget: int,
    least: float,
    border: Callable[[int], bool],
    whole: bool,
) -> list[int]:
    """The tokens that come back, ascending.

    Blocks are taken by their score, each with the block before and the block behind; of equal scores, the more recent.

    Parameters
    ----------
    hits : Hits
    block : int
        Block b is the tokens b * block to (b + 1) * block - 1.
    held : range
        Tokens that the archive holds.
    budget : int
        The most tokens that come back.
    least : float
        Blocks of a lower score, and of 0 or less, stay where they are.
    border : callable
        Whether a sentence or a turn begins at a token.
    whole : bool
        Whether the tokens of the block behind end with a sentence as well: a question wants statements; a text that
        goes on wants what comes next.
    """
    taken: set[int] = set()
    near = (hits.blocks >= held.start // block - 1) & (hits.blocks * block <= held.stop - 1 + block)
    wanted = near & (hits.scores > 0) & (hits.scores >= least)
    numbers, scores = hits.blocks[wanted], hits.scores[wanted]
    order = numbers[np.lexsort((-numbers, -scores))]
    for number in order[: 2 * budget + 2].tolist():  # as many bring a token, or are taken already
        if len(taken) >= budget:
            break
        hit = range(number * block, (number + 1) * block)
        span = _span(hit, block, border, whole)
        new = set(range(max(span.start, held.start), min(span.stop, held.stop))) - taken
        if len(new) > budget - len(taken):  # the hit itself before its neighbours, those nearest to it first
            new = set(sorted(new, key=lambda t: (_distance(t, hit), t))[: budget - len(taken)])
        taken |= new
    return sorted(taken)


def _span(hit: range, block: int, border: Callable[[int], bool], whole: bool) -> range:
    """The hit with its neighbours, cut where a sentence begins, if one does there."""
    before = range(hit.start, hit.start - block - 1, -1)
    first = next((t for t in before if border(t)), hit.start - block)
    behind = range(hit.stop + block, hit.stop - 1, -1)
    end = next((t for t in behind if border(t)), hit.stop + block) if whole else hit.stop + block
    return range(first, end)


def _distance(token: int, hit: range) -> int:
    """Of a token to the hit; 0 within it."""
    return max(0, hit.start - token, token - hit.stop + 1)


def runs(tokens: list[int]) -> list[tuple[int, int]]:
    """Runs ``(first, end)`` of consecutive tokens in an ascending sequence."""
    found: list[tuple[int, int]] = []
    for token in tokens:
        if found and found[-1][1] == token:
            found[-1] = (found[-1][0], token + 1)
        else:
            found.append((token, token + 1))
    return found
