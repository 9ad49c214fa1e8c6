"""Norm and linear layer in one kernel: y = act(W · norm(x) + b), reading every weight once at the speed of memory.

A few programs a multiprocessor. Each computes the norm once, keeps the normalised input in registers, and streams rows
of the packed weight, directly or through a ring of shared-memory stages. Weights do not depend on the kernel before, so
their first rows are asked for before waiting for it. The kernel serves one stream; several share a library product,
which reads the weight once for all of them. A packed weight may hold two row ranges with norms of their own
(GPT-NeoX: QKV rows and up-projection rows); GELU applies to the second range only. Paired gate and up rows give
silu(gate) · up (SwiGLU).
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
def normalise(xs, gammas, betas, eps, K: tl.constexpr, BK: tl.constexpr, LAYER: tl.constexpr, HAS_BETA: tl.constexpr):
    """LayerNorm (or RMSNorm) of a chunked vector, in float32."""
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
    out = ()
    for c in tl.static_range(len(xs)):
        y = (xs[c].to(tl.float32) - mean) * scale * gammas[c].to(tl.float32)
        if HAS_BETA:
            y += betas[c].to(tl.float32)
        out = out + (y,)
    return out


@jit
def row_products(
    w_ptr, rows, limit, stride, xs, K: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, EVICT: tl.constexpr
):
    """Products of weight rows and a chunked vector, not yet added up along the row: (rows, BK) float32."""
    columns = tl.arange(0, BK)
    base = w_ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :]
    acc = tl.zeros((rows.shape[0], BK), tl.float32)
    for c in tl.static_range((K + BK - 1) // BK):
        if EVEN and (c + 1) * BK <= K:
            w = tl.load(base + c * BK, eviction_policy=EVICT)
        else:
            mask = (rows < limit)[:, None] & (c * BK + columns < K)[None, :]
            w = tl.load(base + c * BK, mask=mask, other=0.0, eviction_policy=EVICT)
        acc += w.to(tl.float32) * xs[c][None, :]
    return acc


@jit
def _norm_linear_kernel(
    x_ptr, w_ptr, b_ptr, gamma_ptr, beta_ptr, y_ptr, rows, boundary, first_programs, gamma_stride, eps, w_stride, ahead,
    next_a, next_a_end, next_a_share, next_b, next_b_end, next_b_share,
    K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, LAYER: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_BETA: tl.constexpr, EVEN: tl.constexpr, EVICT: tl.constexpr, STAGES: tl.constexpr,
    NEXT: tl.constexpr, LATE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: its share of the tiles of one row range. `rows` counts outputs; gate rows are 0.., up rows rows.."""
    pid = tl.program_id(0)
    if PDL and not LATE:
        gdc_launch_dependents()
    second = pid >= first_programs
    start = tl.where(second, boundary // BN + pid - first_programs, pid)
    end = tl.where(second, tl.cdiv(rows, BN), boundary // BN)
    step = tl.where(second, tl.num_programs(0) - first_programs, first_programs)
    if PDL:
        tile_bytes = BN * w_stride * 2
        for i in range(ahead):
            tile = start + i * step
            first = tile.to(tl.int64) * tile_bytes
            end_byte = tl.where(tile < end, rows.to(tl.int64) * w_stride * 2, 0)
            prefetch_l2(w_ptr, first, end_byte, tile_bytes)
            if GATED:
                prefetch_l2(w_ptr + rows.to(tl.int64) * w_stride, first, end_byte, tile_bytes)
    which = tl.where(second, gamma_stride, 0)
    gammas = load_chunks(gamma_ptr + which, K, BK)
    betas = gammas
    if HAS_BETA:
        betas = load_chunks(beta_ptr + which, K, BK)
    if PDL:
        gdc_wait()
    xs = normalise(load_chunks(x_ptr, K, BK), gammas, betas, eps, K, BK, LAYER, HAS_BETA)
    for tile in tl.range(start, end, step, num_stages=STAGES):
        r = tile * BN + tl.arange(0, BN)
        y = tl.zeros((BN,), tl.float32)
        if HAS_BIAS:
            y = tl.load(b_ptr + r, mask=r < rows, other=0.0).to(tl.float32)
        y += tl.sum(row_products(w_ptr, r, rows, w_stride, xs, K, BK, EVEN, EVICT), 1)
        if GATED:
            up = tl.zeros((BN,), tl.float32)
            if HAS_BIAS:
                up = tl.load(b_ptr + r + rows, mask=r < rows, other=0.0).to(tl.float32)
            up += tl.sum(row_products(w_ptr, r + rows, 2 * rows, w_stride, xs, K, BK, EVEN, EVICT), 1)
            y = y / (1.0 + tl.exp(-y)) * up
        if ACT:
            y = tl.where(second, 0.5 * y * (1.0 + tl.math.erf(y * 0.7071067811865476)), y)
        tl.store(y_ptr + r, y, mask=r < rows)
    if PDL and LATE:
        gdc_launch_dependents()
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
    boundary: int = 0,
    activation: str = "none",
    out: torch.Tensor | None = None,
    config: LinearConfig | None = None,
    prefetch: Prefetch = NO_PREFETCH,
    pdl: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """y = act(weight · norm(x) + bias), for one row range or two.

    One stream runs the kernel. Several run PyTorch's norm, matmul and activation instead (`config`, `prefetch` and
    `pdl` mean nothing then), so that the weight is read once for all of them.

    Parameters
    ----------
    x : Tensor, (streams, hidden)
        Float16, bfloat16 or float32 (a float32 residual stream beside half-precision weights is fine).
    weight : Tensor, (rows, hidden)
        Model dtype; rows may be strided. With "swiglu" the first half are gate rows, the second half up rows.
    norm_weight, norm_bias : Tensor, (ranges, hidden)
        ranges is 1 or 2: with 2, rows before `boundary` use the first norm, rows from it on the second.
    bias : Tensor, (rows,), optional
    eps : float
        Of the norm.
    norm : {"layer", "rms"}
    boundary : int, default=0
        First row of the second range. The activation applies to rows from here on.
    activation : {"none", "gelu", "swiglu"}
        "gelu" is the exact one (erf). "swiglu" halves the output and needs boundary=0.
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
    _check(x, weight, norm_weight, norm_bias, bias, norm, boundary, activation)
    streams, hidden = x.shape
    outputs = len(weight) // 2 if activation == "swiglu" else len(weight)
    if out is None:
        out = torch.empty(streams, outputs, dtype=weight.dtype, device=x.device)
    check_tensor("out", out, (streams, outputs), dtypes=FLOAT_DTYPES, device=x.device, contiguous=False)
    kind = (eps, norm, boundary, activation)
    if not use_triton(backend, x):
        return out.copy_(norm_linear_twin(x, weight, norm_weight, norm_bias, bias, *kind))
    if streams > 1:
        return norm_linear_library(x, weight, norm_weight, norm_bias, bias, *kind, out)
    if config is None:
        config = default_norm_linear(hidden, boundary > 0, activation == "swiglu", shared_bytes(x.device))
    _launch(x, weight, norm_weight, norm_bias, bias, *kind, out, config, prefetch, pdl)
    return out


def _check(x, weight, norm_weight, norm_bias, bias, norm, boundary, activation) -> None:
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r} is unknown; accepted: {', '.join(NORMS)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is unknown; accepted: {', '.join(ACTIVATIONS)}")
    hidden, rows = x.shape[1], len(weight)
    check_tensor("x", x, (None, None), dtypes=FLOAT_DTYPES, device=x.device, contiguous=False)
    check_tensor("weight", weight, (None, hidden), dtypes=FLOAT_DTYPES, device=x.device, contiguous=False)
    ranges = norm_weight.shape[0]
    check_tensor("norm_weight", norm_weight, (ranges, hidden), dtypes=FLOAT_DTYPES, device=x.device)
    if ranges not in (1, 2):
        raise ValueError(f"norm_weight has {ranges} rows; accepted: 1 or 2")
    if norm_bias is not None:
        check_tensor("norm_bias", norm_bias, (ranges, hidden), dtypes=FLOAT_DTYPES, device=x.device)
    if bias is not None:
        check_tensor("bias", bias, (rows,), dtypes=FLOAT_DTYPES, device=x.device)
    if not 0 <= boundary <= rows:
        raise ValueError(f"boundary={boundary}: accepted: 0 to {rows}, the rows of the weight")
    if activation == "swiglu" and (rows % 2 or boundary):
        raise ValueError(
            f"swiglu with {rows} rows and boundary={boundary}; accepted: an even number of rows, boundary 0"
        )


def norm_linear_twin(x, weight, norm_weight, norm_bias, bias, eps, norm, boundary, activation) -> torch.Tensor:
    """The same in plain PyTorch, float32 (float64 for float64 weights) with the result left in that precision."""
    work = torch.float64 if weight.dtype == torch.float64 else torch.float32
    x = x.to(work)
    if norm == "layer":
        x = x - x.mean(-1, keepdim=True)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    parts = []
    for index, (first, last) in enumerate(((0, boundary), (boundary, weight.shape[0]))):
        which = min(index, norm_weight.shape[0] - 1)
        normed = x * norm_weight[which].to(work)
        if norm_bias is not None:
            normed = normed + norm_bias[which].to(work)
        parts.append(normed @ weight[first:last].to(work).T)
    if bias is not None:
        parts = [part + piece.to(work) for part, piece in zip(parts, bias.split([boundary, len(bias) - boundary]))]
    if activation == "gelu":
        parts[1] = F.gelu(parts[1])
    y = torch.cat(parts, dim=-1)
    if activation == "swiglu":
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate) * up
    return y


def norm_linear_library(x, weight, norm_weight, norm_bias, bias, eps, norm, boundary, activation, out) -> torch.Tensor:
    """The same for several streams: one library product for each row range, norm and activation in the model's dtype.

    Sums inside the norm are formed in float32, as PyTorch does.
    """
    bias = None if bias is None else bias.to(weight.dtype)
    for index, (first, last) in enumerate(((0, boundary), (boundary, len(weight)))):
        if first == last:
            continue
        which = min(index, len(norm_weight) - 1)
        normed = _library_norm(x, norm_weight[which], None if norm_bias is None else norm_bias[which], eps, norm)
        part = F.linear(normed.to(weight.dtype), weight[first:last], None if bias is None else bias[first:last])
        if activation == "gelu" and index:
            part = F.gelu(part)
        if activation == "swiglu":
            gate, up = part.chunk(2, -1)
            part = F.silu(gate) * up
        out[:, first : first + part.shape[1]] = part
    return out


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


def divide_programs(first_tiles: int, second_tiles: int, programs: int) -> tuple[int, int]:
    """How many programs serve the tiles of each row range, so that the longest list of tiles is shortest."""
    programs = max(1, min(programs, first_tiles + second_tiles))
    if not first_tiles or not second_tiles:
        return (programs, 0) if first_tiles else (0, programs)
    programs = max(programs, 2)
    candidates = range(1, programs)
    best = min(candidates, key=lambda p: max(-(-first_tiles // p), -(-second_tiles // (programs - p))))
    return best, programs - best


def _launch(x, weight, norm_weight, norm_bias, bias, eps, norm, boundary, activation, out, config, prefetch, pdl):
    hidden = x.shape[1]
    check_tile(config, hidden, weight)
    rows, tile = out.shape[1], config.rows
    while boundary % tile:
        tile //= 2
    programs = multiprocessors(x.device) * config.per_sm
    split = divide_programs(boundary // tile, -(-(rows - boundary) // tile), programs)
    launch(
        _norm_linear_kernel, (sum(split),),
        x, weight, bias if bias is not None else weight, norm_weight,
        norm_bias if norm_bias is not None else norm_weight, out, rows, boundary, split[0],
        hidden if len(norm_weight) == 2 else 0, eps, weight.stride(0), config.ahead,
        *prefetch.arguments(weight, sum(split)),
        K=hidden, BN=tile, BK=config.columns, LAYER=norm == "layer", ACT=activation == "gelu",
        GATED=activation == "swiglu", HAS_BIAS=bias is not None, HAS_BETA=norm_bias is not None,
        EVEN=rows % tile == 0, EVICT="evict_first" if config.evict else "", STAGES=config.stages,
        NEXT=bool(prefetch), LATE=config.late, num_warps=config.warps, pdl=pdl,
    )  # fmt: skip
