"""Attention that a chunk of a prompt gives to every slot, added up for the choice of pinned tokens.

The logarithm of the sum of every query's softmax is that of attention, or computed by one kernel; another one computes
what each slot receives. Nothing that is launched depends on the host, so that a CUDA graph can hold it.
"""

# ruff: noqa: RUF005 - Triton compiles sums of tuples, not starred ones
import math

import torch

from sinkstream.kernels.attention_prefill import turned
from sinkstream.kernels.band import SCALARS, TOKENS, Band
from sinkstream.kernels.online_softmax import rotated
from sinkstream.kernels.runtime import HALF_DTYPES, check_tensor, dot_kind, jit, launch, tl, use_triton

TILE = 128  # queries of one tile of the twin
ROWS = 64  # queries of one tile of the kernels, those of several query heads
SLOTS = 64  # slots of one tile
COLUMNS = 64  # widest column chunk


@jit
def _load_tile(
    query_ptr, turn_ptr, row, limit, row_stride, head_stride, G: tl.constexpr, D: tl.constexpr, C: tl.constexpr,
    RD: tl.constexpr, TURN: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Queries of rows (row = token * G + head) in column chunks; TURN: turned to the frame of the pinned keys."""
    token, columns = row // G, tl.arange(0, C)[None, :]
    held = tl.minimum(token, limit - 1)
    place = query_ptr + (held.to(tl.int64) * row_stride + row % G * head_stride)[:, None]
    valid = (token < limit)[:, None]
    chunks = ()
    for c in tl.static_range(D // C):
        if TURN:
            angles = turn_ptr + held[:, None] * RD
            x = rotated(place, c * C + columns, valid, angles, place, 0.0, D, RD, False, C)
        else:
            x = tl.load(place + c * C + columns, mask=valid, other=0.0).to(tl.float32)
        chunks = chunks + (x.to(KIND),)
    return chunks


@jit
def _tile_scores(
    q, key_ptr, slots, usable, owner, first, token, scale, PINNED: tl.constexpr, D: tl.constexpr, C: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    """Scores, base 2, of a tile of slots; -inf where a query does not see the token that lies there."""
    place, valid = key_ptr + slots.to(tl.int64)[:, None] * D + tl.arange(0, C)[None, :], usable[:, None]
    z = tl.dot(q[0], tl.trans(tl.load(place, mask=valid, other=0.0).to(KIND)))
    for c in tl.static_range(1, D // C):
        z = tl.dot(q[c], tl.trans(tl.load(place + c * C, mask=valid, other=0.0).to(KIND)), z)
    seen = usable[None, :] & (owner[None, :] <= token[:, None])
    if not PINNED:
        seen = seen & (owner[None, :] >= first[:, None])
    return tl.where(seen, z * scale, -float("inf"))


@jit
def _pinned_owners(slots, pinned_slots, band_ptr):
    """Which of the tile's pinned slots are used, and the token of each, counted from the chunk's first."""
    return slots < tl.minimum(pinned_slots, tl.load(band_ptr + 8)), slots - tl.load(band_ptr + 1)


@jit
def _ring_owners(slots, pinned_slots, ring, band_ptr):
    """Which of the tile's slots lie in the ring, and the token of each once the chunk lies there."""
    last = tl.load(band_ptr) - 1
    place = (tl.load(band_ptr + 5) + last) % ring
    age = place - (slots - pinned_slots)
    return slots < pinned_slots + ring, last - tl.where(age < 0, age + ring, age)


@jit
def _joined(z, m, s):
    """Maxima and sums, base 2, with one tile of scores more."""
    top = tl.maximum(m, tl.max(z, 1))
    safe = tl.where(top == -float("inf"), 0.0, top)
    return top, s * tl.exp2(m - safe) + tl.sum(tl.exp2(z - safe[:, None]), 1)


@jit(do_not_specialize=["pinned_slots", "ring", "queries"])
def _chunk_sums_kernel(
    query_ptr, key_ptr, band_ptr, turn_ptr, sums_ptr, pinned_slots, ring, queries, row_stride, head_stride, key_row,
    key_head, scale, G: tl.constexpr, D: tl.constexpr, C: tl.constexpr, RD: tl.constexpr, BM: tl.constexpr,
    BT: tl.constexpr, SCALARS: tl.constexpr, TURN: tl.constexpr, KIND: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (tile of queries, key-value head); padding has an infinite sum, so that it gives nothing."""
    head, tokens = tl.program_id(1), tl.load(band_ptr)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    token, column = row // G, tl.arange(0, BT)
    first = tl.load(band_ptr + SCALARS + tl.minimum(token, tokens - 1))
    keys = key_ptr + tl.load(band_ptr + 6).to(tl.int64) * key_row + head.to(tl.int64) * key_head
    mine = query_ptr + head * G * head_stride
    m, s = tl.full((BM,), -float("inf"), tl.float32), tl.zeros((BM,), tl.float32)
    q = _load_tile(mine, turn_ptr, row, tokens, row_stride, head_stride, G, D, C, RD, TURN, KIND)
    for at in range(0, pinned_slots, BT):
        usable, owner = _pinned_owners(at + column, pinned_slots, band_ptr)
        z = _tile_scores(q, keys, at + column, usable, owner, first, token, scale, True, D, C, KIND)
        m, s = _joined(z, m, s)
    q = _load_tile(mine, turn_ptr, row, tokens, row_stride, head_stride, G, D, C, RD, False, KIND)
    for at in range(pinned_slots, pinned_slots + ring, BT):
        usable, owner = _ring_owners(at + column, pinned_slots, ring, band_ptr)
        z = _tile_scores(q, keys, at + column, usable, owner, first, token, scale, False, D, C, KIND)
        m, s = _joined(z, m, s)
    found = tl.where(token < tokens, m + tl.log2(s), float("inf"))
    tl.store(sums_ptr + head.to(tl.int64) * queries * G + row, found, mask=row < queries * G)


@jit(do_not_specialize=["pinned_slots", "ring", "queries"])
def _slots_received_kernel(
    query_ptr, key_ptr, band_ptr, turn_ptr, sums_ptr, total_ptr, pinned_slots, ring, queries, row_stride, head_stride,
    key_row, key_head, total_row, total_head, scale, G: tl.constexpr, D: tl.constexpr, C: tl.constexpr,
    RD: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr, SCALARS: tl.constexpr, TURN: tl.constexpr,
    PINNED: tl.constexpr, KIND: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (tile of slots, pinned or of the ring, key-value head)."""
    head, tokens = tl.program_id(1), tl.load(band_ptr)
    held = tl.load(band_ptr + 6).to(tl.int64)
    keys = key_ptr + held * key_row + head.to(tl.int64) * key_head
    mine = query_ptr + head * G * head_stride
    sums = sums_ptr + head.to(tl.int64) * queries * G
    slots = tl.program_id(0) * BT + tl.arange(0, BT)
    if PINNED:
        usable, owner = _pinned_owners(slots, pinned_slots, band_ptr)
    else:
        slots += pinned_slots
        usable, owner = _ring_owners(slots, pinned_slots, ring, band_ptr)
    given = tl.zeros((BT,), tl.float32)
    for at in range(0, tokens * G, BM):
        row = at + tl.arange(0, BM)
        token = row // G
        first = tl.load(band_ptr + SCALARS + tl.minimum(token, tokens - 1))
        q = _load_tile(mine, turn_ptr, row, tokens, row_stride, head_stride, G, D, C, RD, TURN, KIND)
        z = _tile_scores(q, keys, slots, usable, owner, first, token, scale, PINNED, D, C, KIND)
        whole = tl.load(sums + row, mask=token < tokens, other=float("inf"))
        given += tl.sum(tl.exp2(z - whole[:, None]), 0)
    place = total_ptr + held * total_row + head.to(tl.int64) * total_head + slots
    before = tl.load(place, mask=usable, other=0.0)
    new = (owner >= 0) & (owner < tokens)
    tl.store(place, tl.where(new, 0.0, before) + given / G, mask=usable)


def accumulate_chunk(
    queries: torch.Tensor,
    keys: torch.Tensor,
    totals: torch.Tensor,
    band: Band,
    *,
    pinned_slots: int,
    scaling: float,
    sums: torch.Tensor | None = None,
    implementation: str | None = None,
) -> None:
    """Add the attention of the queries of a chunk to the totals of the slots; those of new tokens begin with it.

    Parameters
    ----------
    queries : Tensor, (tokens, query_heads, head_dim)
        Rotated for the window; padding, if any, comes last. May be strided, but for the last axis.
    keys : Tensor, (rows, kv_heads, slots, head_dim)
        The chunk's own are among them, and no token that a query sees has left. Rows and heads may be strided.
    totals : Tensor, (rows, kv_heads, slots), float32
        Row `band.row` is written in place: attention received, mean over the query heads of a kv head.
    band : Band
        Of these tokens.
    pinned_slots : int
        Slots in front of the ring.
    scaling : float
        Of the scores.
    sums : Tensor, (kv_heads, tokens * group), float32, optional
        As `attention_prefill` has written them for these queries; default: computed here.
    implementation : {"auto", "triton", "torch"}, optional
        float32, and heads whose size is no multiple of 16, take the twin.

    Raises
    ------
    ValueError
        Naming the argument that the op cannot serve and what is accepted.
    """
    kv_heads, slots, dim = keys.shape[1:]
    heads, rows = queries.shape[1], band.rows
    dtypes = (*HALF_DTYPES, torch.float32, torch.float64)
    check_tensor("queries", queries, (rows, None, dim), dtypes=dtypes, device=keys.device, contiguous=False)
    check_tensor("totals", totals, (len(keys), kv_heads, slots), dtypes=dtypes, device=keys.device, contiguous=False)
    if sums is not None:
        check_tensor("sums", sums, (kv_heads, rows * heads // kv_heads), dtypes=(torch.float32,), device=keys.device)
    if heads % kv_heads or not 0 <= pinned_slots < slots:
        raise ValueError(
            f"{heads} query heads, {kv_heads} kv heads, pinned_slots={pinned_slots}; accepted: a multiple of the kv"
            f" heads, and 0 to {slots - 1} pinned slots"
        )
    if not use_triton(implementation, keys) or dim % 16 or keys.dtype not in HALF_DTYPES:
        accumulate_chunk_twin(queries, keys, totals, band, pinned_slots, scaling)
        return
    assert keys.stride(2) == dim and totals.stride(2) == 1, "the slots of a head are contiguous"
    turn, group = band.table if band.rotation is None else band.rotation, heads // kv_heads
    sizes = pinned_slots, slots - pinned_slots, rows, queries.stride(0), queries.stride(1), *keys.stride()[:2]
    common = {
        "G": group, "D": dim, "C": min(dim & -dim, COLUMNS), "BM": ROWS, "BT": SLOTS, "SCALARS": SCALARS,
        "RD": 2 if band.rotation is None else 2 * band.rotation.shape[2], "KIND": dot_kind(keys.dtype), "pdl": False,
        "num_warps": 4,
    }  # fmt: skip
    turns, scale = band.rotation is not None, scaling / math.log(2)
    if sums is None:
        sums = torch.empty(kv_heads, rows * group, device=keys.device)
        launch(
            _chunk_sums_kernel, (-(-rows * group // ROWS), kv_heads), queries, keys, band.table, turn, sums, *sizes,
            scale, TURN=turns, **common,
        )  # fmt: skip
    for pinned, count in ((True, pinned_slots), (False, slots - pinned_slots)):
        if count:
            launch(
                _slots_received_kernel, (-(-count // SLOTS), kv_heads), queries, keys, band.table, turn, sums, totals,
                *sizes, *totals.stride()[:2], scale, TURN=turns and pinned, PINNED=pinned, **common,
            )  # fmt: skip


def accumulate_chunk_twin(
    queries: torch.Tensor, keys: torch.Tensor, totals: torch.Tensor, band: Band, pinned_slots: int, scaling: float
) -> None:
    """The twin of the kernels: plain PyTorch in float32, a tile of queries at a time."""
    row, (kv_heads, slots, dim) = band.device_row, keys.shape[1:]
    held = keys.index_select(0, row)[0].float()
    owner, tokens = band.owners(pinned_slots, slots - pinned_slots), band.table[TOKENS]
    pinned = torch.arange(slots, device=keys.device) < pinned_slots
    given = torch.zeros(kv_heads, slots, device=keys.device)
    for begin in range(0, band.rows, TILE):
        part = slice(begin, min(begin + TILE, band.rows))
        token = torch.arange(part.start, part.stop, device=keys.device)
        first, counts = band.table[SCALARS + part.start : SCALARS + part.stop], token < tokens
        scaled = queries[part].transpose(0, 1).float() * scaling
        window = torch.where(counts[:, None], scaled, 0.0)  # padding may be no number
        frame = window if band.rotation is None else turned(window, band.rotation[part])
        scores = window.reshape(kv_heads, -1, dim) @ held.mT
        scores[..., :pinned_slots] = frame.reshape(kv_heads, -1, dim) @ held[:, :pinned_slots].mT
        unseen = (owner > token[:, None]) | ~(pinned | (owner >= first[:, None]))
        weights = scores.view(kv_heads, -1, len(token), slots).masked_fill_(unseen, float("-inf")).softmax(-1)
        share = counts.float().repeat(weights.shape[1]) / weights.shape[1]
        given += share @ weights.flatten(1, 2)
    new = (owner >= 0) & (owner < tokens)
    before = totals.index_select(0, row)[0]
    totals.index_copy_(0, row, (before.masked_fill(new, 0.0) + given)[None])
