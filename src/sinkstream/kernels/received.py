"""Attention that the latest queries give to the candidates of a prune, of all layers and heads in one launch.

A program serves some queries of one key-value head: one pass over everything cached gives their softmax, a second one
over the candidates gives what these receive.
"""

# ruff: noqa: RUF005 - Triton compiles sums of tuples, not starred ones
import math

import torch

from sinkstream.kernels.online_softmax import rotated
from sinkstream.kernels.runtime import (
    FLOAT_DTYPES,
    HALF_DTYPES,
    check_tensor,
    dot_kind,
    jit,
    launch,
    tl,
    triton,
    use_triton,
)

ROWS = 64  # most queries of one program, those of several query heads
TILE = 64  # slots of one tile
COLUMNS = 64  # widest column chunk


@jit
def _load_queries(
    query_ptr, head, kept, row, asked, seen, shift_ptr, back, G: tl.constexpr, D: tl.constexpr, C: tl.constexpr,
    RD: tl.constexpr, SIZE: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Queries of some rows (row = token * G + head) in column chunks, where they stand or turned back."""
    token = row // G
    place = (seen - asked + token) % kept
    start = query_ptr + ((head * G + row % G) * kept + place) * D
    valid, columns, chunks = (token < asked)[:, None], tl.arange(0, C)[None, :], ()
    for c in tl.static_range(D // C):
        x = tl.load(start[:, None] + c * C + columns, mask=valid, other=0.0).to(tl.float32)
        y = rotated(start[:, None], c * C + columns, valid, shift_ptr, start, 0.0, D, RD, False, SIZE)
        chunks = chunks + (tl.where(back, y, x).to(KIND),)
    return chunks


@jit
def _scores(
    q, key_ptr, slots, entry, end, last, scale, C: tl.constexpr, KIND: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    """Scores (rows, TILE), base 2, of entries in slots; -inf from `end` on and past a query's own token."""
    columns, valid = tl.arange(0, C)[None, :], (entry < end)[:, None]
    place = key_ptr + slots.to(tl.int64)[:, None] * D + columns
    z = tl.dot(q[0], tl.trans(tl.load(place, mask=valid, other=0.0).to(KIND)))
    for c in tl.static_range(1, D // C):
        z = tl.dot(q[c], tl.trans(tl.load(place + c * C, mask=valid, other=0.0).to(KIND)), z)
    seen = (entry < end)[None, :] & (entry[None, :] <= last[:, None])
    return tl.where(seen, z * scale, -float("inf"))


@jit
def _joined(z, m, s):
    """Maxima and sums, base 2, with one tile of scores more."""
    top = tl.maximum(m, tl.max(z, 1))
    safe = tl.where(top == -float("inf"), 0.0, top)
    return top, s * tl.exp2(m - safe) + tl.sum(tl.exp2(z - safe[:, None]), 1)


@jit(do_not_specialize=["kept", "asked", "seen", "pinned", "sink", "first", "window", "leaving", "count"])
def _received_kernel(
    query_ptr, key_ptr, shift_ptr, out_ptr, query_layer, key_layer, kv_heads, slots, pinned_slots, ring, kept, asked,
    seen, pinned, sink, first, window, leaving, count, scale, G: tl.constexpr, D: tl.constexpr, C: tl.constexpr,
    RD: tl.constexpr, SIZE: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr, KIND: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (key-value head of one layer, some rows)."""
    which, part = tl.program_id(0), tl.program_id(1)
    layer, head = (which // kv_heads).to(tl.int64), which % kv_heads
    queries = query_ptr + layer * query_layer
    keys = key_ptr + layer * key_layer + head.to(tl.int64) * slots * D
    row = part * BM + tl.arange(0, BM)
    last = pinned + window - asked + row // G  # entry of the query's own token
    frame = _load_queries(queries, head, kept, row, asked, seen, shift_ptr, True, G, D, C, RD, SIZE, KIND)
    own = _load_queries(queries, head, kept, row, asked, seen, shift_ptr, False, G, D, C, RD, SIZE, KIND)
    m, s = tl.full((BM,), -float("inf"), tl.float32), tl.zeros((BM,), tl.float32)
    column = tl.arange(0, BT)
    for at in range(0, pinned, BT):
        m, s = _joined(_scores(frame, keys, at + column, at + column, pinned, last, scale, C, KIND, D), m, s)
    for at in range(0, window, BT):
        place = pinned_slots + (first + at + column) % ring
        z = _scores(own, keys, place, pinned + at + column, pinned + window, last, scale, C, KIND, D)
        m, s = _joined(z, m, s)
    sums = tl.where(row < asked * G, m + tl.log2(s), float("inf"))  # rows past the queries give nothing
    out = out_ptr + (part * tl.num_programs(0) + which).to(tl.int64) * count
    for at in range(0, pinned, BT):
        entry = at + column
        z = _scores(frame, keys, entry, entry, pinned, last, scale, C, KIND, D)
        given = tl.sum(tl.exp2(z - sums[:, None]), 0) / G
        tl.store(out + entry - sink, given, mask=(entry >= sink) & (entry < pinned))
    for at in range(0, leaving, BT):
        entry, place = pinned + at + column, pinned_slots + (first + at + column) % ring
        z = _scores(own, keys, place, entry, pinned + leaving, last, scale, C, KIND, D)
        given = tl.sum(tl.exp2(z - sums[:, None]), 0) / G
        tl.store(out + entry - sink, given, mask=entry < pinned + leaving)


def received(
    queries: torch.Tensor,
    keys: torch.Tensor,
    shift: torch.Tensor,
    *,
    seen: int,
    pinned_slots: int,
    sink: int,
    pinned: int,
    first: int,
    window: int,
    leaving: int,
    implementation: str | None = None,
) -> torch.Tensor:
    """Attention that the latest queries of a stream give to its pinned tokens and to the oldest window tokens.

    Queries whose tokens have left the window are not asked. A query sees the pinned entries, and the window up to
    itself.

    Parameters
    ----------
    queries : Tensor, (layers, query_heads, kept, head_dim)
        Rotated for the window; the query of token t in place ``t % kept``. Layers may be strided.
    keys : Tensor, (layers, kv_heads, slots, head_dim)
        Rotated, pinned slots first. Layers may be strided.
    shift : Tensor, (2, rotary_dim / 2), float32
        Cosine and sine that turn a query back to its position in the pinned frame.
    seen : int
        Tokens of the stream.
    pinned_slots : int
        Slots in front of the ring.
    sink, pinned : int
        Pinned entries that are no candidates; all pinned entries.
    first, window : int
        Ring index of the oldest window token; window tokens.
    leaving : int
        How many of the oldest window tokens are candidates.
    implementation : {"auto", "triton", "torch"}, optional
        float32, and heads whose size is no multiple of 16, take the twin.

    Returns
    -------
    Tensor, (layers, kv_heads, pinned - sink + leaving), float32
        Summed over the queries, mean over the query heads of a kv head.

    Raises
    ------
    ValueError
        Naming the argument that the op cannot serve and what is accepted.
    """
    device = keys.device
    check_tensor("keys", keys, (None, None, None, None), dtypes=FLOAT_DTYPES, device=device, contiguous=False)
    layers, kv_heads, slots, dim = keys.shape
    check_tensor("queries", queries, (layers, None, None, dim), dtypes=(keys.dtype,), device=device, contiguous=False)
    query_heads, kept, ring = queries.shape[1], queries.shape[2], slots - pinned_slots
    check_tensor("shift", shift, (2, None), dtypes=(torch.float32,), device=device)
    if query_heads % kv_heads:
        raise ValueError(f"{query_heads} query heads and {kv_heads} kv heads; accepted: a multiple")
    if not 0 <= sink <= pinned <= pinned_slots or not 0 <= leaving <= window <= ring or not 0 <= first < ring:
        raise ValueError(
            f"sink={sink}, pinned={pinned}, first={first}, window={window}, leaving={leaving} with {pinned_slots}"
            f" pinned and {ring} ring slots; accepted: sink <= pinned <= {pinned_slots}, first < {ring},"
            f" leaving <= window <= {ring}"
        )
    asked, group = min(kept, window), query_heads // kv_heads
    kernel = use_triton(implementation, keys) and dim % 16 == 0 and keys.dtype in HALF_DTYPES
    if not kernel or not asked:
        return received_twin(queries, keys, shift, seen, pinned_slots, sink, pinned, first, window, leaving)
    assert all(part[0].is_contiguous() for part in (queries, keys)), "each layer of one stream is contiguous"
    rows = min(ROWS, max(16, triton.next_power_of_2(asked * group)))
    count, parts = pinned - sink + leaving, -(-asked * group // rows)
    out = torch.empty(parts, layers, kv_heads, count, device=device)
    launch(
        _received_kernel, (layers * kv_heads, parts), queries, keys, shift, out, queries.stride(0), keys.stride(0),
        kv_heads, slots, pinned_slots, ring, kept, asked, seen, pinned, sink, first, window, leaving, count,
        dim**-0.5 / math.log(2), G=group, D=dim, C=min(dim & -dim, COLUMNS), RD=2 * shift.shape[1],
        SIZE=triton.next_power_of_2(dim), BM=rows, BT=TILE, KIND=dot_kind(keys.dtype), num_warps=4, pdl=False,
    )  # fmt: skip
    return out.sum(0)


def received_twin(
    queries: torch.Tensor,
    keys: torch.Tensor,
    shift: torch.Tensor,
    seen: int,
    pinned_slots: int,
    sink: int,
    pinned: int,
    first: int,
    window: int,
    leaving: int,
) -> torch.Tensor:
    """The twin of the kernel, layer by layer, in float32."""
    kept, ring, device = queries.shape[2], keys.shape[2] - pinned_slots, keys.device
    asked, live, half = min(kept, window), pinned + window, shift.shape[1]
    places = torch.arange(seen - asked, seen, device=device) % kept
    slots = torch.cat(
        [torch.arange(pinned, device=device), pinned_slots + (first + torch.arange(window, device=device)) % ring]
    )
    entry = torch.arange(live, device=device)
    hidden = entry > entry[live - asked :, None]
    found = []
    for query, key in zip(queries, keys):
        own = query.index_select(1, places).float()
        a, b, rest = own[..., :half], own[..., half : 2 * half], own[..., 2 * half :]
        frame = torch.cat([a * shift[0] - b * shift[1], b * shift[0] + a * shift[1], rest], -1)
        held = key.index_select(1, slots).float()[:, None]
        parts = ((frame, held[:, :, :pinned]), (own, held[:, :, pinned:]))
        scores = torch.cat([q.unflatten(0, (len(key), -1)) @ k.transpose(-1, -2) for q, k in parts], -1)
        weights = (scores * key.shape[-1] ** -0.5).masked_fill(hidden, float("-inf")).softmax(-1)
        found.append(weights.sum(2).mean(1)[:, sink : pinned + leaving])
    return torch.stack(found)
