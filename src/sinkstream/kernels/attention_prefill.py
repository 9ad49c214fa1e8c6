"""Attention of a chunk of tokens over two frames: flash attention in a band, and the pinned columns beside it.

Every query sees a stretch of the window of its own, from the oldest token that its prunes have left up to itself: tiles
of keys wholly outside that band are skipped. The pinned keys lie in a frame of their own; a query meets them turned
back by as many positions as it stands too far from the frame. One softmax runs over both. The past lies in a ring, the
chunk's own keys beside it, so that a chunk may be longer than the ring and nothing is moved before its queries have
seen it.

A short chunk has too few queries to fill the device, so its keys are split over several programs, and a second kernel
puts their sums together. Everything that changes from chunk to chunk is read from a table on the device, so that a
CUDA graph can hold the forward of a chunk of at most so many tokens.
"""

import math

import torch

from sinkstream.kernels.band import SCALARS, Band, Columns
from sinkstream.kernels.config import PrefillConfig, default_prefill
from sinkstream.kernels.online_softmax import rotated
from sinkstream.kernels.runtime import (
    FLOAT_DTYPES,
    HALF_DTYPES,
    check_tensor,
    dot_kind,
    jit,
    launch,
    multiprocessors,
    tl,
    triton,
    use_triton,
)

TILE = {"cpu": 64}  # queries of one tile of the twin, by kind of device
DEFAULT_TILE = 512  # elsewhere a launch takes longer than the masked part of a larger tile


@jit
def _load_part(ptr, rows, valid, stride, offset: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, ALL: tl.constexpr):
    """Columns [offset, offset + WIDTH) of rows of D values; zero past D and, without ALL, where a row is not valid."""
    columns = offset + tl.arange(0, WIDTH)[None, :]
    place = ptr + rows[:, None] * stride + columns
    if ALL:
        part = tl.load(place, mask=columns < D, other=0.0) if offset + WIDTH > D else tl.load(place)
    else:
        mask = valid[:, None] & (columns < D) if offset + WIDTH > D else valid[:, None]
        part = tl.load(place, mask=mask, other=0.0)
    return part


@jit
def _see_tile(
    qa, qb, keys, values, slots, valid, seen, key_stride, value_stride, scale, m, s, a, b,
    D: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr, KIND: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """One tile of keys more in maxima m, sums s and weighted values a (first DA columns) and b (the DB others).

    With ALL every query sees every key, so `valid` and `seen` are not looked at.
    """
    ka = _load_part(keys, slots, valid, key_stride, 0, DA, D, ALL)
    z = tl.dot(qa, tl.trans(ka.to(KIND)))
    if DB > 0:
        kb = _load_part(keys, slots, valid, key_stride, DA, DB, D, ALL)
        z = tl.dot(qb, tl.trans(kb.to(KIND)), z)
    if ALL:
        top = tl.maximum(m, tl.max(z, 1) * scale)
        safe = top
    else:
        z = tl.where(seen, z, -float("inf"))
        top = tl.maximum(m, tl.max(z, 1) * scale)
        safe = tl.where(top == -float("inf"), 0.0, top)
    p = tl.exp2(z * scale - safe[:, None])
    old = tl.exp2(m - safe)
    s = s * old + tl.sum(p, 1)
    p = p.to(KIND)
    va = _load_part(values, slots, valid, value_stride, 0, DA, D, ALL)
    a = tl.dot(p, va.to(KIND), a * old[:, None])
    if DB > 0:
        vb = _load_part(values, slots, valid, value_stride, DA, DB, D, ALL)
        b = tl.dot(p, vb.to(KIND), b * old[:, None])
    return top, s, a, b


@jit(do_not_specialize=["pinned_slots", "ring", "query_rows", "set_size"])
def _attention_prefill_kernel(
    q_ptr, k_ptr, v_ptr, pinned_k_ptr, pinned_v_ptr, past_k_ptr, past_v_ptr, band_ptr, turn_ptr, out_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    pk_batch, pk_head, pk_row, pv_batch, pv_head, pv_row, rk_batch, rk_head, rk_row, rv_batch, rv_head, rv_row,
    out_batch, out_head, out_row, pinned_slots, ring, groups, scale, stats_ptr, query_rows, set_k_ptr, set_v_ptr,
    set_ptr, set_head, set_size, sum_ptr,
    D: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr, RD: tl.constexpr, TURN: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, STAGES: tl.constexpr, SPLITS: tl.constexpr, KIND: tl.constexpr, SCALARS: tl.constexpr,
    SETS: tl.constexpr, SUMS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (tile of queries, query head, row of the batch and split); the tiles with most keys come first.

    With SETS every query also sees one of several sets of `set_size` pinned keys, of the only row of the batch.

    With SUMS and without splits `sum_ptr` gets the logarithm of the sum of every query's softmax.

    With splits, `out_ptr` is a float32 buffer (batch, heads, query_rows, SPLITS, D) of sums that are not normalised,
    and `stats_ptr` one of their maxima and weights (batch, heads, query_rows, SPLITS, 2).
    """
    tokens, past = tl.load(band_ptr), tl.load(band_ptr + 1)
    start, length = tl.load(band_ptr + 2), tl.load(band_ptr + 3)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head, row = tl.program_id(1), (tl.program_id(2) // SPLITS).to(tl.int64)
    kept_row = row + tl.load(band_ptr + 6)
    kv = (head // groups).to(tl.int64)
    begin = tile * BM
    rows = begin + tl.arange(0, BM)
    here = rows < tokens
    held = tl.minimum(rows, tokens - 1)
    used = begin < tokens  # a tile of padding looks at nothing
    pinned = tl.minimum(tl.minimum(pinned_slots, tl.load(band_ptr + 8)), past + tokens)
    pinned = tl.where(used, pinned, 0)
    first = tl.load(band_ptr + SCALARS + held)
    oldest = tl.load(band_ptr + SCALARS + tl.minimum(begin, tokens - 1))
    query = q_ptr + row * q_batch + head.to(tl.int64) * q_head
    m = tl.full((BM,), -float("inf"), tl.float32)
    s = tl.zeros((BM,), tl.float32)
    a = tl.zeros((BM, DA), tl.float32)
    b = tl.zeros((BM, DB if DB > 0 else 1), tl.float32)
    qa = _load_part(query, held, here, q_row, 0, DA, D, False).to(KIND)
    qb = qa
    if DB > 0:
        qb = _load_part(query, held, here, q_row, DA, DB, D, False).to(KIND)
    columns = tl.arange(0, BN)
    # the pinned columns
    ta, tb = qa, qb
    if TURN:
        place, angle = query + held[:, None] * q_row, turn_ptr + held[:, None] * RD
        ta_columns = tl.arange(0, DA)[None, :]
        ta = rotated(place, ta_columns, here[:, None] & (ta_columns < D), angle, q_ptr, 0.0, D, RD, False, DA).to(KIND)
        if DB > 0:
            tb_columns = DA + tl.arange(0, DB)[None, :]
            valid = here[:, None] & (tb_columns < D)
            tb = rotated(place, tb_columns, valid, angle, q_ptr, 0.0, D, RD, False, DB).to(KIND)
    # which tiles of the window are this program's
    past_first, own_first = tl.maximum(oldest + length, 0), tl.maximum(oldest, 0)
    past_end = tl.where(used, length, 0)
    own_end = tl.where(used, tl.minimum(begin + BM, tokens), 0)
    if SPLITS > 1:
        split = tl.program_id(2) % SPLITS
        pinned = tl.where(split == 0, pinned, 0)
        past_tiles = tl.maximum(past_end - past_first + BN - 1, 0) // BN
        own_tiles = tl.maximum(own_end - own_first + BN - 1, 0) // BN
        share = (past_tiles + own_tiles + SPLITS - 1) // SPLITS
        past_end = tl.minimum(past_end, past_first + (split + 1) * share * BN)
        past_first += split * share * BN
        own_end = tl.minimum(own_end, own_first + tl.maximum((split + 1) * share - past_tiles, 0) * BN)
        own_first += tl.maximum(split * share - past_tiles, 0) * BN
    # the pinned columns that came before the chunk, and those of the chunk itself
    own_keys, own_values = k_ptr + row * k_batch + kv * k_head, v_ptr + row * v_batch + kv * v_head
    keys = pinned_k_ptr + kept_row * pk_batch + kv * pk_head
    values = pinned_v_ptr + kept_row * pv_batch + kv * pv_head
    before = tl.minimum(pinned, past)
    for c in tl.range(0, before, BN):
        index = c + columns
        seen = (index[None, :] < before) & (rows[:, None] >= 0)
        m, s, a, b = _see_tile(
            ta, tb, keys, values, index, index < before, seen, pk_row, pv_row, scale, m, s, a, b, D, DA, DB, KIND, False
        )  # fmt: skip
    for c in tl.range(0, pinned - before, BN):
        index = c + columns
        usable = index < pinned - before
        seen = usable[None, :] & (index[None, :] <= rows[:, None])
        m, s, a, b = _see_tile(
            ta, tb, own_keys, own_values, index, usable, seen, k_row, v_row, scale, m, s, a, b, D, DA, DB, KIND, False
        )  # fmt: skip
    if SETS:  # those of all queries of the tile lie one after the other
        lowest = tl.load(set_ptr + tl.minimum(begin, tokens - 1))
        highest = tl.load(set_ptr + tl.minimum(begin + BM, tokens) - 1)
        which = tl.load(set_ptr + held)
        end = tl.where(used, (highest + 1) * set_size, 0)
        if SPLITS > 1:
            end = tl.where(split == 0, end, 0)
        keys, values = set_k_ptr + kv * set_head, set_v_ptr + kv * set_head
        for c in tl.range(lowest * set_size, end, BN):
            index = c + columns
            seen = (index < end)[None, :] & ((index // set_size)[None, :] == which[:, None])
            m, s, a, b = _see_tile(
                ta, tb, keys, values, index, index < end, seen, D, D, scale, m, s, a, b, D, DA, DB, KIND, False
            )  # fmt: skip
    # the past, in its ring: tiles at the edge of the band, and then those that all queries see, up to the end
    keys, values = past_k_ptr + kept_row * rk_batch + kv * rk_head, past_v_ptr + kept_row * rv_batch + kv * rv_head
    latest_first = tl.load(band_ptr + SCALARS + tl.minimum(begin + BM, tokens) - 1)
    shared = past_end - tl.maximum(latest_first + length, past_first)
    whole = past_end - tl.maximum(shared, 0) // BN * BN
    for c in tl.range(past_first, whole, BN, num_stages=STAGES):
        index = c + columns
        slots = start + index
        slots = tl.where(slots >= ring, slots - ring, slots)
        usable = index < whole
        seen = usable[None, :] & (index[None, :] - length >= first[:, None])
        m, s, a, b = _see_tile(
            qa, qb, keys, values, slots, usable, seen, rk_row, rv_row, scale, m, s, a, b, D, DA, DB, KIND, False
        )  # fmt: skip
    for c in tl.range(whole, past_end, BN, num_stages=STAGES):
        slots = start + c + columns
        slots = tl.where(slots >= ring, slots - ring, slots)
        m, s, a, b = _see_tile(
            qa, qb, keys, values, slots, here, here, rk_row, rv_row, scale, m, s, a, b, D, DA, DB, KIND, True
        )  # fmt: skip
    # the chunk itself: what all queries see ends with the first of them; the other tiles lie on both sides
    shared_end = tl.maximum(tl.minimum(own_end, begin + 1), own_first)
    shared = shared_end - tl.maximum(latest_first, own_first)
    whole = shared_end - tl.maximum(shared, 0) // BN * BN
    before = (whole - own_first + BN - 1) // BN
    after = (tl.maximum(own_end - shared_end, 0) + BN - 1) // BN
    for i in tl.range(0, before + after, num_stages=STAGES):
        index = tl.where(i < before, own_first + i * BN, shared_end + (i - before) * BN) + columns
        usable = index < tl.where(i < before, whole, own_end)
        seen = usable[None, :] & (index[None, :] >= first[:, None]) & (index[None, :] <= rows[:, None])
        m, s, a, b = _see_tile(
            qa, qb, own_keys, own_values, index, usable, seen, k_row, v_row, scale, m, s, a, b, D, DA, DB, KIND, False
        )  # fmt: skip
    for c in tl.range(whole, shared_end, BN, num_stages=STAGES):
        index = c + columns
        m, s, a, b = _see_tile(
            qa, qb, own_keys, own_values, index, here, here, k_row, v_row, scale, m, s, a, b, D, DA, DB, KIND, True
        )  # fmt: skip
    wide = tl.arange(0, DA)[None, :]
    if SPLITS > 1:
        place = ((row * tl.num_programs(1) + head) * query_rows + held) * SPLITS + split
        out = out_ptr + place[:, None] * D
        tl.store(stats_ptr + place * 2, m, mask=here)
        tl.store(stats_ptr + place * 2 + 1, s, mask=here)
        s = tl.full((BM,), 1.0, tl.float32)
    else:
        if SUMS:
            sums = sum_ptr + (kv * query_rows + rows) * groups + head % groups
            tl.store(sums, tl.where(here, m + tl.log2(s), float("inf")), mask=rows < query_rows)
        out = out_ptr + row * out_batch + head.to(tl.int64) * out_head + held[:, None].to(tl.int64) * out_row
    tl.store(out + wide, (a / s[:, None]).to(out_ptr.dtype.element_ty), mask=here[:, None] & (wide < D))
    if DB > 0:
        wide = DA + tl.arange(0, DB)[None, :]
        tl.store(out + wide, (b / s[:, None]).to(out_ptr.dtype.element_ty), mask=here[:, None] & (wide < D))


@jit(do_not_specialize=["query_rows"])
def _combine_splits_kernel(
    parts_ptr, stats_ptr, out_ptr, sum_ptr, band_ptr, query_rows, out_batch, out_head, out_row, groups,
    D: tl.constexpr, SIZE: tl.constexpr, SPLITS: tl.constexpr, SUMS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (query, query head, row of the batch): one softmax of the sums of all splits."""
    query, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    here = query < tl.load(band_ptr)
    place = ((row * tl.num_programs(1) + head) * query_rows + query) * SPLITS + tl.arange(0, SPLITS)
    columns = tl.arange(0, SIZE)[None, :]
    m = tl.load(stats_ptr + place * 2, mask=here, other=0.0)
    s = tl.load(stats_ptr + place * 2 + 1, mask=here, other=1.0)
    top = tl.max(m, 0)
    weight = tl.exp2(m - top)
    parts = tl.load(parts_ptr + place[:, None] * D + columns, mask=here & (columns < D), other=0.0)
    whole = tl.sum(s * weight, 0)
    found = tl.sum(parts * weight[:, None], 0) / whole
    if SUMS:
        sums = sum_ptr + (head // groups * query_rows + query) * groups + head % groups
        tl.store(sums, tl.where(here, top + tl.log2(whole), float("inf")))
    columns = tl.arange(0, SIZE)
    out = out_ptr + row * out_batch + head.to(tl.int64) * out_head + query.to(tl.int64) * out_row
    tl.store(out + columns, found.to(out_ptr.dtype.element_ty), mask=here & (columns < D))


def attention_prefill(
    query: torch.Tensor,
    columns: Columns,
    band: Band,
    *,
    scaling: float,
    out: torch.Tensor | None = None,
    config: PrefillConfig | None = None,
    sums: torch.Tensor | None = None,
    implementation: str | None = None,
) -> torch.Tensor:
    """Attention of a chunk of tokens: pinned keys in one frame, the band of the window in the other.

    Parameters
    ----------
    query : Tensor, (batch, query_heads, tokens, head_dim)
        Rotated for the window. May be strided, but for the last axis.
    columns : Columns
    band : Band
        Of the same tokens; of padded ones, which come last, nothing is computed or written.
    scaling : float
        Of the scores.
    out : Tensor, (batch, tokens, query_heads, head_dim), optional
        May be strided, but for the last axis.
    config : PrefillConfig, optional
        How the kernel is cut up; default: `default_prefill`.
    sums : Tensor, (kv_heads, tokens * group), float32, optional
        Written, of the only row of the batch: the logarithm, base 2, of the sum of every query's softmax, the query
        heads of a kv head next to each other. Of padded tokens infinite.
    implementation : {"auto", "triton", "torch"}, optional
        Default: the kernel on a GPU in half precision, and otherwise the twin.

    Returns
    -------
    Tensor, (batch, tokens, query_heads, head_dim), in the dtype of `query`

    Raises
    ------
    ValueError
        Naming the argument that the op cannot serve and what is accepted.
    """
    batch, heads, tokens, dim = query.shape
    _check_inputs(query, columns, band)
    if sums is not None:
        kv_heads = columns.keys.shape[1]
        shape = (kv_heads, tokens * (heads // kv_heads))
        check_tensor("sums", sums, shape, dtypes=(torch.float32,), device=query.device)
        if batch != 1:
            raise ValueError(f"sums of {batch} rows of a batch; accepted: 1")
    if out is None:
        out = torch.empty(batch, tokens, heads, dim, dtype=query.dtype, device=query.device)
    check_tensor("out", out, (batch, tokens, heads, dim), dtypes=(query.dtype,), device=query.device, contiguous=False)
    if (query.dtype not in HALF_DTYPES and implementation is None) or not use_triton(implementation, query):
        return attention_prefill_twin(query, columns, band, scaling, out, sums)
    if config is None:
        config = default_prefill(tokens, batch * heads, dim, multiprocessors(query.device))
    _launch(query, columns, band, scaling, out, config, sums)
    return out


def _check_inputs(query: torch.Tensor, columns: Columns, band: Band) -> None:
    device, dtypes = query.device, (*FLOAT_DTYPES, torch.float64)
    check_tensor("query", query, (None, None, None, None), dtypes=dtypes, device=device, contiguous=False)
    batch, heads, tokens, dim = query.shape
    kv_heads = columns.keys.shape[1]
    for name in ("keys", "pinned_keys", "past_keys"):
        keys, values = getattr(columns, name), getattr(columns, name.replace("keys", "values"))
        wanted = (batch, kv_heads, tokens, dim) if name == "keys" else (None, kv_heads, None, dim)
        check_tensor(name, keys, wanted, dtypes=(query.dtype,), device=device, contiguous=False)
        name = name.replace("keys", "values")
        check_tensor(name, values, tuple(keys.shape), dtypes=(query.dtype,), device=device, contiguous=False)
    if heads % kv_heads:
        raise ValueError(f"query has {heads} heads; accepted: a multiple of the {kv_heads} key-value heads")
        if name != "keys" and not 0 <= band.row <= len(keys) - batch:
            raise ValueError(f"row={band.row}; accepted: 0 to {len(keys) - batch}, {batch} fewer than {name} has")
    if band.rows != tokens:
        raise ValueError(f"a band of {band.rows} tokens for {tokens} queries; accepted: as many")
    if columns.sets is not None:
        columns.sets.check(query, kv_heads)
    if not 0 <= band.length <= columns.past_keys.shape[2]:
        raise ValueError(f"length={band.length}; accepted: 0 to {columns.past_keys.shape[2]}, the slots of the ring")


def _launch(query, columns: Columns, band: Band, scaling: float, out, config: PrefillConfig, sums) -> None:
    batch, heads, tokens, dim = query.shape
    if query.dtype not in HALF_DTYPES:
        raise ValueError(f"query has dtype {query.dtype}; accepted by the kernel: {', '.join(map(str, HALF_DTYPES))}")
    kv_heads, wide = columns.keys.shape[1], max(16, 1 << (dim.bit_length() - 1))
    rest = 0 if wide >= dim else max(16, 1 << (dim - wide - 1).bit_length())
    parts = (
        query, columns.keys, columns.values, columns.pinned_keys, columns.pinned_values, columns.past_keys,
        columns.past_values,
    )  # fmt: skip
    strides = [part.stride(axis) for part in parts for axis in range(3)]
    rotation, splits = band.rotation, config.splits
    parts_of = stats = out
    if splits > 1:
        parts_of, stats = (
            query.new_empty((batch, heads, tokens, splits, width), dtype=torch.float32) for width in (dim, 2)
        )
    out_strides = out.stride(0), out.stride(2), out.stride(1)
    sets = columns.sets
    several = (band.table, band.table, band.table, 0, 1)
    if sets is not None:
        several = (sets.keys, sets.values, sets.which, sets.keys.stride(0), sets.size)
    launch(
        _attention_prefill_kernel, (-(-tokens // config.rows), heads, batch * splits), *parts, band.table,
        band.table if rotation is None else rotation, parts_of, *strides, *out_strides, columns.pinned_keys.shape[2],
        columns.past_keys.shape[2], heads // kv_heads, scaling * 1.4426950408889634, stats, tokens, *several,
        stats if sums is None else sums,
        D=dim, DA=wide, DB=rest, RD=2 if rotation is None else 2 * rotation.shape[2], TURN=rotation is not None,
        BM=config.rows, BN=config.columns, STAGES=config.stages, SPLITS=splits, KIND=dot_kind(query.dtype),
        SCALARS=SCALARS, SETS=sets is not None, SUMS=sums is not None and splits == 1, num_warps=config.warps,
        pdl=False,
    )  # fmt: skip
    if splits > 1:
        launch(
            _combine_splits_kernel, (tokens, heads, batch), parts_of, stats, out, stats if sums is None else sums,
            band.table, tokens, *out_strides, heads // kv_heads, D=dim, SIZE=triton.next_power_of_2(dim),
            SPLITS=splits, SUMS=sums is not None, num_warps=1, pdl=False,
        )  # fmt: skip


def attention_prefill_twin(
    query, columns: Columns, band: Band, scaling: float, out: torch.Tensor, sums: torch.Tensor | None
) -> torch.Tensor:
    """The twin of the kernel: plain PyTorch in float32 (float64 for float64 inputs), a tile of queries at a time.

    A tile bounds the memory: its scores with the pinned keys and with the stretch that at least one of its queries
    sees.
    """
    work = torch.float64 if query.dtype == torch.float64 else torch.float32
    batch, heads, _, dim = query.shape
    kv_heads, tokens = columns.keys.shape[1], band.tokens
    device, size = query.device, TILE.get(query.device.type, DEFAULT_TILE)
    pinned_keys, pinned_values = (part.to(work) for part in columns.pinned(band))
    pinned_columns = torch.arange(pinned_keys.shape[2], device=device)
    if sums is not None:
        sums.fill_(float("inf"))
    for begin in range(0, tokens, size):
        end = min(begin + size, tokens)
        oldest = min(max(band.host_first[begin], -band.length), end)
        keys, values = (part.to(work) for part in columns.window(band, oldest, end))
        rows = torch.arange(begin, end, device=device)[:, None]
        index = torch.arange(oldest, end, device=device)
        seen = (index >= band.device_first[begin:end, None]) & (index <= rows)
        beside = [pinned_columns <= band.past + rows]
        tile_keys, tile_values = pinned_keys, pinned_values
        if columns.sets is not None:
            more_keys, more_values, theirs = columns.sets.tile(begin, end)
            tile_keys = torch.cat([pinned_keys, more_keys.to(work)], 2)
            tile_values = torch.cat([pinned_values, more_values.to(work)], 2)
            beside.append(theirs)
        pinned = tile_keys.shape[2]
        seen = torch.cat([*beside, seen], 1)
        window_query = query[:, :, begin:end].to(work) * scaling
        pinned_query = window_query if band.rotation is None else turned(window_query, band.rotation[begin:end])
        grouped = (q.reshape(batch, kv_heads, -1, dim) for q in (pinned_query, window_query))
        scores = torch.cat([q @ k.mT for q, k in zip(grouped, (tile_keys, keys))], -1)
        scores = scores.view(batch, heads, end - begin, -1).masked_fill_(~seen, float("-inf"))
        if sums is not None:
            found = scores[0].logsumexp(-1).unflatten(0, (kv_heads, -1)).transpose(1, 2) / math.log(2)
            sums.view(kv_heads, band.rows, -1)[:, begin:end] = found
        weights = scores.softmax(-1).view(batch, kv_heads, -1, scores.shape[-1])
        found = weights[..., :pinned] @ tile_values + weights[..., pinned:] @ values
        out[:, begin:end] = found.view(batch, heads, end - begin, dim).transpose(1, 2).to(query.dtype)
    return out


def turned(x: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """Rotate vectors ``(..., tokens, head_dim)`` by cosines and sines ``(tokens, 2, rotary_dim / 2)``."""
    half = rotation.shape[2]
    cos, sin = rotation.to(x.dtype).unbind(1)
    one, other = x[..., :half], x[..., half : 2 * half]
    return torch.cat([one * cos - other * sin, other * cos + one * sin, x[..., 2 * half :]], -1)
