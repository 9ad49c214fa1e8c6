"""Linear layers of several streams: the matrix units multiply every weight, read once, by the inputs of all streams.

One stream takes a single kernel for norm and product; several streams take two kernels. The first computes the norms,
one program a stream. The programs of the second stream tiles of weight rows through a pipeline of shared-memory stages,
column chunk by column chunk, along with the chunks of all inputs. The epilogue applies bias, activation and residual.
"""

import torch
from torch.nn import functional as F

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
    use_triton,
)


@jit
def _norm_rows_kernel(
    x_ptr, gamma_ptr, beta_ptr, other_gamma_ptr, other_beta_ptr, y_ptr, x_stride, eps, K: tl.constexpr,
    BK: tl.constexpr, LAYER: tl.constexpr, HAS_BETA: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (stream, which norm)."""
    stream, other = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if PDL:
        gdc_launch_dependents()
    gammas = load_chunks(tl.where(other == 0, gamma_ptr, other_gamma_ptr), K, BK)
    betas = gammas
    if HAS_BETA:
        betas = load_chunks(tl.where(other == 0, beta_ptr, other_beta_ptr), K, BK)
    if PDL:
        gdc_wait()
    xs, scale = normalise(
        load_chunks(x_ptr + stream * x_stride, K, BK), gammas, betas, eps, K, BK, LAYER, HAS_BETA
    )  # fmt: skip
    columns = tl.arange(0, BK)
    y_ptr += (other.to(tl.int64) * tl.num_programs(0) + stream) * K
    for c in tl.static_range(len(xs)):
        tl.store(y_ptr + c * BK + columns, xs[c] * scale, mask=c * BK + columns < K)


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
    acc, up, x_ptr, x_stride, streams, w_ptr, up_ptr, r, rows, w_stride, first, end, K: tl.constexpr,
    BK: tl.constexpr, S: tl.constexpr, STAGES: tl.constexpr, GATED: tl.constexpr, EVEN_ROWS: tl.constexpr,
    EVICT: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Products of weight rows with all streams added to `acc`, (rows, S), over chunks `first` to `end` - 1 of columns.

    GATED: those of the up rows are added to `up`.
    """
    s = tl.arange(0, S)
    EVEN: tl.constexpr = EVEN_ROWS and K % BK == 0
    for c in tl.range(first, end, num_stages=STAGES):
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
def store_rows(
    y, up, r, b_ptr, r_ptr, y_ptr, rows, streams, r_stride, y_stride, S: tl.constexpr, ACT: tl.constexpr,
    GATED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Bias, activation and residual of one tile, and its way to memory."""
    s = tl.arange(0, S)
    if HAS_BIAS:
        y += tl.load(b_ptr + r, mask=r < rows, other=0.0).to(tl.float32)[:, None]
        if GATED:
            up += tl.load(b_ptr + rows + r, mask=r < rows, other=0.0).to(tl.float32)[:, None]
    y = activated(y, up, ACT, GATED)
    valid = (r < rows)[:, None] & (s < streams)[None, :]
    if HAS_RESIDUAL:
        y += tl.load(r_ptr + s[None, :] * r_stride + r[:, None], mask=valid, other=0.0).to(tl.float32)
    tl.store(y_ptr + s[None, :] * y_stride + r[:, None], y, mask=valid)


@jit
def multi_stream_tiles(
    start, programs,
    a_ptr, f_ptr, w_ptr, b_ptr, r_ptr, y_ptr, part_ptr, count_ptr, rows, streams, a_stride, f_stride, w_stride,
    r_stride, y_stride, ahead,
    KA: tl.constexpr, KF: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, S: tl.constexpr, ACT: tl.constexpr,
    GATED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, EVEN: tl.constexpr, EVICT: tl.constexpr,
    STAGES: tl.constexpr, KIND: tl.constexpr, SPLITS: tl.constexpr, LATE: tl.constexpr, WAIT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """What program `start` of `programs` does: jobs start, start + programs, ... A job is a tile, or a split of one.

    `rows` counts the outputs; up rows begin at `rows`.
    """
    w_up = w_ptr + rows.to(tl.int64) * w_stride
    CA: tl.constexpr = (KA + BK - 1) // BK
    CHUNKS: tl.constexpr = CA + (KF + BK - 1) // BK
    SHARE: tl.constexpr = (CHUNKS + SPLITS - 1) // SPLITS
    if PDL:
        if not LATE:
            gdc_launch_dependents()
        column = start % SPLITS * SHARE * BK
        for i in range(BN):
            row = (start // SPLITS * BN + i).to(tl.int64)
            first = (row * w_stride + column) * 2
            end = tl.where(row < rows, tl.minimum(first + ahead, (row * w_stride + KA + KF) * 2), 0)
            prefetch_l2(w_ptr, first, end, ahead)
            if GATED:
                prefetch_l2(w_up, first, end, ahead)
        if WAIT:
            gdc_wait()
    s = tl.arange(0, S)
    for job in range(start, tl.cdiv(rows, BN) * SPLITS, programs):
        tile = job // SPLITS
        low = job % SPLITS * SHARE
        high = tl.minimum(low + SHARE, CHUNKS)
        r = tile * BN + tl.arange(0, BN)
        y, up = add_products(
            tl.zeros((BN, S), tl.float32), tl.zeros((BN, S), tl.float32), a_ptr, a_stride, streams, w_ptr, w_up, r,
            rows, w_stride, low, tl.minimum(high, CA), KA, BK, S, STAGES, GATED, EVEN, EVICT, KIND,
        )  # fmt: skip
        if KF > 0:
            y, up = add_products(
                y, up, f_ptr, f_stride, streams, w_ptr + KA, w_up, r, rows, w_stride, tl.maximum(low - CA, 0),
                tl.maximum(high - CA, 0), KF, BK, S, STAGES, False, EVEN, EVICT, KIND,
            )  # fmt: skip
        if SPLITS > 1:
            place = tl.arange(0, BN)[:, None] * S + s[None, :]
            part = part_ptr + tile.to(tl.int64) * SPLITS * BN * S
            tl.store(part + job % SPLITS * BN * S + place, y)
            tl.debug_barrier()
            if tl.atomic_add(count_ptr + tile, 1, sem="acq_rel") == SPLITS - 1:
                tl.debug_barrier()
                whole = tl.zeros((BN, S), tl.float32)
                for i in tl.static_range(SPLITS):
                    whole += tl.load(part + i * BN * S + place, cache_modifier=".cg")
                store_rows(
                    whole, up, r, b_ptr, r_ptr, y_ptr, rows, streams, r_stride, y_stride, S, ACT, GATED, HAS_BIAS,
                    HAS_RESIDUAL,
                )  # fmt: skip
                tl.store(count_ptr + tile, 0)
        else:
            store_rows(
                y, up, r, b_ptr, r_ptr, y_ptr, rows, streams, r_stride, y_stride, S, ACT, GATED, HAS_BIAS,
                HAS_RESIDUAL,
            )  # fmt: skip
    if PDL and LATE:
        gdc_launch_dependents()


@jit
def _multi_stream_linear_kernel(
    a_ptr, f_ptr, w_ptr, b_ptr, r_ptr, y_ptr, part_ptr, count_ptr, rows, streams, a_stride, f_stride, w_stride,
    r_stride, y_stride, ahead,
    KA: tl.constexpr, KF: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, S: tl.constexpr, ACT: tl.constexpr,
    GATED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, EVEN: tl.constexpr, EVICT: tl.constexpr,
    STAGES: tl.constexpr, KIND: tl.constexpr, SPLITS: tl.constexpr, LATE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: see `multi_stream_tiles`."""
    multi_stream_tiles(
        tl.program_id(0), tl.num_programs(0), a_ptr, f_ptr, w_ptr, b_ptr, r_ptr, y_ptr, part_ptr, count_ptr, rows,
        streams, a_stride, f_stride, w_stride, r_stride, y_stride, ahead, KA, KF, BN, BK, S, ACT, GATED, HAS_BIAS,
        HAS_RESIDUAL, EVEN, EVICT, STAGES, KIND, SPLITS, LATE, True, PDL,
    )  # fmt: skip


class SplitWorkspace:
    """Partial results and arrival counters of products whose tiles are split, kept between calls; grows as needed.

    Parameters
    ----------
    device : torch.device
    """

    def __init__(self, device: torch.device):
        self.partials = torch.empty(0, device=device)
        self.counters = torch.zeros(0, dtype=torch.int32, device=device)

    def room(self, tiles: int, config: MultiStreamConfig) -> tuple[torch.Tensor, torch.Tensor]:
        """Room for one product of so many tiles; counters are zero before and after it."""
        size, device = tiles * config.splits * config.rows * MAX_STREAMS, self.partials.device
        if len(self.partials) < size:
            self.partials = torch.empty(size, device=device)
        if len(self.counters) < tiles:
            self.counters = torch.zeros(tiles, dtype=torch.int32, device=device)
        return self.partials, self.counters


def normalised(x, weight, bias, eps, norm) -> torch.Tensor:
    """The norm of x in plain PyTorch, in the dtype of x."""
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if norm == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    y = F.rms_norm(x, x.shape[-1:], weight, eps)
    return y if bias is None else y + bias


def refuse_early(streams: int, pdl: bool) -> None:
    """Refuse `pdl` where a library product serves the streams. Raises ValueError."""
    if pdl:
        raise ValueError(f"pdl=True with {streams} streams; accepted: at most {MAX_STREAMS}")


def norm_rows(
    x, norm_weight, norm_bias, eps, norm, dtype, pdl, other=None, out=None, implementation=None
) -> torch.Tensor:
    """One or two norms of every stream, ``(norms, streams, hidden)`` of `dtype`.

    Arguments are those of `norm_linear`, which checks them; `other` is weight and bias of the second norm.
    """
    streams, hidden = x.shape
    if out is None:
        out = torch.empty(1 if other is None else 2, streams, hidden, dtype=dtype, device=x.device)
    weights = [(norm_weight, norm_bias), (norm_weight, norm_bias) if other is None else other]
    if not use_triton(implementation, x):
        for row, (weight, bias) in zip(out, weights):
            row.copy_(normalised(x.to(torch.promote_types(weight.dtype, torch.float32)), weight, bias, eps, norm))
        return out
    parts = [w if bias is None else part for w, bias in weights for part in (w, bias)]
    launch(
        _norm_rows_kernel, (streams, len(out)), x, *parts, out, x.stride(0), eps, K=hidden, BK=1024,
        LAYER=norm == "layer", HAS_BETA=norm_bias is not None, num_warps=4, pdl=pdl,
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
    workspace: SplitWorkspace | None = None,
    pdl: bool = False,
) -> torch.Tensor:
    """out = act(weight · [a, f] + bias) + residual for all streams; arguments as in `norm_linear`, `linear_residual`.

    Parameters
    ----------
    workspace : SplitWorkspace, optional
        Of configurations with splits; default: a new one.

    Raises
    ------
    ValueError
        If there are more streams than one tile holds, the weight is not in half precision or not aligned, or gated
        rows are split.
    """
    streams, rows, gated = len(a), out.shape[1], activation == "swiglu"
    if streams > MAX_STREAMS:
        raise ValueError(f"{streams} streams; accepted by the kernel: at most {MAX_STREAMS}")
    if config is None:
        config = default_multi_stream(gated, shared_bytes(a.device))
    if gated and config.splits > 1:
        raise ValueError(f"splits={config.splits} of gated rows; accepted: 1")
    arguments, constants = product_arguments(a, weight, out, f, bias, residual, activation, config)
    tiles = -(-rows // config.rows)
    parts: tuple[torch.Tensor, torch.Tensor] = (out, out)
    if config.splits > 1:
        parts = (SplitWorkspace(a.device) if workspace is None else workspace).room(tiles, config)
    jobs = tiles * config.splits
    programs = even_programs(jobs, multiprocessors(a.device) * config.per_sm)
    launch(
        _multi_stream_linear_kernel, (programs,), *arguments[:6], *parts, *arguments[6:], **constants,
        SPLITS=config.splits, LATE=config.late, num_warps=config.warps, pdl=pdl,
    )  # fmt: skip
    return out


def product_arguments(a, weight, out, f, bias, residual, activation, config) -> tuple[list, dict]:
    """Arguments and constants of `multi_stream_tiles`, as `multi_stream_linear` takes them; parts of tiles left out."""
    n, rows, gated = a.shape[1], out.shape[1], activation == "swiglu"
    for part in (a, f):
        if part is not None:
            check_tile(config, part.shape[1], weight)
    arguments = [
        a, a if f is None else f, weight, weight if bias is None else bias, a if residual is None else residual, out,
        rows, len(a), a.stride(0), 0 if f is None else f.stride(0), weight.stride(0),
        0 if residual is None else residual.stride(0), out.stride(0), config.ahead,
    ]  # fmt: skip
    constants = {
        "KA": n, "KF": 0 if f is None else f.shape[1], "BN": config.rows, "BK": config.columns, "S": MAX_STREAMS,
        "ACT": activation == "gelu", "GATED": gated, "HAS_BIAS": bias is not None,
        "HAS_RESIDUAL": residual is not None, "EVEN": rows % config.rows == 0, "EVICT": "evict_first",
        "STAGES": config.stages, "KIND": dot_kind(weight.dtype),
    }  # fmt: skip
    return arguments, constants
