"""Norm and linear layer in one kernel: y = act(W · norm(x) + b), reading every weight once at the speed of memory.

A few programs a multiprocessor. Each computes the norm once, keeps the normalised input in registers, and streams rows
of the packed weight, directly or through a ring of shared-memory stages. Weights do not depend on the kernel before, so
their first rows are asked for before waiting for it. The kernel serves one stream; several share a library product,
which reads the weight once for all of them. Paired gate and up rows give silu(gate) · up (SwiGLU).
"""

# ruff: noqa: RUF005 - Triton compiles sums of tuples, not starred ones
import torch
import torch.nn.functional as F

from sinkstream.engine.ops.config import LinearConfig, default_norm_linear
from sinkstream.engine.ops.runtime import (
    FLOAT_DTYPES,
    HALF_DTYPES,
    NO_PREFETCH,
    Prefetch,
    check_tensor,
    gdc_launch_dependents,
    gdc_wait,
    jit,
    launch,
    multiprocessors,
    prefetch_l2,
    shared_bytes,
    tl,
    use_triton,
)

ACTIVATIONS = ("none", "gelu", "swiglu")
NORMS = ("layer", "rms")


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
    """LayerNorm (or RMSNorm) of a chunked vector, in float32: chunks, and what their products are still multiplied by.

    The scale of an RMSNorm without an offset is left to the end, so that products need not wait for it.
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
def held_rows(w_ptr, rows, limit, stride, K: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, EVICT: tl.constexpr):
    """All chunks of weight rows, in registers."""
    chunks = ()
    for c in tl.static_range((K + BK - 1) // BK):
        chunks = chunks + (load_rows(w_ptr, rows, limit, stride, c, K, BK, EVEN, EVICT),)
    return chunks


@jit
def held_products(held, xs):
    """Products of held rows and a chunked vector, not yet added up along the row: (rows, BK) float32."""
    acc = held[0].to(tl.float32) * xs[0][None, :]
    for c in tl.static_range(1, len(held)):
        acc += held[c].to(tl.float32) * xs[c][None, :]
    return acc


@jit
def row_products(
    w_ptr, rows, limit, stride, xs, K: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, EVICT: tl.constexpr
):
    """The same of rows that are still in memory, chunk by chunk."""
    acc = tl.zeros((rows.shape[0], BK), tl.float32)
    for c in tl.static_range((K + BK - 1) // BK):
        acc += load_rows(w_ptr, rows, limit, stride, c, K, BK, EVEN, EVICT).to(tl.float32) * xs[c][None, :]
    return acc


@jit
def row_terms(term_ptr, r, rows, GIVEN: tl.constexpr, IN_PLACE: tl.constexpr = False):
    """What is added to the products of rows `r` (a bias, a residual), float32; zeros where none is given.

    IN_PLACE: read where the program says so, never earlier in a pipeline.
    """
    if GIVEN:
        terms = tl.load(term_ptr + r, mask=r < rows, other=0.0, volatile=IN_PLACE).to(tl.float32)
    else:
        terms = tl.zeros((r.shape[0],), tl.float32)
    return terms


@jit
def store_tile(y_ptr, r, y, up, rows, ACT: tl.constexpr, GATED: tl.constexpr):
    """Activation and store of one tile of outputs."""
    if GATED:
        y = y / (1.0 + tl.exp(-y)) * up
    if ACT:
        y = 0.5 * y * (1.0 + tl.math.erf(y * 0.7071067811865476))
    tl.store(y_ptr + r, y, mask=r < rows)


@jit
def serve_tiles(
    start, end, step, x_ptr, w_ptr, b_ptr, gamma_ptr, beta_ptr, y_ptr, rows, eps, w_stride, ahead,
    K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, LAYER: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_BETA: tl.constexpr, EVEN: tl.constexpr, EVICT: tl.constexpr, STAGES: tl.constexpr,
    HOLD: tl.constexpr, FILL: tl.constexpr, LATE: tl.constexpr, PDL: tl.constexpr, WAIT: tl.constexpr,
):  # fmt: skip
    """Tiles start, start + step, ... of y. `rows` counts outputs; gate rows are 0.., up rows rows..

    WAIT: x comes from the kernel before. HOLD: the first tile's weights are on their way to registers while it waits.
    FILL: those of the first STAGES - 1 tiles on their way to the ring, since the pipeline begins before its first turn.
    """
    if PDL and not LATE:
        gdc_launch_dependents()
    w_up, b_up = w_ptr + rows.to(tl.int64) * w_stride, b_ptr + rows
    if PDL:
        tile_bytes = BN * w_stride * 2
        for i in range(ahead):
            tile = start + (i + HOLD + FILL * (STAGES - 1)) * step
            first = tile.to(tl.int64) * tile_bytes
            end_byte = tl.where(tile < end, rows.to(tl.int64) * w_stride * 2, 0)
            prefetch_l2(w_ptr, first, end_byte, tile_bytes)
            if GATED:
                prefetch_l2(w_up, first, end_byte, tile_bytes)
    if HOLD:
        r = start * BN + tl.arange(0, BN)
        held = held_rows(w_ptr, r, rows, w_stride, K, BK, EVEN, EVICT)
        bias = row_terms(b_ptr, r, rows, HAS_BIAS)
        if GATED:
            held_up = held_rows(w_up, r, rows, w_stride, K, BK, EVEN, EVICT)
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
        y = bias + tl.sum(held_products(held, xs), 1) * scale
        up = y
        if GATED:
            up = bias_up + tl.sum(held_products(held_up, xs), 1) * scale
        store_tile(y_ptr, r, y, up, rows, ACT, GATED)
        start += step
    for tile in tl.range(start, end, step, num_stages=STAGES):
        if FILL:  # noqa: SIM102 - known when this is compiled, unlike the next condition
            if tile == start:
                if PDL and WAIT:
                    gdc_wait()
                xs, scale = normalise(load_chunks(x_ptr, K, BK), gammas, betas, eps, K, BK, LAYER, HAS_BETA)
        r = tile * BN + tl.arange(0, BN)
        y = row_terms(b_ptr, r, rows, HAS_BIAS)
        y += tl.sum(row_products(w_ptr, r, rows, w_stride, xs, K, BK, EVEN, EVICT), 1) * scale
        up = y
        if GATED:
            up = row_terms(b_up, r, rows, HAS_BIAS)
            up += tl.sum(row_products(w_up, r, rows, w_stride, xs, K, BK, EVEN, EVICT), 1) * scale
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
    serve_tiles(
        pid, tl.cdiv(rows, BN), tl.num_programs(0), x_ptr, w_ptr, b_ptr, gamma_ptr, beta_ptr, y_ptr, rows, eps,
        w_stride, ahead, K, BN, BK, LAYER, ACT, GATED, HAS_BIAS, HAS_BETA, EVEN, EVICT, STAGES, HOLD, FILL, LATE, PDL,
        True,
    )  # fmt: skip
    if NEXT:
        prefetch_l2(next_a, pid.to(tl.int64) * next_a_share, next_a_end, next_a_share)
        prefetch_l2(next_b, pid.to(tl.int64) * next_b_share, next_b_end, next_b_share)


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
    config: LinearConfig | None = None,
    prefetch: Prefetch = NO_PREFETCH,
    pdl: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """y = act(weight · norm(x) + bias).

    One stream runs the kernel. Several run PyTorch's norm, matmul and activation instead (`config`, `prefetch` and
    `pdl` mean nothing then), so that the weight is read once for all of them.

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
    config : LinearConfig, optional
        Default: the measured one of `sinkstream.engine.ops.config`.
    prefetch : Prefetch
        Buffers that the next kernel reads first.
    pdl : bool
        Launch before the kernel before has ended. Every kernel launched so waits for it before reading its result.
    backend : {"auto", "triton", "torch"}, optional

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
    if not use_triton(backend, x):
        return out.copy_(norm_linear_twin(x, weight, norm_weight, norm_bias, bias, *kind))
    if streams > 1:
        return norm_linear_library(x, weight, norm_weight, norm_bias, bias, *kind, out)
    if config is None:
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
    """The same in plain PyTorch, float32 (float64 for float64 weights) with the result left in that precision."""
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
    """The same for several streams: one library product, norm and activation in the model's dtype.

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


def check_tile(config: LinearConfig, hidden: int, weight: torch.Tensor) -> None:
    """Check what the kernels need of a weight: half precision and rows that 16-byte loads can read."""
    if weight.dtype not in HALF_DTYPES:
        raise ValueError(f"weight has dtype {weight.dtype}; accepted by the kernel: {', '.join(map(str, HALF_DTYPES))}")
    if hidden % 8 or weight.stride(0) % 8 or weight.data_ptr() % 16:
        raise ValueError(
            f"weight rows of {hidden} values with stride {weight.stride(0)} at {weight.data_ptr() % 16} bytes past a"
            " multiple of 16; accepted: multiples of 8 values, 16-byte aligned"
        )
    for name in ("rows", "columns", "warps"):
        value = getattr(config, name)
        if value < 1 or value & (value - 1):
            raise ValueError(f"{name}={value} in the configuration; accepted: a power of two")


def _launch(x, weight, norm_weight, norm_bias, bias, eps, norm, activation, out, config, prefetch, pdl):
    hidden, rows = x.shape[1], out.shape[1]
    check_tile(config, hidden, weight)
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
