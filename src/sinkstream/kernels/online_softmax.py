"""The parts of an attention kernel: rotated loads, online softmax over tiles of slots, partial results of split-K."""

# ruff: noqa: RUF005 - Triton compiles sums of tuples, not starred ones
from sinkstream.kernels.runtime import jit, tl


@jit
def rotated(
    row, columns, valid, rope, norm_ptr, eps, D: tl.constexpr, RD: tl.constexpr, NORM: tl.constexpr, SIZE: tl.constexpr
):
    """Columns of a rotated vector, float32; `row` points to its first value. NORM: RMSNorm over all D columns first."""
    half: tl.constexpr = RD // 2
    partner = tl.where(columns < half, columns + half, tl.where(columns < RD, columns - half, columns))
    cos = tl.load(rope + columns % half, mask=columns < RD, other=1.0)
    sin = tl.load(rope + half + columns % half, mask=columns < RD, other=0.0)
    x = tl.load(row + columns, mask=valid, other=0.0).to(tl.float32)
    y = tl.load(row + partner, mask=valid, other=0.0).to(tl.float32)
    if NORM:
        everything = tl.arange(0, SIZE)[None, :]
        whole = tl.load(row + everything, mask=everything < D, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(whole * whole, 1) / D + eps)[:, None]
        x = x * scale * tl.load(norm_ptr + columns).to(tl.float32)
        y = y * scale * tl.load(norm_ptr + partner).to(tl.float32)
    return x * cos + tl.where(columns < half, -y, y) * sin


@jit
def load_rotated(
    row, count, stride, rope, norm_ptr, eps, kind: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
    RD: tl.constexpr, NORM: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """`count` rotated heads in column chunks: a tuple of (ROWS, C) of dtype `kind`, rows past `count` are zero."""
    index = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, C)[None, :]
    rows = row + tl.minimum(index, count - 1) * stride
    chunks = ()
    for c in tl.static_range(D // C):
        x = rotated(rows, c * C + columns, index < count, rope, norm_ptr, eps, D, RD, NORM, SIZE)
        chunks = chunks + (x.to(kind),)
    return chunks


@jit
def load_newest(
    key, value, newest, rope, window, norm_ptr, eps, C: tl.constexpr, D: tl.constexpr, RD: tl.constexpr,
    NORM: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """The new token's key as it is attended to and as it is kept, and its value; unless `newest`, nothing is read."""
    count = tl.where(newest, 1, 0)
    attended = load_rotated(key, count, 0, rope, norm_ptr, eps, tl.float32, 1, C, D, RD, NORM, SIZE)
    kept = load_rotated(key, count, 0, window, norm_ptr, eps, tl.float32, 1, C, D, RD, NORM, SIZE)
    values = ()
    for c in tl.static_range(D // C):
        values = values + (tl.load(value + c * C + tl.arange(0, C)[None, :], mask=newest, other=0.0),)
    return attended, kept, values


@jit
def load_slots(
    keys, values, start, end, first, length, ring, skip, C: tl.constexpr, D: tl.constexpr, BT: tl.constexpr,
    LIVE: tl.constexpr,
):  # fmt: skip
    """Keys and values of BT slots in column chunks (BT, C), and which slots are visible; others are not read.

    A slot is visible if (slot - first) mod ring < length; `skip` is where the new token is being written. `start` and
    `end` are slots; with LIVE they are visible ones, counted from the oldest on.
    """
    index = start + tl.arange(0, BT)
    if LIVE:
        slots = tl.where(index < ring - first, index + first, index + first - ring)
        seen = (index < end) & (slots != skip)
    else:
        slots = index
        age = tl.where(slots < first, slots - first + ring, slots - first)
        seen = (slots < end) & (age < length) & (slots != skip)
    place = slots[:, None] * D + tl.arange(0, C)[None, :]
    k = ()
    v = ()
    for c in tl.static_range(D // C):
        k = k + (tl.load(keys + place + c * C, mask=seen[:, None], other=0.0),)
    for c in tl.static_range(D // C):
        v = v + (tl.load(values + place + c * C, mask=seen[:, None], other=0.0),)
    return k, v, seen


@jit
def tile_scores(q, k, seen, scale, DOT: tl.constexpr, KIND: tl.constexpr):
    """Scores of one tile of slots, in units of log2: (queries, BT) with DOT, else (BT,); -inf where nothing is seen."""
    if DOT:
        z = tl.dot(q[0], tl.trans(k[0].to(KIND)))
        for c in tl.static_range(1, len(k)):
            z = tl.dot(q[c], tl.trans(k[c].to(KIND)), z)
        return tl.where(seen[None, :], z * scale, -float("inf"))
    else:
        product = k[0].to(tl.float32) * q[0]
        for c in tl.static_range(1, len(k)):
            product += k[c].to(tl.float32) * q[c]
        return tl.where(seen, tl.sum(product, 1) * scale, -float("inf"))


@jit
def online_softmax_update(z, v, m, s, a, DOT: tl.constexpr, KIND: tl.constexpr):
    """Online softmax, base 2: one tile more in maxima m, sums s and weighted values a (a tuple of chunks).

    With DOT there is one softmax per query. Without it there is one per *row of the tile*, so that threads exchange
    nothing until `gather_rows` merges the rows at the end.
    """
    if DOT:
        top = tl.maximum(m, tl.max(z, 1))
        safe = tl.where(top == -float("inf"), 0.0, top)
        p = tl.exp2(z - safe[:, None])
        old = tl.exp2(m - safe)
        s = s * old + tl.sum(p, 1)
        p = p.to(KIND)
    else:
        top = tl.maximum(m, z)
        safe = tl.where(top == -float("inf"), 0.0, top)
        p = tl.exp2(z - safe)
        old = tl.exp2(m - safe)
        s = s * old + p
    out = ()
    for c in tl.static_range(len(v)):
        if DOT:
            out = out + (tl.dot(p, v[c].to(KIND), a[c] * old[:, None]),)
        else:
            out = out + (a[c] * old[:, None] + p[:, None] * v[c].to(tl.float32),)
    return top, s, out


@jit
def online_softmax_init(ROWS: tl.constexpr, C: tl.constexpr, D: tl.constexpr):
    """An online softmax of ROWS rows before its first tile."""
    a = ()
    for _ in tl.static_range(D // C):
        a = a + (tl.zeros((ROWS, C), tl.float32),)
    return tl.full((ROWS,), -float("inf"), tl.float32), tl.zeros((ROWS,), tl.float32), a


@jit
def gather_rows(m, s, a):
    """One online softmax from those of all rows of a tile: shapes (1,), (1,) and a tuple of (1, C)."""
    top = tl.max(m, 0)
    weight = tl.exp2(m - tl.where(top == -float("inf"), 0.0, top))
    out = ()
    for c in tl.static_range(len(a)):
        out = out + (tl.sum(a[c] * weight[:, None], 0)[None, :],)
    return tl.full((1,), 0.0, tl.float32) + top, tl.full((1,), 0.0, tl.float32) + tl.sum(s * weight, 0), out


@jit
def newest_scores(q, k, scale):
    """Scores of the new token, (queries,), in units of log2, from registers; k is a tuple of (1, C)."""
    z = tl.sum(q[0].to(tl.float32) * k[0], 1)
    for c in tl.static_range(1, len(k)):
        z += tl.sum(q[c].to(tl.float32) * k[c], 1)
    return z * scale


@jit
def online_softmax_update_new(z, v, m, s, a):
    """Online softmax: the new token, from registers; v is a tuple of (1, C)."""
    top = tl.maximum(m, z)
    old, p = tl.exp2(m - top), tl.exp2(z - top)
    out = ()
    for c in tl.static_range(len(v)):
        out = out + (a[c] * old[:, None] + p[:, None] * v[c].to(tl.float32),)
    return top, s * old + p, out


@jit
def keep_scores(row, z, first, end, skip, stride, G: tl.constexpr, BT: tl.constexpr, DOT: tl.constexpr):
    """Write the scores of the slots first .. first + BT - 1 that lie before `end`, all but the new token's."""
    slots = first + tl.arange(0, BT)
    mine = (slots < end) & (slots != skip)
    if DOT:
        g = tl.arange(0, 16)[:, None]
        tl.store(row + g * stride + slots[None, :], z, mask=mine[None, :] & (g < G))
    else:
        tl.store(row + slots, z, mask=mine)


@jit
def online_softmax_run(
    k, v, seen, keys, values, start, end, first, length, ring, skip, q, scale, m, s, a, score_row, score_stride,
    G: tl.constexpr, C: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr,
    DOT: tl.constexpr, KIND: tl.constexpr, SCORES: tl.constexpr, LIVE: tl.constexpr,
):  # fmt: skip
    """All tiles of one program. Without STAGES k and v hold the first tile, and the next one is in flight.

    SCORES: the scores of all queries are kept, from `score_row` on.
    """
    if STAGES > 0:
        for t in tl.range(0, TILES, num_stages=STAGES):
            k, v, seen = load_slots(keys, values, start + t * BT, end, first, length, ring, skip, C, D, BT, LIVE)
            z = tile_scores(q, k, seen, scale, DOT, KIND)
            if SCORES:
                keep_scores(score_row, z, start + t * BT, end, skip, score_stride, G, BT, DOT)
            m, s, a = online_softmax_update(z, v, m, s, a, DOT, KIND)
    elif TILES <= 4:
        for t in tl.static_range(TILES):
            old_k, old_v, old_seen = k, v, seen
            if t + 1 < TILES:
                k, v, seen = load_slots(
                    keys, values, start + (t + 1) * BT, end, first, length, ring, skip, C, D, BT, LIVE
                )
            z = tile_scores(q, old_k, old_seen, scale, DOT, KIND)
            if SCORES:
                keep_scores(score_row, z, start + t * BT, end, skip, score_stride, G, BT, DOT)
            m, s, a = online_softmax_update(z, old_v, m, s, a, DOT, KIND)
    else:
        for t in tl.range(0, TILES):
            old_k, old_v, old_seen = k, v, seen
            k, v, seen = load_slots(keys, values, start + (t + 1) * BT, end, first, length, ring, skip, C, D, BT, LIVE)
            z = tile_scores(q, old_k, old_seen, scale, DOT, KIND)
            if SCORES:
                keep_scores(score_row, z, start + t * BT, end, skip, score_stride, G, BT, DOT)
            m, s, a = online_softmax_update(z, old_v, m, s, a, DOT, KIND)
    return m, s, a


@jit
def store_partial(part, m, s, a, ROWS: tl.constexpr, G: tl.constexpr, C: tl.constexpr, D: tl.constexpr):
    """Partial results of one program: G * D weighted values, G maxima, G sums, float32."""
    g = tl.arange(0, ROWS)
    place = part + g[:, None] * D + tl.arange(0, C)[None, :]
    for c in tl.static_range(D // C):
        tl.store(place + c * C, a[c], mask=(g < G)[:, None])
    tl.store(part + G * D + g, m, mask=g < G)
    tl.store(part + G * D + G + g, s, mask=g < G)


@jit
def load_partials(
    part, programs, g, G: tl.constexpr, GC: tl.constexpr, D: tl.constexpr, SP: tl.constexpr, SIZE: tl.constexpr
):
    """Partial results of all programs for queries g .. g + GC - 1: m and s (SP, GC), weighted values (SP, GC, SIZE)."""
    width: tl.constexpr = G * D + 2 * G
    row, query = tl.arange(0, SP)[:, None], g + tl.arange(0, GC)[None, :]
    columns = tl.arange(0, SIZE)[None, None, :]
    valid = (row < programs) & (query < G)
    m = tl.load(part + row * width + G * D + query, mask=valid, other=0.0, cache_modifier=".cg")
    s = tl.load(part + row * width + G * D + G + query, mask=valid, other=1.0, cache_modifier=".cg")
    place = part + (row * width + query * D)[:, :, None] + columns
    a = tl.load(place, mask=valid[:, :, None] & (columns < D), other=0.0, cache_modifier=".cg")
    return tl.where(row < programs, m, -float("inf")), s, a


@jit
def combine(
    part, out_ptr, sum_ptr, programs, G: tl.constexpr, GC: tl.constexpr, D: tl.constexpr, SP: tl.constexpr,
    SIZE: tl.constexpr, SCORES: tl.constexpr,
):  # fmt: skip
    """Reduce the partial results of all programs of a head, GC queries at a time; the next queries are in flight.

    SCORES: the logarithm of each query's sum, base 2, is kept too.
    """
    query, columns = tl.arange(0, GC)[:, None], tl.arange(0, SIZE)[None, :]
    m, s, a = load_partials(part, programs, 0, G, GC, D, SP, SIZE)
    for g in tl.static_range(0, G, GC):
        old_m, old_s, old_a = m, s, a
        if g + GC < G:
            m, s, a = load_partials(part, programs, g + GC, G, GC, D, SP, SIZE)
        weight = tl.exp2(old_m - tl.max(old_m, 0)[None, :])
        y = tl.sum(old_a * weight[:, :, None], 0) / tl.sum(old_s * weight, 0)[:, None]
        if SCORES:
            one = g + tl.arange(0, GC)
            tl.store(sum_ptr + one, tl.max(old_m, 0) + tl.log2(tl.sum(old_s * weight, 0)), mask=one < G)
        tl.store(out_ptr + (g + query) * D + columns, y, mask=(g + query < G) & (columns < D))
