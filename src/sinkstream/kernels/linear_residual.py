"""Linear layer and residual in one kernel: out = W_a · a + W_f · f + bias + residual, both products in one pass.

GPT-NeoX adds attention output and feed-forward to the same residual, so the two projections are one product over the
concatenated input, with the packed weight [W_a | W_f]. Llama uses one input. In each program the input
stays in registers, weight rows stream through a pipeline of shared-memory stages. The kernel serves one stream; several
streams take `multi_stream_linear`.
"""

# ruff: noqa: RUF005 - Triton compiles sums of tuples, not starred ones
import torch
import torch.nn.functional as F

from sinkstream.kernels.chunks import (
    check_weight,
    chunk_products,
    load_chunks,
    load_row_chunks,
    no_chunks,
    row_products,
    row_terms,
)
from sinkstream.kernels.config import MAX_STREAMS, LinearConfig, MultiStreamConfig, default_linear_residual
from sinkstream.kernels.multi_stream_linear import multi_stream_linear, refuse_early
from sinkstream.kernels.runtime import (
    FLOAT_DTYPES,
    NO_PREFETCH,
    Prefetch,
    check_tensor,
    even_programs,
    gdc_launch_dependents,
    gdc_wait,
    jit,
    launch,
    multiprocessors,
    prefetch_l2,
    prefetch_next,
    shared_bytes,
    tl,
    use_triton,
)


@jit
def as_float(chunks):
    """The chunks in float32."""
    out = ()
    for c in tl.static_range(len(chunks)):
        out = out + (chunks[c].to(tl.float32),)
    return out


@jit
def load_inputs(a_ptr, f_ptr, KA: tl.constexpr, KF: tl.constexpr, BK: tl.constexpr):
    """Both inputs in float32 chunks; none of f where KF is 0."""
    return as_float(load_chunks(a_ptr, KA, BK)), as_float(load_chunks(f_ptr, KF, BK))


@jit
def _linear_residual_kernel(
    a_ptr, f_ptr, w_ptr, b_ptr, r_ptr, y_ptr, rows, w_stride, ahead,
    next_a, next_a_end, next_a_share, next_b, next_b_end, next_b_share,
    KA: tl.constexpr, KF: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, EVEN: tl.constexpr, EVICT: tl.constexpr, STAGES: tl.constexpr,
    HOLD: tl.constexpr, FILL: tl.constexpr, NEXT: tl.constexpr, LATE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: tiles pid, pid + programs, ... of the output rows. HOLD, FILL: as in `norm_linear_tiles`."""
    start = tl.program_id(0)
    programs = tl.num_programs(0)
    if PDL:
        if not LATE:
            gdc_launch_dependents()
        tile_bytes = BN * w_stride * 2
        for i in range(ahead):
            first = (start + (i + HOLD + FILL * (STAGES - 1)) * programs).to(tl.int64) * tile_bytes
            prefetch_l2(w_ptr, first, rows.to(tl.int64) * w_stride * 2, tile_bytes)
    if HOLD:
        r = start * BN + tl.arange(0, BN)
        terms = row_terms(b_ptr, r, rows, HAS_BIAS)
        first_rows = load_row_chunks(w_ptr, r, rows, w_stride, KA, BK, EVEN, EVICT)
        if KF > 0:
            first_f = load_row_chunks(w_ptr + KA, r, rows, w_stride, KF, BK, EVEN, EVICT)
    if FILL:
        xa = no_chunks(KA, BK)
        xf = no_chunks(KF, BK)
    else:
        if PDL:
            gdc_wait()
        if HOLD:
            terms += row_terms(r_ptr, r, rows, HAS_RESIDUAL)
        xa, xf = load_inputs(a_ptr, f_ptr, KA, KF, BK)
    if HOLD:
        acc = chunk_products(first_rows, xa)
        if KF > 0:
            acc += chunk_products(first_f, xf)
        tl.store(y_ptr + r, terms + tl.sum(acc, 1), mask=r < rows)
        start += programs
    for tile in tl.range(start, tl.cdiv(rows, BN), programs, num_stages=STAGES):
        if FILL:  # noqa: SIM102 - known when this is compiled, unlike the next condition
            if tile == start:
                if PDL:
                    gdc_wait()
                xa, xf = load_inputs(a_ptr, f_ptr, KA, KF, BK)
        r = tile * BN + tl.arange(0, BN)
        y = row_terms(b_ptr, r, rows, HAS_BIAS) + row_terms(r_ptr, r, rows, HAS_RESIDUAL, FILL)
        acc = row_products(w_ptr, r, rows, w_stride, xa, KA, BK, EVEN, EVICT)
        if KF > 0:
            acc += row_products(w_ptr + KA, r, rows, w_stride, xf, KF, BK, EVEN, EVICT)
        y += tl.sum(acc, 1)
        tl.store(y_ptr + r, y, mask=r < rows)
    if PDL and LATE:
        gdc_launch_dependents()
    if NEXT:
        prefetch_next(tl.program_id(0), next_a, next_a_end, next_a_share, next_b, next_b_end, next_b_share)


def linear_residual(
    a: torch.Tensor,
    weight: torch.Tensor,
    *,
    f: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    config: LinearConfig | MultiStreamConfig | None = None,
    prefetch: Prefetch = NO_PREFETCH,
    pdl: bool = False,
    implementation: str | None = None,
) -> torch.Tensor:
    """out = weight · [a, f] + bias + residual.

    One stream runs the kernel. Up to 16 run another, which reads the weight once for all of them; more run PyTorch's
    matmul, without `prefetch`.

    Parameters
    ----------
    a : Tensor, (streams, n)
        Rows may be strided (a view into a larger output).
    weight : Tensor, (hidden, n + m)
        Model dtype, packed along the input axis; rows may be strided.
    f : Tensor, (streams, m), optional
        The second input; without it m is 0.
    bias : Tensor, (hidden,), optional
    residual : Tensor, (streams, hidden), optional
        May be float32.
    out : Tensor, (streams, hidden), optional
        May be `residual` itself. Its dtype is that of the result (default: the residual's, else the weight's).
    config, prefetch, pdl, implementation
        As in `norm_linear`.

    Returns
    -------
    Tensor, (streams, hidden)

    Raises
    ------
    ValueError
        Naming the argument that the op cannot serve and what is accepted.
    """
    streams, n = a.shape
    m = 0 if f is None else f.shape[1]
    hidden = weight.shape[0]
    check_tensor("a", a, (None, None), dtypes=FLOAT_DTYPES, device=a.device, contiguous=False)
    if f is not None:
        check_tensor("f", f, (streams, None), dtypes=FLOAT_DTYPES, device=a.device, contiguous=False)
    check_tensor("weight", weight, (None, n + m), dtypes=FLOAT_DTYPES, device=a.device, contiguous=False)
    if bias is not None:
        check_tensor("bias", bias, (hidden,), dtypes=FLOAT_DTYPES, device=a.device)
    if residual is not None:
        check_tensor("residual", residual, (streams, hidden), dtypes=FLOAT_DTYPES, device=a.device, contiguous=False)
    if out is None:
        out = torch.empty(streams, hidden, dtype=(weight if residual is None else residual).dtype, device=a.device)
    check_tensor("out", out, (streams, hidden), dtypes=FLOAT_DTYPES, device=a.device, contiguous=False)
    if not use_triton(implementation, a):
        return out.copy_(linear_residual_twin(a, weight, f, bias, residual))
    if streams > MAX_STREAMS:
        refuse_early(streams, pdl)
        return linear_residual_library(a, weight, f, bias, residual, out)
    if streams > 1:
        own = config if isinstance(config, MultiStreamConfig) else None
        return multi_stream_linear(
            a, weight, out, f=f, bias=bias, residual=residual, config=own, prefetch=prefetch, pdl=pdl
        )
    if not isinstance(config, LinearConfig):
        config = default_linear_residual(n, m, shared_bytes(a.device))
    _launch(a, weight, f, bias, residual, out, config, prefetch, pdl)
    return out


def linear_residual_twin(a, weight, f, bias, residual) -> torch.Tensor:
    """The twin of the kernel: plain PyTorch in float32 (float64 for float64 weights), result in that precision."""
    work = torch.float64 if weight.dtype == torch.float64 else torch.float32
    x = a if f is None else torch.cat([a.to(work), f.to(work)], dim=-1)
    y = x.to(work) @ weight.to(work).T
    for term in (bias, residual):
        if term is not None:
            y = y + term.to(work)
    return y


def linear_residual_library(a, weight, f, bias, residual, out) -> torch.Tensor:
    """The op for more streams than the kernels take: PyTorch's matmul in the model's dtype, the residual in its own."""
    x = a if f is None else torch.cat([a, f], -1)
    y = F.linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))
    return out.copy_(y if residual is None else y + residual)


def _launch(a, weight, f, bias, residual, out, config, prefetch, pdl):
    n, m, rows = a.shape[1], 0 if f is None else f.shape[1], weight.shape[0]
    for size in (n, m):
        check_weight(weight, size)
    programs = even_programs(-(-rows // config.rows), multiprocessors(a.device) * config.per_sm)
    launch(
        _linear_residual_kernel, (programs,),
        a, a if f is None else f, weight, weight if bias is None else bias, a if residual is None else residual, out,
        rows, weight.stride(0), config.ahead,
        *prefetch.arguments(weight, programs),
        KA=n, KF=m, BN=config.rows, BK=config.columns, HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None, EVEN=rows % config.rows == 0,
        EVICT="evict_first" if config.evict else "", STAGES=config.stages, HOLD=config.hold, FILL=config.fill,
        NEXT=bool(prefetch), LATE=config.late, num_warps=config.warps, pdl=pdl,
    )  # fmt: skip
