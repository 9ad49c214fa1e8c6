"""Vectors and weight rows in chunks of columns: loads, the norm, products and the epilogue of the linear kernels."""

# ruff: noqa: RUF005 - Triton compiles sums of tuples, not starred ones
import torch

from sinkstream.kernels.runtime import HALF_DTYPES, jit, tl


@jit
def load_chunks(ptr, K: tl.constexpr, BK: tl.constexpr):
    """A vector of K values as a tuple of float32 register chunks of BK, zero past its end."""
    columns = tl.arange(0, BK)
    chunks = ()
    for c in tl.static_range((K + BK - 1) // BK):
        chunks = chunks + (tl.load(ptr + c * BK + columns, mask=c * BK + columns < K, other=0.0),)
    return chunks


@jit
def no_chunks(K: tl.constexpr, BK: tl.constexpr):
    """A chunked vector of zeros, float32."""
    out = ()
    for _ in tl.static_range((K + BK - 1) // BK):
        out = out + (tl.zeros((BK,), tl.float32),)
    return out


@jit
def normalise(xs, gammas, betas, eps, K: tl.constexpr, BK: tl.constexpr, LAYER: tl.constexpr, HAS_BETA: tl.constexpr):
    """LayerNorm (or RMSNorm) of a chunked vector, in float32: chunks, and a factor that the epilogue multiplies by.

    The factor is the scale of an RMSNorm without an offset, so that products need not wait for it; otherwise it is 1.
    """
    columns = tl.arange(0, BK)
    total = tl.zeros((BK,), tl.float32)
    square = tl.zeros((BK,), tl.float32)
    mean = 0.0
    if LAYER:
        for c in tl.static_range(len(xs)):
            total += xs[c].to(tl.float32)
        mean = tl.sum(total) / K
    for c in tl.static_range(len(xs)):
        d = tl.where(c * BK + columns < K, xs[c].to(tl.float32) - mean, 0.0)
        square += d * d
    scale = 1.0 / tl.sqrt(tl.sum(square) / K + eps)
    now, later = scale, 1.0
    if not LAYER and not HAS_BETA:
        now, later = 1.0, scale
    out = ()
    for c in tl.static_range(len(xs)):
        y = (xs[c].to(tl.float32) - mean) * now * gammas[c].to(tl.float32)
        if HAS_BETA:
            y += betas[c].to(tl.float32)
        out = out + (y,)
    return out, later


@jit
def load_rows(
    w_ptr, rows, limit, stride, c: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr,
    EVICT: tl.constexpr,
):  # fmt: skip
    """Column chunk c of weight rows: (rows, BK) of the weight's dtype, zero past its end."""
    columns = tl.arange(0, BK)
    place = w_ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :] + c * BK
    if EVEN and (c + 1) * BK <= K:
        w = tl.load(place, eviction_policy=EVICT)
    else:
        mask = (rows < limit)[:, None] & (c * BK + columns < K)[None, :]
        w = tl.load(place, mask=mask, other=0.0, eviction_policy=EVICT)
    return w


@jit
def load_row_chunks(
    w_ptr, rows, limit, stride, K: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, EVICT: tl.constexpr
):
    """All column chunks of weight rows, in registers."""
    chunks = ()
    for c in tl.static_range((K + BK - 1) // BK):
        chunks = chunks + (load_rows(w_ptr, rows, limit, stride, c, K, BK, EVEN, EVICT),)
    return chunks


@jit
def chunk_products(chunks, xs):
    """Products of row chunks and a chunked vector, not yet reduced along the row: (rows, BK) float32."""
    acc = chunks[0].to(tl.float32) * xs[0][None, :]
    for c in tl.static_range(1, len(chunks)):
        acc += chunks[c].to(tl.float32) * xs[c][None, :]
    return acc


@jit
def row_products(
    w_ptr, rows, limit, stride, xs, K: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, EVICT: tl.constexpr
):
    """`chunk_products` of rows in memory, loaded chunk by chunk."""
    acc = tl.zeros((rows.shape[0], BK), tl.float32)
    for c in tl.static_range((K + BK - 1) // BK):
        acc += load_rows(w_ptr, rows, limit, stride, c, K, BK, EVEN, EVICT).to(tl.float32) * xs[c][None, :]
    return acc


@jit
def row_terms(term_ptr, r, rows, GIVEN: tl.constexpr, IN_PLACE: tl.constexpr = False):
    """A bias or residual of rows `r`, float32; zeros without GIVEN.

    IN_PLACE: loaded where the program says so; the compiler's pipeline does not load it ahead.
    """
    if GIVEN:
        terms = tl.load(term_ptr + r, mask=r < rows, other=0.0, volatile=IN_PLACE).to(tl.float32)
    else:
        terms = tl.zeros((r.shape[0],), tl.float32)
    return terms


@jit
def activated(y, up, ACT: tl.constexpr, GATED: tl.constexpr):
    """The activation of outputs, float32: SwiGLU with `up`, or gelu, or none."""
    if GATED:
        y = y / (1.0 + tl.exp(-y)) * up
    if ACT:
        y = 0.5 * y * (1.0 + tl.math.erf(y * 0.7071067811865476))
    return y


@jit
def store_tile(y_ptr, r, y, up, rows, ACT: tl.constexpr, GATED: tl.constexpr):
    """Activation and store of one tile of outputs."""
    y = activated(y, up, ACT, GATED)
    tl.store(y_ptr + r, y, mask=r < rows)


def check_weight(weight: torch.Tensor, hidden: int) -> None:
    """Check what the kernels need of a weight: half precision and rows that 16-byte loads can read."""
    if weight.dtype not in HALF_DTYPES:
        raise ValueError(f"weight has dtype {weight.dtype}; accepted by the kernel: {', '.join(map(str, HALF_DTYPES))}")
    if hidden % 8 or weight.stride(0) % 8 or weight.data_ptr() % 16:
        raise ValueError(
            f"weight rows of {hidden} values with stride {weight.stride(0)} at {weight.data_ptr() % 16} bytes past a"
            " multiple of 16; accepted: multiples of 8 values, 16-byte aligned"
        )
