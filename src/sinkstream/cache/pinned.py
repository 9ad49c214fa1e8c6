"""Pinned tokens, for every cache: who competes for the pinned slots, what is known of them, and the frame they lie in.

A soft ring keeps its tokens in stream order, a static ring goes round; `Held` is the view that both give of themselves.
Keys that move to another position are rotated from float32 copies that were never rotated in half precision twice.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from sinkstream.cache.rope import Rope
from sinkstream.policies import Candidates, Scorer, select

SLOT_AXIS = 3  # of buffers (layers, batch, kv_heads, slots, ...)


@dataclass(frozen=True)
class Held:
    """What a stream holds just before a prune. Entries are counted in stream order: sinks, refreshed tokens, window.

    Attributes
    ----------
    rope : Rope
    sink, pinned, window : int
        Sinks; entries of the pinned frame, sinks included; window tokens.
    first_window : int
        Token index of the oldest window token.
    base : int
        Token index that window position 0 stands for.
    frame_shift : int
        How many positions the pinned keys lie behind their place before the window.
    keys, values : Tensor, (layers, batch, kv_heads, slots, head_dim)
    channels : dict of Tensor, (layers or 1, batch, kv_heads or 1, slots)
    pinned_keys : Tensor, (layers, batch, kv_heads, at least pinned, head_dim), float32
        Not rotated; only the refreshed ones are read.
    refreshed : Tensor, (layers or 1, batch or 1, kv_heads or 1, pinned - sink), int64
        Token indices of the refreshed tokens.
    read : callable
        ``read(buffer, first, count)`` gives `count` entries of a buffer, from entry `first` on: a view or a copy.
    """

    rope: Rope
    sink: int
    pinned: int
    window: int
    first_window: int
    base: int
    frame_shift: int
    keys: torch.Tensor
    values: torch.Tensor
    channels: dict[str, torch.Tensor]
    pinned_keys: torch.Tensor
    refreshed: torch.Tensor
    read: Callable[[torch.Tensor, int, int], torch.Tensor]


@dataclass(frozen=True)
class Queries:
    """The latest queries of a stream, rotated for the window.

    Attributes
    ----------
    kept : int
        How many are kept at the most.
    scaling : float
        Of attention scores.
    latest : callable
        ``latest(layer, count)`` gives the last `count` of them, ``(batch, query_heads, count, head_dim)``.
    """

    kept: int
    scaling: float
    latest: Callable[[int, int], torch.Tensor]


@dataclass(frozen=True)
class Refreshed:
    """The tokens that stay pinned behind the sinks, oldest first.

    Attributes
    ----------
    keys : Tensor, (layers, batch, kv_heads, refresh, head_dim), float32
        Not rotated.
    values : Tensor, the same shape, in the dtype of the cache
    channels : dict of Tensor, (layers or 1, batch, kv_heads or 1, refresh)
    positions : Tensor, (layers or 1, batch or 1, kv_heads or 1, refresh), int64
        Token indices.
    """

    keys: torch.Tensor
    values: torch.Tensor
    channels: dict[str, torch.Tensor]
    positions: torch.Tensor


# ---- who stays ----


@torch.no_grad()
def refresh(
    held: Held, leaving: int, scorer: Scorer, keep: int, attention: Callable[[Held, int], torch.Tensor] | None
) -> Refreshed:
    """Let the refreshed tokens and the `leaving` oldest window tokens compete, and gather what the best hold.

    Parameters
    ----------
    keep : int
        How many tokens stay.
    attention : callable or None
        What the latest queries give to the candidates, as `candidate_attention` does, asked where the scorer needs it.

    Raises
    ------
    ValueError
        If the scores fit neither the candidates nor what the scorer says of its heads.
    """
    count = held.pinned - held.sink + leaving
    entries = {n: held.read(c, held.sink, count) for n, c in held.channels.items()}
    keys, positions = candidate_keys(held, leaving), candidate_positions(held, leaving)
    known = {n: entries[n] for n in entries if n in scorer.needs}
    if "key_norm" in scorer.needs:
        known["key_norm"] = keys.norm(dim=-1)
    if "attention" in scorer.needs:
        assert attention is not None, "a scorer that reads attention is given it"
        known["attention"] = attention(held, leaving)
    scores = scorer.score(Candidates(position=positions, **known))
    _check_scores(scores, scorer, count)
    index = select(scores, keep)
    return Refreshed(
        keys=_take(keys, index),
        values=_take(held.read(held.values, held.sink, count), index),
        channels={n: _take(c, index) for n, c in entries.items()},
        positions=_take(positions, index),
    )


def candidate_positions(held: Held, leaving: int) -> torch.Tensor:
    """Token indices of the candidates, ``(layers or 1, batch or 1, kv_heads or 1, candidates)``, int64."""
    leave = torch.arange(held.first_window, held.first_window + leaving, device=held.refreshed.device)
    return torch.cat([held.refreshed, leave.expand(*held.refreshed.shape[:SLOT_AXIS], leaving)], SLOT_AXIS)


def candidate_keys(held: Held, leaving: int) -> torch.Tensor:
    """Unrotated keys of the candidates, ``(layers, batch, kv_heads, candidates, head_dim)``, float32."""
    leave = unrotated(held.rope, held.read(held.keys, held.pinned, leaving), held.first_window - held.base)
    return torch.cat([held.pinned_keys[..., held.sink : held.pinned, :], leave], SLOT_AXIS)


def candidate_attention(held: Held, leaving: int, queries: Queries) -> torch.Tensor:
    """Attention that the latest queries give to the candidates, at their present places in the cache.

    Queries whose tokens have left the window are not asked: they have no position any more.

    Returns
    -------
    Tensor, (layers, batch, kv_heads, candidates), float32
        Summed over the queries, mean over the query heads of a kv head.
    """
    live, asked = held.pinned + held.window, min(queries.kept, held.window)
    entry = torch.arange(live, device=held.keys.device)  # every pinned entry comes before every query that is asked
    hidden = entry > entry[live - asked :, None]
    rows = []
    for layer, keys in enumerate(held.keys.split(1)):
        query, key = queries.latest(layer, asked), held.read(keys, 0, live)[0]
        pinned_query = turned_back(held.rope.layer(layer), query, held.frame_shift) if held.frame_shift else None
        rows.append(attention_received(query, key, hidden, queries.scaling, held.pinned, pinned_query))
    return torch.stack(rows)[..., held.sink : held.pinned + leaving]


def attention_received(
    query: torch.Tensor,
    key: torch.Tensor,
    hidden: torch.Tensor,
    scaling: float,
    pinned: int = 0,
    pinned_query: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention that every key receives, summed over the queries, mean over the query heads of a kv head.

    Parameters
    ----------
    query : Tensor, (batch, query_heads, asked, head_dim)
    key : Tensor, (batch, kv_heads, cached, head_dim)
    hidden : Tensor, (asked, cached), bool
        Keys that a query does not see.
    scaling : float
    pinned : int
        How many of the keys, the first ones, are met by `pinned_query`.
    pinned_query : Tensor or None, as `query`
        The queries where they stand in the pinned frame; None: the same.

    Returns
    -------
    Tensor, (batch, kv_heads, cached), float32
    """
    parts = [(query, key)]
    if pinned_query is not None:
        parts = [(pinned_query, key[:, :, :pinned]), (query, key[:, :, pinned:])]
    found = [torch.einsum("bhgqd,bhkd->bhgqk", q.float().unflatten(1, (key.shape[1], -1)), k.float()) for q, k in parts]
    scores = found[0] if len(found) == 1 else torch.cat(found, -1)
    return (scores * scaling).masked_fill(hidden, float("-inf")).softmax(-1).sum(3).mean(2)


def _check_scores(scores: torch.Tensor, scorer: Scorer, count: int) -> None:
    shape = tuple(scores.shape)
    if len(shape) != 4 or shape[-1] != count or not (scorer.per_head or shape[0] == shape[2] == 1):
        axes = "(layers or 1, batch or 1, kv_heads or 1, " if scorer.per_head else "(1, batch or 1, 1, "
        raise ValueError(
            f"{type(scorer).__name__} with per_head={scorer.per_head} gave scores of shape {shape}; accepted:"
            f" {axes}{count})"
        )


def _take(entries: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Entries ``(..., candidates)`` or ``(..., candidates, head_dim)`` by index; the three leading axes broadcast."""
    lead = torch.broadcast_shapes(entries.shape[:SLOT_AXIS], index.shape[:SLOT_AXIS])
    index, rest = index.expand(*lead, -1), entries.shape[SLOT_AXIS + 1 :]
    for size in rest:
        index = index[..., None].expand(*index.shape, size)
    return entries.expand(*lead, *entries.shape[SLOT_AXIS:]).gather(SLOT_AXIS, index)


# ---- where they lie ----


def unrotated(rope: Rope, keys: torch.Tensor, first: int) -> torch.Tensor:
    """Float32 copies of keys ``(..., count, head_dim)`` at positions `first`, `first` + 1, …, not rotated."""
    positions = torch.arange(first, first + keys.shape[-2], device=keys.device)
    return rope.unrotate(keys, *rope.angles(positions))


def frame_phases(rope: Rope, tokens: torch.Tensor, *, base: int, first: int | None) -> torch.Tensor:
    """Rotations of pinned entries.

    Parameters
    ----------
    tokens : Tensor, (layers or 1, batch or 1, kv_heads or 1, count), int64
        Their token indices.
    base : int
        Token index of position 0; only original positions depend on it.
    first : int or None
        Position of the first of them, the others behind it without a gap; None: original positions.

    Returns
    -------
    Tensor, (..., count, rotary_dim / 2), complex64
    """
    if first is None:
        return rope.phases(tokens - base)
    return rope.phases_from(first, tokens.shape[-1], tokens.device)


def write_rotated(
    rope: Rope, slots: torch.Tensor, keys: torch.Tensor, phases: torch.Tensor, pairs: torch.Tensor | None = None
) -> None:
    """Write unrotated float32 keys over `slots`, rotated by `phases`, in the dtype of the slots.

    Parameters
    ----------
    slots, keys : Tensor, (layers, batch, kv_heads, count, head_dim)
    pairs : Tensor or None
        ``rope.pairs(keys)``, where it is kept.
    """
    rope.write_rotated(slots, rope.pairs(keys) if pairs is None else pairs, phases)
    if rope.rotary_dim < keys.shape[-1]:
        slots[..., rope.rotary_dim :].copy_(keys[..., rope.rotary_dim :])


# ---- rebasing ----


def window_base(first_window: int, pinned: int, original: bool) -> int:
    """The base that puts the oldest window token where it stands: right behind the pinned ones, or at its index."""
    return first_window - (0 if original else pinned)


def turned_back(rope: Rope, rotated: torch.Tensor, positions: int) -> torch.Tensor:
    """Rotated vectors ``(..., head_dim)`` as they are that many positions earlier, float32."""
    by = torch.full((), positions, device=rotated.device)  # filled there: a copy from the host would wait
    return rope.unrotate(rotated, *rope.angles(by))
