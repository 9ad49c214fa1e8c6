"""Norm and linear layer in one kernel: y = act(W · norm(x) + b), reading every weight once at the speed of memory.

A few programs a multiprocessor. Each computes the norm once, keeps the normalised input in registers, and streams rows
of the packed weight, directly or through a pipeline of shared-memory stages. Weights do not depend on the previous
kernel, so each program prefetches its first rows and then waits for that kernel. The kernel serves one stream; several
streams take `multi_stream_linear`. Paired gate and up rows give silu(gate) · up (SwiGLU).
"""

import torch
import torch.nn.functional as F

from sinkstream.kernels.chunks import (
    check_weight,
    chunk_products,
    load_chunks,
    load_row_chunks,
    no_chunks,
    normalise,
    row_products,
    row_terms,
    store_tile,
)
from sinkstream.kernels.config import MAX_STREAMS, LinearConfig, MultiStreamConfig, default_norm_linear
from sinkstream.kernels.multi_stream_linear import multi_stream_linear, norm_rows, refuse_early
from sinkstream.kernels.runtime import (
    FLOAT_DTYPES,
    NO_PREFETCH,
    Prefetch,
    check_tensor,
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

ACTIVATIONS = ("none", "gelu", "swiglu")
NORMS = ("layer", "rms")


@jit
def prefetch_tiles(
    w_ptr, w_up, start, end, step, skipped: tl.constexpr, ahead, rows, w_stride, BN: tl.constexpr, GATED: tl.constexpr
):
    """Prefetch to L2 the weights of `ahead` tiles of a program, after the first `skipped`; GATED: up rows as well."""
    tile_bytes = BN * w_stride * 2
    for i in range(ahead):
        tile = start + (i + skipped) * step
        first = tile.to(tl.int64) * tile_bytes
        end_byte = tl.where(tile < end, rows.to(tl.int64) * w_stride * 2, 0)
        prefetch_l2(w_ptr, first, end_byte, tile_bytes)
        if GATED:
            prefetch_l2(w_up, first, end_byte, tile_bytes)


@jit
def tile_outputs(
    w_ptr, b_ptr, r, rows, w_stride, xs, scale, K: tl.constexpr, BK: tl.constexpr, HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    """Products of weight rows `r` in memory with the normalised input, and their bias: (rows,) float32."""
    y = row_terms(b_ptr, r, rows, HAS_BIAS)
    return y + tl.sum(row_products(w_ptr, r, rows, w_stride, xs, K, BK, EVEN, EVICT), 1) * scale


@jit
def norm_linear_tiles(
    start, end, step, x_ptr, w_ptr, b_ptr, gamma_ptr, beta_ptr, y_ptr, rows, eps, w_stride, ahead,
    K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, LAYER: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_BETA: tl.constexpr, EVEN: tl.constexpr, EVICT: tl.constexpr, STAGES: tl.constexpr,
    HOLD: tl.constexpr, FILL: tl.constexpr, LATE: tl.constexpr, PDL: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """Tiles start, start + step, ... of y. `rows` counts outputs; gate rows are 0.., up rows rows..

    WAIT: x comes from the previous kernel. HOLD: the first tile's weights are in flight to registers during the wait.
    FILL: the weights of the first STAGES - 1 tiles are in flight to shared memory during the wait, since the prologue
    of the pipeline comes before the first turn of the loop, and the wait stands in that turn.
    """
    if PDL and not LATE:
        gdc_launch_dependents()
    w_up, b_up = w_ptr + rows.to(tl.int64) * w_stride, b_ptr + rows
    if PDL:
        skipped: tl.constexpr = HOLD + FILL * (STAGES - 1)  # tiles in flight to registers or shared memory
        prefetch_tiles(w_ptr, w_up, start, end, step, skipped, ahead, rows, w_stride, BN, GATED)
    if HOLD:
        r = start * BN + tl.arange(0, BN)
        first_rows = load_row_chunks(w_ptr, r, rows, w_stride, K, BK, EVEN, EVICT)
        bias = row_terms(b_ptr, r, rows, HAS_BIAS)
        if GATED:
            first_up = load_row_chunks(w_up, r, rows, w_stride, K, BK, EVEN, EVICT)
            bias_up = row_terms(b_up, r, rows, HAS_BIAS)
    gammas = load_chunks(gamma_ptr, K, BK)
    betas = gammas
    if HAS_BETA:
        betas = load_chunks(beta_ptr, K, BK)
    if FILL:
        xs, scale = no_chunks(K, BK), 1.0
    else:
        if PDL and WAIT:
            gdc_wait()
        xs, scale = normalise(load_chunks(x_ptr, K, BK), gammas, betas, eps, K, BK, LAYER, HAS_BETA)
    if HOLD:
        y = bias + tl.sum(chunk_products(first_rows, xs), 1) * scale
        up = y
        if GATED:
            up = bias_up + tl.sum(chunk_products(first_up, xs), 1) * scale
        store_tile(y_ptr, r, y, up, rows, ACT, GATED)
        start += step
    for tile in tl.range(start, end, step, num_stages=STAGES):
        if FILL:  # noqa: SIM102 - known when this is compiled, unlike the next condition
            if tile == start:
                if PDL and WAIT:
                    gdc_wait()
                xs, scale = normalise(load_chunks(x_ptr, K, BK), gammas, betas, eps, K, BK, LAYER, HAS_BETA)
        r = tile * BN + tl.arange(0, BN)
        y = tile_outputs(w_ptr, b_ptr, r, rows, w_stride, xs, scale, K, BK, HAS_BIAS, EVEN, EVICT)
        up = y
        if GATED:
            up = tile_outputs(w_up, b_up, r, rows, w_stride, xs, scale, K, BK, HAS_BIAS, EVEN, EVICT)
        store_tile(y_ptr, r, y, up, rows, ACT, GATED)
    if PDL and LATE:
        gdc_launch_dependents()


@jit
def _norm_linear_kernel(
    x_ptr, w_ptr, b_ptr, gamma_ptr, beta_ptr, y_ptr, rows, eps, w_stride, ahead,
    next_a, next_a_end, next_a_share, next_b, next_b_end, next_b_share,
    K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, LAYER: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_BETA: tl.constexpr, EVEN: tl.constexpr, EVICT: tl.constexpr, STAGES: tl.constexpr,
    HOLD: tl.constexpr, FILL: tl.constexpr, NEXT: tl.constexpr, LATE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: every num_programs-th tile."""
    pid = tl.program_id(0)
    norm_linear_tiles(
        pid, tl.cdiv(rows, BN), tl.num_programs(0), x_ptr, w_ptr, b_ptr, gamma_ptr, beta_ptr, y_ptr, rows, eps,
        w_stride, ahead, K, BN, BK, LAYER, ACT, GATED, HAS_BIAS, HAS_BETA, EVEN, EVICT, STAGES, HOLD, FILL, LATE, PDL,
        True,
    )  # fmt: skip
    if NEXT:
        prefetch_next(pid, next_a, next_a_end, next_a_share, next_b, next_b_end, next_b_share)


def norm_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    norm: str = "layer",
    activation: str = "none",
    out: torch.Tensor | None = None,
    config: LinearConfig | MultiStreamConfig | None = None,
    prefetch: Prefetch = NO_PREFETCH,
    pdl: bool = False,
    implementation: str | None = None,
) -> torch.Tensor:
    """y = act(weight · norm(x) + bias).

    One stream runs the kernel. Up to 16 run a kernel of the norm and one of the product, which reads the weight once
    for all of them; more run PyTorch's norm, matmul and activation, without `prefetch`.

    Parameters
    ----------
    x : Tensor, (streams, hidden)
        Float16, bfloat16 or float32 (a float32 residual stream beside half-precision weights is fine).
    weight : Tensor, (rows, hidden)
        Model dtype; rows may be strided. With "swiglu" the first half are gate rows, the second half up rows.
    norm_weight, norm_bias : Tensor, (hidden,)
    bias : Tensor, (rows,), optional
    eps : float
        Of the norm.
    norm : {"layer", "rms"}
    activation : {"none", "gelu", "swiglu"}
        "gelu" is the exact one (erf). "swiglu" halves the output.
    out : Tensor, (streams, outputs), optional
        Written in place; its dtype is that of the result (default: the weight's).
    config : LinearConfig or MultiStreamConfig, optional
        The latter for several streams; one of the other kind is not looked at. Default: that of
        `sinkstream.kernels.config`.
    prefetch : Prefetch
        Buffers that the next kernel reads first.
    pdl : bool
        Programmatic dependent launch: the kernel may start before the previous one has ended, and waits for that one
        before it reads its result. Refused for more streams than the kernels take.
    implementation : {"auto", "triton", "torch"}, optional

    Returns
    -------
    Tensor, (streams, outputs)

    Raises
    ------
    ValueError
        Naming the argument that the op cannot serve and what is accepted.
    """
    outputs = check_inputs(x, weight, norm_weight, norm_bias, bias, norm, activation)
    streams, hidden = x.shape
    if out is None:
        out = torch.empty(streams, outputs, dtype=weight.dtype, device=x.device)
    check_tensor("out", out, (streams, outputs), dtypes=FLOAT_DTYPES, device=x.device, contiguous=False)
    kind = (eps, norm, activation)
    if not use_triton(implementation, x):
        return out.copy_(norm_linear_twin(x, weight, norm_weight, norm_bias, bias, *kind))
    if streams > MAX_STREAMS:
        refuse_early(streams, pdl)
        return norm_linear_library(x, weight, norm_weight, norm_bias, bias, *kind, out)
    if streams > 1:
        normed = norm_rows(x, norm_weight, norm_bias, eps, norm, weight.dtype, pdl)
        own = config if isinstance(config, MultiStreamConfig) else None
        return multi_stream_linear(
            normed, weight, out, bias=bias, activation=activation, config=own, prefetch=prefetch, pdl=pdl
        )
    if not isinstance(config, LinearConfig):
        config = default_norm_linear(hidden, activation == "swiglu", shared_bytes(x.device))
    _launch(x, weight, norm_weight, norm_bias, bias, *kind, out, config, prefetch, pdl)
    return out


def check_inputs(x, weight, norm_weight, norm_bias, bias, norm, activation) -> int:
    """Check the inputs of `norm_linear`; returns how many values a stream's result has. Raises ValueError."""
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r} is unknown; accepted: {', '.join(NORMS)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is unknown; accepted: {', '.join(ACTIVATIONS)}")
    hidden, rows = x.shape[-1], weight.shape[0]
    check_tensor("x", x, (None, None), dtypes=FLOAT_DTYPES, device=x.device, contiguous=False)
    check_tensor("weight", weight, (None, hidden), dtypes=FLOAT_DTYPES, device=x.device, contiguous=False)
    check_tensor("norm_weight", norm_weight, (hidden,), dtypes=FLOAT_DTYPES, device=x.device)
    if norm_bias is not None:
        check_tensor("norm_bias", norm_bias, (hidden,), dtypes=FLOAT_DTYPES, device=x.device)
    if bias is not None:
        check_tensor("bias", bias, (rows,), dtypes=FLOAT_DTYPES, device=x.device)
    gated = activation == "swiglu"
    if gated and rows % 2:
        raise ValueError(f"swiglu with {rows} rows; accepted: an even number, gate rows and up rows")
    return rows // 2 if gated else rows


def norm_linear_twin(x, weight, norm_weight, norm_bias, bias, eps, norm, activation) -> torch.Tensor:
    """The twin of the kernel: plain PyTorch in float32 (float64 for float64 weights), result in that precision."""
    work = torch.float64 if weight.dtype == torch.float64 else torch.float32
    x = x.to(work)
    if norm == "layer":
        x = x - x.mean(-1, keepdim=True)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * norm_weight.to(work)
    if norm_bias is not None:
        x = x + norm_bias.to(work)
    y = x @ weight.to(work).T
    return activate(y if bias is None else y + bias.to(work), activation)


def norm_linear_library(x, weight, norm_weight, norm_bias, bias, eps, norm, activation, out) -> torch.Tensor:
    """The op for more streams than the kernels take: PyTorch's norm, matmul and activation in the model's dtype.

    Sums inside the norm are formed in float32, as PyTorch does.
    """
    normed = _library_norm(x, norm_weight, norm_bias, eps, norm).to(weight.dtype)
    return out.copy_(activate(F.linear(normed, weight, None if bias is None else bias.to(weight.dtype)), activation))


def activate(y: torch.Tensor, activation: str) -> torch.Tensor:
    """The activation of all outputs; "swiglu" joins the halves."""
    if activation == "gelu":
        return F.gelu(y)
    if activation == "swiglu":
        gate, up = y.chunk(2, dim=-1)
        return F.silu(gate) * up
    return y


def _library_norm(x, gamma, beta, eps, norm) -> torch.Tensor:
    """PyTorch's norm, in the dtype of `x`."""
    gamma, beta = gamma.to(x.dtype), None if beta is None else beta.to(x.dtype)
    if norm == "layer":
        return F.layer_norm(x, gamma.shape, gamma, beta, eps)
    y = F.rms_norm(x, gamma.shape, gamma, eps)
    return y if beta is None else y + beta


def _launch(x, weight, norm_weight, norm_bias, bias, eps, norm, activation, out, config, prefetch, pdl):
    hidden, rows = x.shape[1], out.shape[1]
    check_weight(weight, hidden)
    programs = min(-(-rows // config.rows), multiprocessors(x.device) * config.per_sm)
    launch(
        _norm_linear_kernel, (programs,),
        x, weight, bias if bias is not None else weight, norm_weight,
        norm_bias if norm_bias is not None else norm_weight, out, rows, eps, weight.stride(0), config.ahead,
        *prefetch.arguments(weight, programs),
        K=hidden, BN=config.rows, BK=config.columns, LAYER=norm == "layer", ACT=activation == "gelu",
        GATED=activation == "swiglu", HAS_BIAS=bias is not None, HAS_BETA=norm_bias is not None,
        EVEN=rows % config.rows == 0, EVICT="evict_first" if config.evict else "", STAGES=config.stages,
        HOLD=config.hold, FILL=config.fill, NEXT=bool(prefetch), LATE=config.late, num_warps=config.warps, pdl=pdl,
    )  # fmt: skip
