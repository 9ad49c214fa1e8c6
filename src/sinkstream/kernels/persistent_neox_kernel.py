"""The persistent kernel: all layers of a decode step of one stream, for GPT-NeoX models with small layers.

The residual is parallel, so a layer has three phases: the rows that read the residual stream (queries, keys and values,
then the up-projection), attention, and the output. Every program has a share of the rows of each phase, and arrives at
each phase's counter, also without a row. Between two waits a program computes what depends on neither: the
up-projection while the others end their rows of queries, keys and values, and its product with the up-projection's
result while attention is combined. The host's side, which says how rows and slots are shared, is `persistent_neox`.
"""

# ruff: noqa: RUF005, SIM102 - Triton compiles sums of tuples, not starred ones; constants are tested on their own
from sinkstream.kernels.chunks import activated, load_row_chunks
from sinkstream.kernels.persistent_parts import (
    addresses,
    arrive,
    combine,
    pointer,
    products,
    rows_of,
    share_of_attention,
    wait_for,
)
from sinkstream.kernels.runtime import jit, prefetch_l2, prefetch_next, tl


@jit
def _load_tiles(
    w_ptr, b_ptr, first, end, stride, K: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr
):
    """Weight rows first .. end - 1, the chunks of one tile after the other, and their biases, tile by tile."""
    chunks, biases = (), ()
    for t in tl.static_range(TILES):
        r = first + t * BN + tl.arange(0, BN)
        chunks = chunks + load_row_chunks(w_ptr, r, end, stride, K, BK, False, "evict_first")
        biases = biases + (tl.load(b_ptr + r, mask=r < end, other=0.0).to(tl.float32),)
    return chunks, biases


@jit
def _statistics(xs, eps, K: tl.constexpr, BK: tl.constexpr):
    """Mean of a chunked vector and one over its deviation, (rows, 1) float32; all rows are alike."""
    total = xs[0].to(tl.float32)
    for c in tl.static_range(1, len(xs)):
        total += xs[c].to(tl.float32)
    mean = (tl.sum(total, 1) / K)[:, None]
    columns = tl.arange(0, BK)[None, :]
    square = total * 0.0
    for c in tl.static_range(len(xs)):
        d = tl.where(c * BK + columns < K, xs[c].to(tl.float32) - mean, 0.0)
        square += d * d
    return mean, (1.0 / tl.sqrt(tl.sum(square, 1) / K + eps))[:, None]


@jit
def _normalise(xs, mean, scale, gammas, betas):
    """LayerNorm of a chunked vector, by chunks, float32; zero past its end, where weight and bias are."""
    out = ()
    for c in tl.static_range(len(xs)):
        y = (xs[c].to(tl.float32) - mean) * scale
        out = out + (y * gammas[c].to(tl.float32) + betas[c].to(tl.float32),)
    return out


@jit
def _store_tiles(y_ptr, first, end, weights, biases, xs, ACT: tl.constexpr, BN: tl.constexpr, TILES: tl.constexpr):
    """Outputs first .. end - 1 of rows that read a normalised vector."""
    for t in tl.static_range(TILES):
        r = first + t * BN + tl.arange(0, BN)
        y = products(weights, xs, t) + biases[t]
        tl.store(y_ptr + r, activated(y, y, ACT, False).to(y_ptr.dtype.element_ty), mask=r < end)


@jit
def _fetch_vector(address, of, pid, programs, SIZE: tl.constexpr):
    """Prefetch to L2 a program's share of a short vector of SIZE bytes, in whole cache lines."""
    share = (SIZE + 128 * programs - 1) // (128 * programs) * 128
    first = pid.to(tl.int64) * share
    prefetch_l2(pointer(address, of), first, first * 0 + SIZE, share)


@jit
def _fetch(
    at, of, pid, programs, start, size, ITEM: tl.constexpr, H: tl.constexpr, M: tl.constexpr, CONTEXT: tl.constexpr,
    QKV: tl.constexpr, RQ: tl.constexpr, RU: tl.constexpr, RO: tl.constexpr,
):  # fmt: skip
    """Prefetch to L2 what a program reads of a layer.

    ITEM: 0 queries, keys and values, 1 up-projection, 2 slots (`start`, `size`: bytes of its keys, and of its values),
    3 output.
    """
    p = pid.to(tl.int64)
    if ITEM == 0:
        for i in tl.static_range(4):
            _fetch_vector(at[i], of, pid, programs, H * 2)
        _fetch_vector(at[5], of, pid, programs, (QKV + M) * 2)
        prefetch_l2(pointer(at[4], of), p * (RQ * H * 2), p * 0 + QKV * H * 2, RQ * H * 2)
    if ITEM == 1:
        prefetch_l2(pointer(at[4], of) + QKV * H, p * (RU * H * 2), p * 0 + M * H * 2, RU * H * 2)
    if ITEM == 2:
        prefetch_l2(pointer(at[8], of), start, start + size, size)
        prefetch_l2(pointer(at[9], of), start, start + size, size)
    if ITEM == 3:
        _fetch_vector(at[7], of, pid, programs, H * 2)
        row: tl.constexpr = (CONTEXT + M) * 2
        prefetch_l2(pointer(at[6], of), p * (RO * row), p * 0 + H * row, RO * row)


@jit
def _fetch_ahead(
    POINT: tl.constexpr, at, following, more, of, pid, programs, start, size, LEAD: tl.constexpr, H: tl.constexpr,
    M: tl.constexpr, CONTEXT: tl.constexpr, QKV: tl.constexpr, RQ: tl.constexpr, RU: tl.constexpr, RO: tl.constexpr,
):  # fmt: skip
    """Prefetch the item that is read LEAD items after item POINT; `more`: whether there is a following layer."""
    ITEM: tl.constexpr = (POINT + LEAD) % 4
    if LEAD > 0:
        if POINT + LEAD < 4:
            _fetch(at, of, pid, programs, start, size, ITEM, H, M, CONTEXT, QKV, RQ, RU, RO)
        else:
            if more:
                _fetch(following, of, pid, programs, start, size, ITEM, H, M, CONTEXT, QKV, RQ, RU, RO)


@jit
def _rotation(angles, D: tl.constexpr, C: tl.constexpr):
    """What columns, and their partners, are multiplied by when the first 2 * C of D columns are rotated."""
    columns = tl.arange(0, D)
    place = tl.where(columns < C, columns, columns - C)
    cos = tl.load(angles + place, mask=columns < 2 * C, other=1.0)
    sin = tl.load(angles + C + place, mask=columns < 2 * C, other=0.0)
    return cos, tl.where(columns < C, -sin, sin)


@jit
def _with_partners(vector, D: tl.constexpr, C: tl.constexpr):
    """The columns of a vector in memory, and those that they are rotated with, float32."""
    columns = tl.arange(0, D)
    partner = tl.where(columns < C, columns + C, columns - C)
    others = tl.load(vector + partner, mask=columns < 2 * C, other=0.0)
    return tl.load(vector + columns).to(tl.float32), others.to(tl.float32)


@jit
def _load_slots(
    keys, values, start, end, first, length, extent, skip, D: tl.constexpr, BT: tl.constexpr, TILES: tl.constexpr
):
    """Keys and values of slots start .. end - 1 in tiles (BT, D), and which of them are visible; as `load_slots`."""
    ks, vs, seens = (), (), ()
    columns = tl.arange(0, D)[None, :]
    for t in tl.static_range(TILES):
        slots = start + t * BT + tl.arange(0, BT)
        age = tl.where(slots < first, slots - first + extent, slots - first)
        seen = (slots < end) & (age < length) & (slots != skip)
        place = slots[:, None] * D + columns
        ks = ks + (tl.load(keys + place, mask=seen[:, None], other=0.0),)
        vs = vs + (tl.load(values + place, mask=seen[:, None], other=0.0),)
        seens = seens + (seen,)
    return ks, vs, seens


@jit
def _scores(q, ks, seens):
    """Scores of tiles of keys, (slots,) float32 each; minus infinity where a slot is not visible."""
    zs = ()
    for t in tl.static_range(len(ks)):
        zs = zs + (tl.where(seens[t], tl.sum(ks[t].to(tl.float32) * q[None, :], 1), -float("inf")),)
    return zs


@jit
def _attend(
    new, part, ks, vs, seens, key_place, value_place, appends, cos, sin, window_cos, window_sin, scale,
    D: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """One head and one split of its slots; with `appends` also the new token, which is written to its slot.

    `new`: the head's query, key and value. `part`: room for the weighted mean of values, largest score and total.
    """
    whole = tl.arange(0, D)
    one, other = _with_partners(new, D, C)  # loaded by all splits: so no load waits for another
    key, key_other = _with_partners(new + D, D, C)
    value = tl.load(new + 2 * D + whole).to(tl.float32)
    q = (one * cos + other * sin) * scale
    zs = _scores(q, ks, seens)
    top = zs[0]
    for t in tl.static_range(1, len(ks)):
        top = tl.maximum(top, zs[t])
    m = tl.max(top, 0)
    base = tl.where(m == -float("inf"), 0.0, m)
    p = tl.exp2(zs[0] - base)
    totals, means = p, p[:, None] * vs[0].to(tl.float32)
    for t in tl.static_range(1, len(ks)):
        p = tl.exp2(zs[t] - base)
        totals += p
        means += p[:, None] * vs[t].to(tl.float32)
    total, mean = tl.sum(totals, 0), tl.sum(means, 0)
    if appends:
        y = tl.sum(q * (key * cos + key_other * sin), 0)
        tl.store(key_place + whole, (key * window_cos + key_other * window_sin).to(key_place.dtype.element_ty))
        tl.store(value_place + whole, value.to(value_place.dtype.element_ty))
        highest = tl.maximum(m, y)
        old, fresh = tl.exp2(m - highest), tl.exp2(y - highest)
        m, total = highest, total * old + fresh
        mean = mean * old + fresh * value
    tl.store(part + whole, mean)
    tl.store(part + D, m)
    tl.store(part + D + 1, total)


@jit(do_not_specialize=["first_layer", "end_layer", "layers", "pinned_slots", "ring", "per", "ring_programs", "stride"])
def persistent_neox_kernel(
    even_ptr, odd_ptr, table_ptr, scalar_ptr, rope_ptr, buffer_ptr, part_ptr, count_ptr, first_layer, end_layer, layers,
    eps, pinned_slots, ring, per, ring_programs, stride, scale,
    next_a, next_a_end, next_a_share, next_b, next_b_end, next_b_share,
    H: tl.constexpr, M: tl.constexpr, QH: tl.constexpr, D: tl.constexpr, C: tl.constexpr, RQ: tl.constexpr,
    RU: tl.constexpr, RO: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BO: tl.constexpr, BC: tl.constexpr,
    BT: tl.constexpr, TILES: tl.constexpr, S: tl.constexpr, SP: tl.constexpr, PHASE: tl.constexpr,
    LEAD: tl.constexpr, EARLY: tl.constexpr, NEXT: tl.constexpr, COMPILED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: its share of every phase of the layers first_layer .. end_layer - 1.

    Counters, a line each: steps done, then programs that have ended a phase (queries, keys and values; up-projection;
    heads of attention; output), then splits of each head. Everything that a phase overwrites was read by programs whose
    arrival the phase has waited for. PHASE: only this one, without waiting; -1 for all. LEAD, EARLY: as in
    `PersistentNeoxConfig`. `stride`: slots from one head to the next.
    """
    pid, programs = tl.program_id(0), tl.num_programs(0)
    QKV: tl.constexpr = 3 * QH * D
    CONTEXT: tl.constexpr = QH * D
    TQ: tl.constexpr = (RQ + BN - 1) // BN
    TU: tl.constexpr = (RU + BN - 1) // BN
    TO: tl.constexpr = (RO + BO - 1) // BO
    qkv = buffer_ptr
    context = qkv + QKV
    middle = context + CONTEXT
    waits: tl.constexpr = COMPILED and PHASE < 0
    reads: tl.constexpr = PHASE < 0 or PHASE == 0
    attention: tl.constexpr = PHASE < 0 or PHASE == 1
    output: tl.constexpr = PHASE < 0 or PHASE == 2
    done = tl.load(count_ptr) * layers
    c_qkv, c_middle, c_context, c_out = count_ptr + 32, count_ptr + 64, count_ptr + 96, count_ptr + 128
    c_heads = count_ptr + 160
    q_first, u_first, o_first = pid * RQ, pid * RU, pid * RO
    q_end, u_end = tl.minimum(q_first + RQ, QKV), tl.minimum(u_first + RU, M)
    o_end = tl.minimum(o_first + RO, H)
    slot, attends, head, split, in_ring, first, length, offset, extent, own, start, end = share_of_attention(
        scalar_ptr, pid, pinned_slots, ring, per, ring_programs, stride, QH, 1, D, S
    )
    fetch_start = (own + (offset + start) * D) * 2
    fetch_size = tl.maximum(end - start, 0) * (D * 2)
    window_cos, window_sin = _rotation(rope_ptr, D, C)
    cos, sin = _rotation(rope_ptr + tl.where(in_ring, 0, 2 * C), D, C)
    at = addresses(table_ptr + first_layer * 10, 10)
    for i in tl.static_range(LEAD):
        _fetch(at, even_ptr, pid, programs, fetch_start, fetch_size, i, H, M, CONTEXT, QKV, RQ, RU, RO)
    for layer in tl.range(first_layer, end_layer, disable_licm=True):  # addresses are cheaper than registers
        turn = done + layer + 1
        odd = layer % 2 == 1
        x_in = tl.multiple_of(tl.where(odd, odd_ptr.to(tl.int64), even_ptr.to(tl.int64)).to(even_ptr.dtype), 16)
        x_out = tl.multiple_of(tl.where(odd, even_ptr.to(tl.int64), odd_ptr.to(tl.int64)).to(even_ptr.dtype), 16)
        following = addresses(table_ptr + tl.minimum(layer + 1, end_layer - 1) * 10, 10)
        w_in, b_in = pointer(at[4], even_ptr), pointer(at[5], even_ptr)
        w_out, b_out = pointer(at[6], even_ptr), pointer(at[7], even_ptr)
        keys, values = pointer(at[8], even_ptr) + own, pointer(at[9], even_ptr) + own
        if reads:
            w_q, b_q = _load_tiles(w_in, b_in, q_first, q_end, H, H, BK, BN, TQ)
            gamma, beta = rows_of(pointer(at[0], even_ptr), H, BK, BN), rows_of(pointer(at[1], even_ptr), H, BK, BN)
            if EARLY > 0:
                w_u, b_u = _load_tiles(w_in + QKV * H, b_in + QKV, u_first, u_end, H, H, BK, BN, TU)
        if attention:
            if EARLY > 1:
                ks, vs, seens = _load_slots(
                    keys + offset * D, values + offset * D, start, end, first, length, extent, slot - offset, D, BT,
                    TILES,
                )  # fmt: skip
        _fetch_ahead(
            0, at, following, layer + 1 < end_layer, even_ptr, pid, programs, fetch_start, fetch_size, LEAD, H, M,
            CONTEXT, QKV, RQ, RU, RO,
        )  # fmt: skip
        if NEXT:
            if layer + 1 == end_layer:
                prefetch_next(pid, next_a, next_a_end, next_a_share, next_b, next_b_end, next_b_share)
        if reads:
            wait_for(c_out, (turn - 1) * programs, waits)
            x = rows_of(x_in, H, BK, BN)
            mean, scale_x = _statistics(x, eps, H, BK)
            normed = _normalise(x, mean, scale_x, gamma, beta)
            _store_tiles(qkv, q_first, q_end, w_q, b_q, normed, False, BN, TQ)
            arrive(c_qkv, waits)
            if EARLY < 1:
                w_u, b_u = _load_tiles(w_in + QKV * H, b_in + QKV, u_first, u_end, H, H, BK, BN, TU)
        if attention:
            if EARLY < 2:
                ks, vs, seens = _load_slots(
                    keys + offset * D, values + offset * D, start, end, first, length, extent, slot - offset, D, BT,
                    TILES,
                )  # fmt: skip
        _fetch_ahead(
            1, at, following, layer + 1 < end_layer, even_ptr, pid, programs, fetch_start, fetch_size, LEAD, H, M,
            CONTEXT, QKV, RQ, RU, RO,
        )  # fmt: skip
        if reads:
            gamma, beta = rows_of(pointer(at[2], even_ptr), H, BK, BN), rows_of(pointer(at[3], even_ptr), H, BK, BN)
            normed = _normalise(x, mean, scale_x, gamma, beta)
            _store_tiles(middle, u_first, u_end, w_u, b_u, normed, True, BN, TU)
            arrive(c_middle, waits)
        _fetch_ahead(
            2, at, following, layer + 1 < end_layer, even_ptr, pid, programs, fetch_start, fetch_size, LEAD, H, M,
            CONTEXT, QKV, RQ, RU, RO,
        )  # fmt: skip
        if attention:
            if attends:
                wait_for(c_qkv, turn * programs, waits)
                _attend(
                    qkv + head * (3 * D), part_ptr + (head * S + split) * (D + 2), ks, vs, seens, keys + slot * D,
                    values + slot * D, split == S - 1, cos, sin, window_cos, window_sin, scale, D, C,
                )  # fmt: skip
                tl.debug_barrier()
                if tl.atomic_add(c_heads + head, 1, sem="acq_rel") == S - 1:
                    tl.debug_barrier()
                    combine(part_ptr, context, head, D, S, SP)
                    tl.store(c_heads + head, 0)
                    arrive(c_context, waits)
        if output:
            w_a, b_o = _load_tiles(w_out, b_out, o_first, o_end, CONTEXT + M, CONTEXT, BC, BO, TO)
            w_f, _ = _load_tiles(w_out + CONTEXT, b_out, o_first, o_end, CONTEXT + M, M, BC, BO, TO)
        _fetch_ahead(
            3, at, following, layer + 1 < end_layer, even_ptr, pid, programs, fetch_start, fetch_size, LEAD, H, M,
            CONTEXT, QKV, RQ, RU, RO,
        )  # fmt: skip
        if output:
            wait_for(c_middle, turn * programs, waits)
            f = rows_of(middle, M, BC, BO)
            sums = ()
            for t in tl.static_range(TO):
                r = o_first + t * BO + tl.arange(0, BO)
                old = tl.load(x_in + r, mask=r < o_end, other=0.0, cache_modifier=".cg").to(tl.float32)
                sums = sums + (products(w_f, f, t) + b_o[t] + old,)
            wait_for(c_context, turn * QH, waits)
            a = rows_of(context, CONTEXT, BC, BO)
            for t in tl.static_range(TO):
                r = o_first + t * BO + tl.arange(0, BO)
                y = products(w_a, a, t) + sums[t]
                tl.store(x_out + r, y.to(x_out.dtype.element_ty), mask=r < o_end)
            arrive(c_out, waits)
        at = following
    if waits:
        if pid == 0:  # every program has read the number of steps before its last arrival
            wait_for(c_out, (done + layers) * programs, waits)
            tl.atomic_add(count_ptr, 1)
