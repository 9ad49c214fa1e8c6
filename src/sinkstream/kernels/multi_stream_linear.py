"""Linear layers of several streams: the matrix units multiply every weight, read once, by the inputs of all streams.

One stream takes a single kernel for norm and product; several streams take two kernels. The first computes the norms,
one program a stream. The programs of the second stream tiles of weight rows through a pipeline of shared-memory stages,
column chunk by column chunk, along with the chunks of all inputs. The epilogue applies bias, activation and residual.
"""

import torch

from sinkstream.kernels.chunks import activated, check_tile, load_chunks, normalise
from sinkstream.kernels.config import MAX_STREAMS, MultiStreamConfig, default_multi_stream
from sinkstream.kernels.runtime import (
    dot_kind,
    even_programs,
    gdc_launch_dependents,
    gdc_wait,
    jit,
    launch,
    multiprocessors,
    prefetch_l2,
    shared_bytes,
    tl,
)


@jit
def _norm_rows_kernel(
    x_ptr, gamma_ptr, beta_ptr, y_ptr, x_stride, eps, K: tl.constexpr, BK: tl.constexpr, LAYER: tl.constexpr,
    HAS_BETA: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: the norm of one stream."""
    stream = tl.program_id(0).to(tl.int64)
    if PDL:
        gdc_launch_dependents()
    gammas = load_chunks(gamma_ptr, K, BK)
    betas = gammas
    if HAS_BETA:
        betas = load_chunks(beta_ptr, K, BK)
    if PDL:
        gdc_wait()
    xs, scale = normalise(
        load_chunks(x_ptr + stream * x_stride, K, BK), gammas, betas, eps, K, BK, LAYER, HAS_BETA
    )  # fmt: skip
    columns = tl.arange(0, BK)
    for c in tl.static_range(len(xs)):
        tl.store(y_ptr + stream * K + c * BK + columns, xs[c] * scale, mask=c * BK + columns < K)


@jit
def load_tile(w_ptr, r, rows, columns, w_stride, K: tl.constexpr, EVEN: tl.constexpr, EVICT: tl.constexpr):
    """Columns of weight rows `r`, zero past the end of either.

    Like `load_rows`, but for columns that vary in a loop: there they are known, and the compiler makes offsets of them.
    """
    place = w_ptr + r.to(tl.int64)[:, None] * w_stride + columns[None, :]
    if EVEN:
        w = tl.load(place, eviction_policy=EVICT)
    else:
        w = tl.load(place, mask=(r < rows)[:, None] & (columns < K)[None, :], other=0.0, eviction_policy=EVICT)
    return w


@jit
def add_products(
    acc, up, x_ptr, x_stride, streams, w_ptr, up_ptr, r, rows, w_stride, K: tl.constexpr, BK: tl.constexpr,
    S: tl.constexpr, STAGES: tl.constexpr, GATED: tl.constexpr, EVEN_ROWS: tl.constexpr, EVICT: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    """Products of weight rows with all streams added to `acc`, (rows, S); GATED: those of the up rows to `up`."""
    s = tl.arange(0, S)
    EVEN: tl.constexpr = EVEN_ROWS and K % BK == 0
    for c in tl.range(0, (K + BK - 1) // BK, num_stages=STAGES):
        columns = c * BK + tl.arange(0, BK)
        w = load_tile(w_ptr, r, rows, columns, w_stride, K, EVEN, EVICT)
        x = tl.load(
            x_ptr + s[None, :] * x_stride + columns[:, None], mask=(s < streams)[None, :] & (columns < K)[:, None],
            other=0.0,
        ).to(KIND)  # fmt: skip
        acc = tl.dot(w.to(KIND), x, acc)
        if GATED:
            up = tl.dot(load_tile(up_ptr, r, rows, columns, w_stride, K, EVEN, EVICT).to(KIND), x, up)
    return acc, up


@jit
def _multi_stream_linear_kernel(
    a_ptr, f_ptr, w_ptr, b_ptr, r_ptr, y_ptr, rows, streams, a_stride, f_stride, w_stride, r_stride, y_stride, ahead,
    KA: tl.constexpr, KF: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, S: tl.constexpr, ACT: tl.constexpr,
    GATED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, EVEN: tl.constexpr, EVICT: tl.constexpr,
    STAGES: tl.constexpr, KIND: tl.constexpr, LATE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: tiles pid, pid + programs, ... of the outputs. `rows` counts these; up rows begin at `rows`."""
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
        y, up = add_products(
            tl.zeros((BN, S), tl.float32), tl.zeros((BN, S), tl.float32), a_ptr, a_stride, streams, w_ptr, w_up, r,
            rows, w_stride, KA, BK, S, STAGES, GATED, EVEN, EVICT, KIND,
        )  # fmt: skip
        if KF > 0:
            y, up = add_products(
                y, up, f_ptr, f_stride, streams, w_ptr + KA, w_up, r, rows, w_stride, KF, BK, S, STAGES, False, EVEN,
                EVICT, KIND,
            )  # fmt: skip
        if HAS_BIAS:
            y += tl.load(b_ptr + r, mask=r < rows, other=0.0).to(tl.float32)[:, None]
            if GATED:
                up += tl.load(b_ptr + rows + r, mask=r < rows, other=0.0).to(tl.float32)[:, None]
        y = activated(y, up, ACT, GATED)
        valid = (r < rows)[:, None] & (s < streams)[None, :]
        if HAS_RESIDUAL:
            y += tl.load(r_ptr + s[None, :] * r_stride + r[:, None], mask=valid, other=0.0).to(tl.float32)
        tl.store(y_ptr + s[None, :] * y_stride + r[:, None], y, mask=valid)
    if PDL and LATE:
        gdc_launch_dependents()


def refuse_early(streams: int, pdl: bool) -> None:
    """Refuse `pdl` where a library product serves the streams. Raises ValueError."""
    if pdl:
        raise ValueError(f"pdl=True with {streams} streams; accepted: at most {MAX_STREAMS}")


def norm_rows(x, norm_weight, norm_bias, eps, norm, dtype, pdl) -> torch.Tensor:
    """The norm of every stream, (streams, hidden) of `dtype`; arguments as in `norm_linear`, which checks them."""
    streams, hidden = x.shape
    out = torch.empty(streams, hidden, dtype=dtype, device=x.device)
    launch(
        _norm_rows_kernel, (streams,), x, norm_weight, norm_weight if norm_bias is None else norm_bias, out,
        x.stride(0), eps, K=hidden, BK=1024, LAYER=norm == "layer", HAS_BETA=norm_bias is not None, num_warps=4,
        pdl=pdl,
    )  # fmt: skip
    return out


def multi_stream_linear(
    a: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    *,
    f: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str = "none",
    config: MultiStreamConfig | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """out = act(weight · [a, f] + bias) + residual for all streams; arguments as in `norm_linear`, `linear_residual`.

    Raises
    ------
    ValueError
        If there are more streams than one tile holds, or the weight is not in half precision or not aligned.
    """
    (streams, n), rows, gated = a.shape, out.shape[1], activation == "swiglu"
    if streams > MAX_STREAMS:
        raise ValueError(f"{streams} streams; accepted by the kernel: at most {MAX_STREAMS}")
    if config is None:
        config = default_multi_stream(gated, shared_bytes(a.device))
    for part in (a, f):
        if part is not None:
            check_tile(config, part.shape[1], weight)
    programs = even_programs(-(-rows // config.rows), multiprocessors(a.device) * config.per_sm)
    launch(
        _multi_stream_linear_kernel, (programs,),
        a, a if f is None else f, weight, weight if bias is None else bias, a if residual is None else residual, out,
        rows, streams, a.stride(0), 0 if f is None else f.stride(0), weight.stride(0),
        0 if residual is None else residual.stride(0), out.stride(0), config.ahead,
        KA=n, KF=0 if f is None else f.shape[1], BN=config.rows, BK=config.columns, S=MAX_STREAMS,
        ACT=activation == "gelu", GATED=gated, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
        EVEN=rows % config.rows == 0, EVICT="evict_first", STAGES=config.stages,
        KIND=dot_kind(weight.dtype), LATE=config.late, num_warps=config.warps, pdl=pdl,
    )  # fmt: skip
    return out
