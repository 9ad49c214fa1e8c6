"""Kernels of `pinned_sets`: the softmax of queries over the window, the choice prune by prune, and what is received."""

# ruff: noqa: RUF005 - Triton compiles sums of tuples, not starred ones
from sinkstream.kernels.online_softmax import rotated
from sinkstream.kernels.runtime import jit, tl


@jit
def _queries(ptr, start, index, row, valid, shift_ptr, back: tl.constexpr, head_stride, stride, G: tl.constexpr,
             D: tl.constexpr, C: tl.constexpr, RD: tl.constexpr, KIND: tl.constexpr):  # fmt: skip
    """Queries `start + index` of query heads `row % G` in column chunks, where they stand or turned back."""
    place = ptr + (row % G).to(tl.int64)[:, None] * head_stride + (start + index).to(tl.int64)[:, None] * stride
    columns = tl.arange(0, C)[None, :]
    chunks = ()
    for c in tl.static_range(D // C):
        if back:
            x = rotated(place, c * C + columns, valid[:, None], shift_ptr, place, 0.0, D, RD, False, C)
        else:
            x = tl.load(place + c * C + columns, mask=valid[:, None], other=0.0).to(tl.float32)
        chunks = chunks + (x.to(KIND),)
    return chunks


@jit
def _key_scores(q, rows, valid, scale, C: tl.constexpr, D: tl.constexpr, KIND: tl.constexpr):
    """Scores, base 2, of keys at pointers `rows` (TILE, 1)."""
    columns = tl.arange(0, C)[None, :]
    z = tl.dot(q[0], tl.trans(tl.load(rows + columns, mask=valid[:, None], other=0.0).to(KIND)))
    for c in tl.static_range(1, D // C):
        z = tl.dot(q[c], tl.trans(tl.load(rows + c * C + columns, mask=valid[:, None], other=0.0).to(KIND)), z)
    return z * scale


@jit
def _pinned_keys(now, sources, frame_ptr, entry, pinned, C: tl.constexpr, D: tl.constexpr, RD: tl.constexpr,
                 KIND: tl.constexpr):  # fmt: skip
    """Pinned keys `entry` of a set in column chunks, rotated to their slots and rounded as they are kept."""
    columns, valid = tl.arange(0, C)[None, :], (entry < pinned)[:, None]
    source = tl.load(now + entry, mask=entry < pinned, other=0).to(tl.int64)
    rows = sources + source[:, None] * D
    angles = frame_ptr + tl.minimum(entry, pinned - 1)[:, None] * RD  # loaded without a mask
    chunks = ()
    for c in tl.static_range(D // C):
        chunks = chunks + (rotated(rows, c * C + columns, valid, angles, rows, 0.0, D, RD, False, C).to(KIND),)
    return chunks


@jit
def _scores(q, k, scale):
    """Scores, base 2, of queries and keys in column chunks."""
    z = tl.dot(q[0], tl.trans(k[0]))
    for c in tl.static_range(1, len(q)):
        z = tl.dot(q[c], tl.trans(k[c]), z)
    return z * scale


@jit
def _joined(z, m, s):
    """Maxima and sums, base 2, with one tile of scores more."""
    top = tl.maximum(m, tl.max(z, 1))
    safe = tl.where(top == -float("inf"), 0.0, top)
    return top, s * tl.exp2(m - safe) + tl.sum(tl.exp2(z - safe[:, None]), 1)


@jit
def _whole_sums(ptr, row, valid, SPLITS: tl.constexpr):
    """Logarithms, base 2, of the sums of rows, put together of those of all splits."""
    place = ptr + row[:, None] * SPLITS + tl.arange(0, SPLITS)[None, :]
    parts = tl.load(place, mask=valid[:, None], other=0.0)
    top = tl.max(parts, 1)
    return top + tl.log2(tl.sum(tl.exp2(parts - top[:, None]), 1))


@jit(do_not_specialize=["entries", "sinks", "rows"])
def window_sums_kernel(
    query_ptr, sink_ptr, window_ptr, table_ptr, shift_ptr, out_ptr, query_head, query_row, entries, sinks, sink_head,
    rows, scale, G: tl.constexpr, D: tl.constexpr, C: tl.constexpr, RD: tl.constexpr, BM: tl.constexpr,
    BT: tl.constexpr, SPLITS: tl.constexpr, FIELDS: tl.constexpr, KIND: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (group, key-value head and split, tile of its queries), the first split with the sinks.

    A tile past the queries of its group does nothing.
    """
    group, head, split = tl.program_id(0), (tl.program_id(1) // SPLITS).to(tl.int64), tl.program_id(1) % SPLITS
    fields = table_ptr + (1 + group) * FIELDS
    begin, count, own, first = tl.load(fields), tl.load(fields + 1), tl.load(fields + 2), tl.load(fields + 3)
    used = tl.program_id(2) * BM < count * G
    row = tl.program_id(2) * BM + tl.arange(0, BM)
    here, index = row < count * G, row // G
    heads, turn = query_ptr + head * G * query_head, shift_ptr + group * RD
    m, s = tl.full((BM,), -float("inf"), tl.float32), tl.zeros((BM,), tl.float32)
    column = tl.arange(0, BT)
    with_sinks = tl.where(used & (split == 0), sinks, 0)
    frame = _queries(heads, begin, index, row, here & (with_sinks > 0), turn, True, query_head, query_row, G, D, C, RD,
                     KIND)  # fmt: skip
    for at in range(0, with_sinks, BT):
        entry = at + column
        z = _key_scores(frame, sink_ptr + head * sink_head + entry[:, None] * D, entry < sinks, scale, C, D, KIND)
        m, s = _joined(tl.where((entry < sinks)[None, :], z, -float("inf")), m, s)
    q = _queries(heads, begin, index, row, here, turn, False, query_head, query_row, G, D, C, RD, KIND)
    last, end = own + index, tl.minimum(own + count, own + (tl.program_id(2) * BM + BM - 1) // G + 1)
    keys, share = window_ptr + head * entries * D, (end - first + BT * SPLITS - 1) // (BT * SPLITS) * BT
    first += split * share
    end = tl.minimum(end, first + share)
    for at in range(first, tl.where(used, end, first), BT):
        entry = at + column
        z = _key_scores(q, keys + entry.to(tl.int64)[:, None] * D, entry < end, scale, C, D, KIND)
        seen = (entry < end)[None, :] & (entry[None, :] <= last[:, None])
        m, s = _joined(tl.where(seen, z, -float("inf")), m, s)
    place = (head * rows + tl.load(fields + 5)) * G + row
    tl.store(out_ptr + place * SPLITS + split, m + tl.log2(tl.where(here, s, 1.0)), mask=here)


@jit(do_not_specialize=["sets", "entries", "kept", "rows", "pinned", "width"])
def choose_sets_kernel(
    query_ptr, window_ptr, source_ptr, table_ptr, shift_ptr, frame_ptr, part_ptr, sums_ptr, before_ptr, score_ptr,
    chosen_ptr, totals_ptr, query_head, query_row, sets, entries, kept, rows, pinned, width, scale, G: tl.constexpr,
    D: tl.constexpr, C: tl.constexpr, RD: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr, SPLITS: tl.constexpr,
    FIELDS: tl.constexpr, KIND: tl.constexpr, ADDS: tl.constexpr, ONE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (key-value head), prune by prune; a barrier stands where threads read what others have written.

    ONE: a set is no larger than a tile, so its keys are read once a prune. Sets behind the last prune are the last one.
    """
    head = tl.program_id(0).to(tl.int64)
    groups, prunes = tl.load(table_ptr), tl.load(table_ptr + 1)
    heads, keys = query_ptr + head * G * query_head, window_ptr + head * entries * D
    sources = source_ptr + head * (pinned + kept) * D
    before = before_ptr + head * (pinned + entries)
    parts, sums, scores = part_ptr + head * rows * G * SPLITS, sums_ptr + head * rows * G, score_ptr + head * width
    chosen, totals = chosen_ptr + head * sets * pinned, totals_ptr + head * sets * pinned
    column, index_in = tl.arange(0, BT), tl.arange(0, BM)
    for at in range(0, pinned, BT):
        entry = at + column
        tl.store(chosen + entry, entry, mask=entry < pinned)
        if ADDS:
            tl.store(totals + entry, tl.load(before + entry, mask=entry < pinned, other=0.0), mask=entry < pinned)
    tl.debug_barrier()
    for group in range(0, groups):
        fields, turn = table_ptr + (1 + group) * FIELDS, shift_ptr + group * RD
        begin, count, own, first = tl.load(fields), tl.load(fields + 1), tl.load(fields + 2), tl.load(fields + 3)
        leaving, place = tl.load(fields + 4), tl.load(fields + 5) * G
        now, total = chosen + group * pinned, totals + group * pinned
        k = ()
        if ONE:
            k = _pinned_keys(now, sources, frame_ptr, column, pinned, C, D, RD, KIND)
        for part in range(0, count * G, BM):
            row = part + index_in
            here, index = row < count * G, row // G
            frame = _queries(heads, begin, index, row, here, turn, True, query_head, query_row, G, D, C, RD, KIND)
            m = _whole_sums(parts, place + row, here, SPLITS)
            s = tl.full((BM,), 1.0, tl.float32)
            z = tl.zeros((BM, BT), tl.float32)
            if ONE:
                z = _scores(frame, k, scale)
                m, s = _joined(tl.where((column < pinned)[None, :], z, -float("inf")), m, s)
            else:
                for at in range(0, pinned, BT):
                    entry = at + column
                    tile = _pinned_keys(now, sources, frame_ptr, entry, pinned, C, D, RD, KIND)
                    z = _scores(frame, tile, scale)
                    m, s = _joined(tl.where((entry < pinned)[None, :], z, -float("inf")), m, s)
            whole = m + tl.log2(s)
            if ADDS:
                tl.store(sums + place + row, whole, mask=here)
            whole = tl.where(here, whole, float("inf"))  # rows past the queries give nothing
            for at in range(0, pinned, BT):
                entry = at + column
                valid = entry < pinned
                if not ONE:
                    tile = _pinned_keys(now, sources, frame_ptr, entry, pinned, C, D, RD, KIND)
                    z = _scores(frame, tile, scale)
                given = tl.sum(tl.exp2(z - whole[:, None]), 0) / G
                if ADDS:
                    given += tl.load(total + entry, mask=valid, other=0.0)
                    tl.store(total + entry, given, mask=valid)
                else:
                    given += tl.where(part > 0, tl.load(scores + entry, mask=valid, other=0.0), 0.0)
                tl.store(scores + entry, given, mask=valid)
            if not ADDS:
                q = _queries(heads, begin, index, row, here, turn, False, query_head, query_row, G, D, C, RD, KIND)
                for at in range(0, leaving, BT):
                    entry = at + column
                    valid = entry < leaving
                    z = _key_scores(q, keys + (first + entry).to(tl.int64)[:, None] * D, valid, scale, C, D, KIND)
                    seen = (first + entry)[None, :] <= (own + index)[:, None]
                    given = tl.sum(tl.where(seen, tl.exp2(z - whole[:, None]), 0.0), 0) / G
                    given += tl.where(part > 0, tl.load(scores + pinned + entry, mask=valid, other=0.0), 0.0)
                    tl.store(scores + pinned + entry, given, mask=valid)
            tl.debug_barrier()
        if group < prunes:
            if ADDS:
                for at in range(0, leaving, BT):
                    entry = first + at + column
                    valid = at + column < leaving
                    given = tl.load(before + pinned + entry, mask=valid, other=0.0)
                    for part in range(0, (begin + count) * G, BM):
                        row = part + index_in
                        here, index = row < (begin + count) * G, row // G
                        q = _queries(heads, 0, index, row, here, turn, False, query_head, query_row, G, D, C, RD, KIND)
                        z = _key_scores(q, keys + entry.to(tl.int64)[:, None] * D, valid, scale, C, D, KIND)
                        whole = tl.load(sums + row, mask=here, other=float("inf"))
                        seen = entry[None, :] <= (own - begin + index)[:, None]
                        given += tl.sum(tl.where(seen, tl.exp2(z - whole[:, None]), 0.0), 0) / G
                    tl.store(scores + pinned + at + column, given, mask=valid)
            tl.debug_barrier()
            candidates = pinned + leaving
            taken = 0
            for at in range(0, candidates, BT):
                entry = at + column
                valid = entry < candidates
                mine = tl.load(scores + entry, mask=valid, other=-float("inf"))
                rank = tl.zeros((BT,), tl.int32)
                for other in range(0, candidates, BT):
                    rival = other + column
                    score = tl.load(scores + rival, mask=rival < candidates, other=-float("inf"))
                    ahead = score[None, :] > mine[:, None]
                    ahead = ahead | ((score[None, :] == mine[:, None]) & (rival[None, :] > entry[:, None]))
                    rank += tl.sum((ahead & (rival < candidates)[None, :]).to(tl.int32), 1)
                stays = (valid & (rank < pinned)).to(tl.int32)
                where = taken + tl.cumsum(stays, 0) - 1
                taken += tl.sum(stays, 0)
                source = tl.load(now + entry, mask=entry < pinned, other=0)
                source = tl.where(entry < pinned, source, first + entry)  # pinned + first + (entry - pinned)
                taken_over = (stays > 0) & (where < pinned)
                tl.store(now + pinned + where, source, mask=taken_over)
                if ADDS:
                    tl.store(total + pinned + where, mine, mask=taken_over)
            tl.debug_barrier()
    last = prunes * pinned
    for extra in range(prunes + 1, sets):
        for at in range(0, pinned, BT):
            entry = at + column
            valid = entry < pinned
            tl.store(chosen + extra * pinned + entry, tl.load(chosen + last + entry, mask=valid, other=0), mask=valid)
            if ADDS:
                given = tl.load(totals + last + entry, mask=valid, other=0.0)
                tl.store(totals + extra * pinned + entry, given, mask=valid)


@jit(do_not_specialize=["queries", "entries", "pinned", "ring", "pinned_slot", "ring_slot"])
def window_received_kernel(
    query_ptr, window_ptr, sums_ptr, band_ptr, out_ptr, before_ptr, total_ptr, query_head, query_row, out_row, out_head,
    total_head, queries, entries, pinned, ring, pinned_slot, ring_slot, scale, G: tl.constexpr, D: tl.constexpr,
    C: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr, SCALARS: tl.constexpr, KIND: tl.constexpr,
    STORES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (tile of window entries, key-value head); the queries are the chunk's.

    STORES: `out_ptr` holds what slots have received. Entries that stay are added to what they had before, and a tile
    of pinned tokens gets what it has in the end.
    """
    head = tl.program_id(1).to(tl.int64)
    tokens, own = tl.load(band_ptr), tl.load(band_ptr + 3)
    first, end = own + tl.load(band_ptr + SCALARS + tokens - 1), own + tokens
    begin = tl.program_id(0) * BT
    entry = begin + tl.arange(0, BT)
    valid = (entry >= first) & (entry < end)
    heads, keys = query_ptr + head * G * query_head, window_ptr + (head * entries + entry)[:, None] * D
    sums, given = sums_ptr + head * queries * G, tl.zeros((BT,), tl.float32)
    used = (begin + BT > first) & (begin < end)
    nearest = tl.maximum(begin - own, 0) * G // BM * BM
    for part in range(nearest, tl.where(used, tokens * G, nearest), BM):
        row = part + tl.arange(0, BM)
        here, index = row < tokens * G, row // G
        q = _queries(heads, 0, index, row, here, sums, False, query_head, query_row, G, D, C, 2, KIND)
        z = _key_scores(q, keys, valid, scale, C, D, KIND)
        whole = tl.load(sums + row, mask=here, other=float("inf"))
        seen = entry[None, :] <= (own + index)[:, None]
        given += tl.sum(tl.where(seen, tl.exp2(z - whole[:, None]), 0.0), 0) / G
    if STORES:
        out = out_ptr + tl.load(band_ptr + 6).to(tl.int64) * out_row + head * out_head
        slot = ring_slot + (tl.load(band_ptr + 2) + entry) % ring
        given += tl.load(before_ptr + head * (pinned + entries) + pinned + entry, mask=valid, other=0.0)
        tl.store(out + slot, given, mask=valid)
        total = tl.load(total_ptr + head * total_head + entry, mask=entry < pinned)
        tl.store(out + pinned_slot + entry, total, mask=entry < pinned)
    else:
        tl.store(out_ptr + head * entries + entry, tl.where(valid, given, 0.0), mask=entry < entries)
