"""A product of several streams whose inputs stay with a program: only weights go through the pipeline, row by row.

The inputs of all streams are loaded once, behind the wait for the previous kernel, when the rows of the first tiles are
already on their way to shared memory. `multi_stream_linear` says when this kernel is taken.
"""

# ruff: noqa: RUF005 - Triton compiles sums of tuples, not starred ones
from sinkstream.kernels.runtime import gdc_launch_dependents, gdc_wait, jit, prefetch_next, tl


@jit
def load_inputs(
    x_ptr, x_stride, streams, columns, K: tl.constexpr, BK: tl.constexpr, S: tl.constexpr, KIND: tl.constexpr
):
    """The inputs of all streams by chunks, (parts, columns of a part, S), zero past the ends of both."""
    s, columns = tl.arange(0, S)[None, :, None], columns[:, None, :]
    chunks = ()
    for c in tl.static_range((K + BK - 1) // BK):
        seen = s < streams
        if (c + 1) * BK > K:
            seen = seen & (c * BK + columns < K)
        x = tl.load(x_ptr + s * x_stride + (c * BK + columns), mask=seen, other=0.0)
        chunks = chunks + (tl.permute(x.to(KIND), (0, 2, 1)),)
    return chunks


@jit
def no_inputs(K: tl.constexpr, BK: tl.constexpr, S: tl.constexpr, PARTS: tl.constexpr, KIND: tl.constexpr):
    """What `load_inputs` takes the place of."""
    chunks = ()
    for _ in tl.static_range((K + BK - 1) // BK):
        chunks = chunks + (tl.zeros((PARTS, BK // PARTS, S), KIND),)
    return chunks


@jit
def multi_stream_held_kernel(
    a_ptr, w_ptr, b_ptr, r_ptr, y_ptr, rows, streams, a_stride, w_stride, r_stride, y_stride, next_a, next_a_end,
    next_a_share, next_b, next_b_end, next_b_share,
    K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, S: tl.constexpr, PARTS: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, EVEN: tl.constexpr, EVICT: tl.constexpr, STAGES: tl.constexpr, KIND: tl.constexpr,
    LATE: tl.constexpr, NEXT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: tiles pid, pid + programs, ... of the outputs, whole rows of K weights each."""
    PART: tl.constexpr = BK // PARTS
    start, programs = tl.program_id(0), tl.num_programs(0)
    if PDL and not LATE:
        gdc_launch_dependents()
    columns = tl.arange(0, PARTS)[:, None] * PART + tl.arange(0, PART)[None, :]
    s = tl.arange(0, S)
    xs = no_inputs(K, BK, S, PARTS, KIND)
    for tile in tl.range(start, tl.cdiv(rows, BN), programs, num_stages=STAGES):
        if tile == start:
            if PDL:
                gdc_wait()
            xs = load_inputs(a_ptr, a_stride, streams, columns, K, BK, S, KIND)
        r = tile * BN + tl.arange(0, BN)
        acc = tl.zeros((PARTS, BN, S), tl.float32)
        for c in tl.static_range((K + BK - 1) // BK):
            column, row = (c * BK + columns)[:, None, :], r[None, :, None]
            place = w_ptr + row.to(tl.int64) * w_stride + column
            if EVEN and (c + 1) * BK <= K:
                w = tl.load(place, eviction_policy=EVICT)
            else:
                w = tl.load(place, mask=(row < rows) & (column < K), other=0.0, eviction_policy=EVICT)
            acc = tl.dot(w.to(KIND), xs[c], acc)
        if NEXT:  # noqa: SIM102 - known when this is compiled, unlike the next condition
            if tile + programs >= tl.cdiv(rows, BN):
                prefetch_next(start, next_a, next_a_end, next_a_share, next_b, next_b_end, next_b_share)
        y = tl.sum(acc, 0)
        valid = (r < rows)[:, None] & (s < streams)[None, :]
        if HAS_BIAS:
            y += tl.load(b_ptr + r, mask=r < rows, other=0.0).to(tl.float32)[:, None]
        if HAS_RESIDUAL:
            y += tl.load(r_ptr + s[None, :] * r_stride + r[:, None], mask=valid, other=0.0).to(tl.float32)
        tl.store(y_ptr + s[None, :] * y_stride + r[:, None], y, mask=valid)
    if PDL and LATE:
        gdc_launch_dependents()
