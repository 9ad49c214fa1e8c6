"""Kernels of linear layers of several streams, see `multi_stream_linear`: norms, and products on the matrix units."""

from sinkstream.kernels.chunks import activated, load_chunks, normalise
from sinkstream.kernels.runtime import gdc_launch_dependents, gdc_wait, jit, prefetch_l2, prefetch_next, tl


@jit
def norm_rows_kernel(
    x_ptr, gamma_ptr, beta_ptr, gamma2_ptr, beta2_ptr, y_ptr, x_stride, eps, K: tl.constexpr, BK: tl.constexpr,
    LAYER: tl.constexpr, HAS_BETA: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (stream, which norm)."""
    stream, second = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if PDL:
        gdc_launch_dependents()
    gammas = load_chunks(tl.where(second == 0, gamma_ptr, gamma2_ptr), K, BK)
    betas = gammas
    if HAS_BETA:
        betas = load_chunks(tl.where(second == 0, beta_ptr, beta2_ptr), K, BK)
    if PDL:
        gdc_wait()
    xs, scale = normalise(
        load_chunks(x_ptr + stream * x_stride, K, BK), gammas, betas, eps, K, BK, LAYER, HAS_BETA
    )  # fmt: skip
    columns = tl.arange(0, BK)
    y_ptr += (second * tl.num_programs(0) + stream) * K
    for c in tl.static_range(len(xs)):
        tl.store(y_ptr + c * BK + columns, xs[c] * scale, mask=c * BK + columns < K)


@jit
def load_tile(
    w_ptr, r, rows, columns, w_stride, K: tl.constexpr, PARTS: tl.constexpr, EVEN: tl.constexpr, EVICT: tl.constexpr
):
    """Columns, (parts, columns of a part), of weight rows `r`, zero past the end of either: (parts, rows, columns).

    With one part (rows, columns). Like `load_rows`, but for columns that vary in a loop: there they are known, and the
    compiler makes offsets of them.
    """
    if PARTS > 1:
        r, columns = r[None, :, None], columns[:, None, :]
    else:
        r, columns = r[:, None], columns
    place = w_ptr + r.to(tl.int64) * w_stride + columns
    if EVEN:
        w = tl.load(place, eviction_policy=EVICT)
    else:
        w = tl.load(place, mask=(r < rows) & (columns < K), other=0.0, eviction_policy=EVICT)
    return w


@jit
def add_products(
    acc, up, x_ptr, x_stride, streams, w_ptr, up_ptr, r, rows, w_stride, K: tl.constexpr, BK: tl.constexpr,
    S: tl.constexpr, PARTS: tl.constexpr, STAGES: tl.constexpr, GATED: tl.constexpr, EVEN_ROWS: tl.constexpr,
    EVICT: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Products of weight rows with all streams added to `acc`, (parts, rows, S); GATED: those of the up rows to `up`.

    Each part of a chunk of columns is added up by warps of its own. With one part the sums are (rows, S).
    """
    s = tl.arange(0, S)
    EVEN: tl.constexpr = EVEN_ROWS and K % BK == 0
    PART: tl.constexpr = BK // PARTS
    for c in tl.range(0, (K + BK - 1) // BK, num_stages=STAGES):
        columns = c * BK + tl.arange(0, PARTS)[:, None] * PART + tl.arange(0, PART)[None, :]
        w = load_tile(w_ptr, r, rows, columns, w_stride, K, PARTS, EVEN, EVICT)
        if PARTS > 1:
            stream, column = s[None, None, :], columns[:, :, None]
        else:
            stream, column = s[None, :], tl.trans(columns)
        x = tl.load(x_ptr + stream * x_stride + column, mask=(stream < streams) & (column < K), other=0.0).to(KIND)
        acc = tl.dot(w.to(KIND), x, acc)
        if GATED:
            up = tl.dot(load_tile(up_ptr, r, rows, columns, w_stride, K, PARTS, EVEN, EVICT).to(KIND), x, up)
    return acc, up


@jit
def no_products(PARTS: tl.constexpr, BN: tl.constexpr, S: tl.constexpr):
    """What `add_products` begins with."""
    if PARTS > 1:
        return tl.zeros((PARTS, BN, S), tl.float32)
    else:
        return tl.zeros((BN, S), tl.float32)


@jit
def sum_parts(acc, PARTS: tl.constexpr):
    """The sums of all parts: (rows, S)."""
    if PARTS > 1:
        return tl.sum(acc, 0)
    else:
        return acc


@jit
def multi_stream_linear_kernel(
    a_ptr, f_ptr, w_ptr, b_ptr, r_ptr, y_ptr, z_ptr, rows, streams, a_stride, f_stride, w_stride, r_stride, y_stride,
    z_stride, plain, ahead, next_a, next_a_end, next_a_share, next_b, next_b_end, next_b_share,
    KA: tl.constexpr, KF: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, S: tl.constexpr, PARTS: tl.constexpr,
    PAIR: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    EVEN: tl.constexpr, EVICT: tl.constexpr, STAGES: tl.constexpr, KIND: tl.constexpr, LATE: tl.constexpr,
    NEXT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: tiles pid, pid + programs, ... of the outputs. `rows` counts these; up rows begin at `rows`.

    PAIR: rows from `plain` on, a multiple of BN, are of a second layer, whose inputs are `f` and whose outputs are `z`.
    The activation is that of the second layer then.
    """
    start = tl.program_id(0)
    w_up = w_ptr + rows.to(tl.int64) * w_stride
    if PDL:
        if not LATE:
            gdc_launch_dependents()
        for i in range(BN):
            row = (start * BN + i).to(tl.int64)
            first, end = row * w_stride * 2, tl.where(row < rows, row * w_stride * 2 + ahead, 0)
            prefetch_l2(w_ptr, first, end, ahead)
            if GATED:
                prefetch_l2(w_up, first, end, ahead)
        gdc_wait()
    s = tl.arange(0, S)
    for tile in range(start, tl.cdiv(rows, BN), tl.num_programs(0)):
        r = tile * BN + tl.arange(0, BN)
        second = PAIR and tile * BN >= plain
        y, up = add_products(
            no_products(PARTS, BN, S), no_products(PARTS, BN, S), tl.where(second, f_ptr, a_ptr), a_stride, streams,
            w_ptr, w_up, r, rows, w_stride, KA, BK, S, PARTS, STAGES, GATED, EVEN, EVICT, KIND,
        )  # fmt: skip
        if KF > 0:
            y, up = add_products(
                y, up, f_ptr, f_stride, streams, w_ptr + KA, w_up, r, rows, w_stride, KF, BK, S, PARTS, STAGES, False,
                EVEN, EVICT, KIND,
            )  # fmt: skip
        if NEXT:  # noqa: SIM102 - known when this is compiled, unlike the next condition
            if tile + tl.num_programs(0) >= tl.cdiv(rows, BN):
                prefetch_next(start, next_a, next_a_end, next_a_share, next_b, next_b_end, next_b_share)
        y = sum_parts(y, PARTS)
        if GATED:
            up = sum_parts(up, PARTS)
        if HAS_BIAS:
            y += tl.load(b_ptr + r, mask=r < rows, other=0.0).to(tl.float32)[:, None]
            if GATED:
                up += tl.load(b_ptr + rows + r, mask=r < rows, other=0.0).to(tl.float32)[:, None]
        valid = (r < rows)[:, None] & (s < streams)[None, :]
        if PAIR:
            if second:
                z = activated(y, up, ACT, GATED)
                tl.store(z_ptr + s[None, :] * z_stride + (r - plain)[:, None], z, mask=valid)
            else:
                tl.store(y_ptr + s[None, :] * y_stride + r[:, None], y, mask=valid)
        else:
            y = activated(y, up, ACT, GATED)
            if HAS_RESIDUAL:
                y += tl.load(r_ptr + s[None, :] * r_stride + r[:, None], mask=valid, other=0.0).to(tl.float32)
            tl.store(y_ptr + s[None, :] * y_stride + r[:, None], y, mask=valid)
    if PDL and LATE:
        gdc_launch_dependents()
