"""Decode attention fused horizontally with an independent norm and linear layer: one kernel, programs of two kinds.

In a GPT-NeoX layer with parallel residual the up-projection depends on the residual only. Attention alone leaves the
memory idle while it rotates, waits for its last program and combines; programs that stream the rows of the
up-projection hide that time. The rows do not depend on the previous kernel and need not wait for it.
"""

from dataclasses import replace

import torch
from torch.nn import functional as F

from sinkstream.kernels.attention_decode import Workspace, attend_split, attention_decode, launch_arguments
from sinkstream.kernels.attention_decode import check_inputs as check_attention
from sinkstream.kernels.chunks import check_tile
from sinkstream.kernels.config import (
    BESIDE,
    MAX_STREAMS,
    AttentionLinearConfig,
    AttentionRowsConfig,
    default_attention_linear,
    several_attention,
)
from sinkstream.kernels.linear_residual import linear_residual_twin
from sinkstream.kernels.multi_stream_linear import multi_stream_tiles, product_arguments
from sinkstream.kernels.norm_linear import check_inputs as check_linear
from sinkstream.kernels.norm_linear import norm_linear, norm_linear_tiles
from sinkstream.kernels.runtime import (
    FLOAT_DTYPES,
    NO_PREFETCH,
    Prefetch,
    check_tensor,
    dot_kind,
    even_programs,
    jit,
    launch,
    multiprocessors,
    prefetch_l2,
    shared_bytes,
    tl,
    use_triton,
)


@jit
def _attention_linear_kernel(
    splits, kv_heads,
    qkv_ptr, key_ptr, value_ptr, scalar_ptr, rope_ptr, qn_ptr, kn_ptr, part_ptr, count_ptr, out_ptr,
    qkv_stride, out_stride, slots, pinned_slots, ring, per, ring_programs, scale, head_eps,
    x_ptr, w_ptr, b_ptr, gamma_ptr, beta_ptr, y_ptr, rows, eps, w_stride, ahead,
    next_a, next_a_end, next_a_share, next_b, next_b_end, next_b_share,
    G: tl.constexpr, D: tl.constexpr, C: tl.constexpr, RD: tl.constexpr, Q_STEP: tl.constexpr, K_BASE: tl.constexpr,
    V_BASE: tl.constexpr, KV_STEP: tl.constexpr, NORM: tl.constexpr, BT: tl.constexpr, TILES: tl.constexpr,
    STAGES: tl.constexpr, DOT: tl.constexpr, SP: tl.constexpr, SIZE: tl.constexpr, GC: tl.constexpr,
    KIND: tl.constexpr,
    K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, LAYER: tl.constexpr, ACT: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_BETA: tl.constexpr, EVEN: tl.constexpr, EVICT: tl.constexpr,
    ROW_STAGES: tl.constexpr, HOLD: tl.constexpr, FILL: tl.constexpr, LATE: tl.constexpr, ROWS_LATE: tl.constexpr,
    WAIT: tl.constexpr, NEXT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The first splits * kv_heads programs attend, the others serve rows of the linear layer."""
    pid = tl.program_id(0)
    attending = splits * kv_heads
    if pid < attending:
        attend_split(
            pid % splits, splits, pid // splits, kv_heads, 0,
            qkv_ptr, key_ptr, value_ptr, scalar_ptr, rope_ptr, qn_ptr, kn_ptr, part_ptr, count_ptr, out_ptr,
            qkv_stride, out_stride, slots, pinned_slots, ring, per, ring_programs, scale, head_eps,
            next_a, next_a_end, next_a_share, next_b, next_b_end, next_b_share,
            G, D, C, RD, Q_STEP, K_BASE, V_BASE, KV_STEP, NORM, BT, TILES, STAGES, DOT, SP, SIZE, GC, KIND, False,
            LATE, PDL,
        )  # fmt: skip
    else:
        norm_linear_tiles(
            pid - attending, tl.cdiv(rows, BN), tl.num_programs(0) - attending,
            x_ptr, w_ptr, b_ptr, gamma_ptr, beta_ptr, y_ptr, rows, eps, w_stride, ahead,
            K, BN, BK, LAYER, ACT, False, HAS_BIAS, HAS_BETA, EVEN, EVICT, ROW_STAGES, HOLD, FILL, ROWS_LATE, PDL, WAIT,
        )  # fmt: skip
        if NEXT:
            share = (pid - attending).to(tl.int64)
            prefetch_l2(next_a, share * next_a_share, next_a_end, next_a_share)
            prefetch_l2(next_b, share * next_b_share, next_b_end, next_b_share)


@jit
def _attention_rows_kernel(
    splits, kv_heads, serving,
    qkv_ptr, key_ptr, value_ptr, scalar_ptr, rope_ptr, qn_ptr, kn_ptr, part_ptr, count_ptr, out_ptr,
    qkv_stride, out_stride, slots, pinned_slots, ring, per, ring_programs, scale, head_eps,
    a_ptr, f_ptr, w_ptr, b_ptr, r_ptr, y_ptr, rows, streams, a_stride, f_stride, w_stride, r_stride, y_stride, ahead,
    G: tl.constexpr, D: tl.constexpr, C: tl.constexpr, RD: tl.constexpr, Q_STEP: tl.constexpr, K_BASE: tl.constexpr,
    V_BASE: tl.constexpr, KV_STEP: tl.constexpr, NORM: tl.constexpr, BT: tl.constexpr, TILES: tl.constexpr,
    STAGES: tl.constexpr, DOT: tl.constexpr, SP: tl.constexpr, SIZE: tl.constexpr, GC: tl.constexpr,
    KIND: tl.constexpr,
    KA: tl.constexpr, KF: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, S: tl.constexpr, ACT: tl.constexpr,
    GATED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, EVEN: tl.constexpr, EVICT: tl.constexpr,
    ROW_STAGES: tl.constexpr, ROW_KIND: tl.constexpr, LATE: tl.constexpr, ROWS_LATE: tl.constexpr,
    WAIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The first `serving` programs stream weight rows for all streams; then one for each (split, head, stream)."""
    pid = tl.program_id(0)
    if pid < serving:
        multi_stream_tiles(
            pid, serving, a_ptr, f_ptr, w_ptr, b_ptr, r_ptr, y_ptr, y_ptr, y_ptr, rows, streams, a_stride, f_stride,
            w_stride, r_stride, y_stride, ahead, KA, KF, BN, BK, S, ACT, GATED, HAS_BIAS, HAS_RESIDUAL, EVEN, EVICT,
            ROW_STAGES, ROW_KIND, 1, ROWS_LATE, WAIT, PDL,
        )  # fmt: skip
    else:
        job = pid - serving
        attend_split(
            job % splits, splits, job // splits % kv_heads, kv_heads, job // (splits * kv_heads),
            qkv_ptr, key_ptr, value_ptr, scalar_ptr, rope_ptr, qn_ptr, kn_ptr, part_ptr, count_ptr, out_ptr,
            qkv_stride, out_stride, slots, pinned_slots, ring, per, ring_programs, scale, head_eps,
            qkv_ptr, 0, 0, qkv_ptr, 0, 0,
            G, D, C, RD, Q_STEP, K_BASE, V_BASE, KV_STEP, NORM, BT, TILES, STAGES, DOT, SP, SIZE, GC, KIND, False,
            LATE, PDL,
        )  # fmt: skip


def attention_linear(
    qkv: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scalars: torch.Tensor,
    rope: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    query_heads: int,
    pinned_slots: int,
    order: str,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    norm: str = "layer",
    activation: str = "gelu",
    out: torch.Tensor | None = None,
    linear_out: torch.Tensor | None = None,
    workspace: Workspace | None = None,
    config: AttentionLinearConfig | AttentionRowsConfig | None = None,
    normed: torch.Tensor | None = None,
    wait: bool = True,
    prefetch: Prefetch = NO_PREFETCH,
    pdl: bool = False,
    implementation: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention_decode` and `norm_linear` in one kernel: of one stream, or of up to 16 whose norm is given.

    Parameters
    ----------
    qkv, keys, values, scalars, rope, query_heads, pinned_slots, order, out, workspace
        As in `attention_decode`.
    x, weight, norm_weight, norm_bias, bias, eps, norm
        As in `norm_linear`.
    activation : {"none", "gelu"}
    linear_out : Tensor, (streams, rows), optional
        Result of the linear layer.
    config : AttentionLinearConfig or AttentionRowsConfig, optional
        The latter for several streams; one of the other kind is not looked at.
    normed : Tensor, (streams, hidden), optional
        The norm of x in the weight's dtype, where another kernel has computed it (`norm_rows`); for several streams.
    wait : bool
        With `pdl`: whether the linear layer waits for the previous kernel. It need not if that kernel neither writes x
        nor touches `linear_out`, and triggers this launch only after its own wait (`LinearConfig.late`).
    prefetch, pdl, implementation
        As in `norm_linear`. The twins, and several streams without `normed`, take the two ops one after the other.

    Returns
    -------
    out : Tensor, (streams, query_heads * head_dim)
    linear_out : Tensor, (streams, rows)

    Raises
    ------
    ValueError
        Naming the argument that the op cannot serve and what is accepted.
    """
    if activation not in ("none", "gelu"):
        raise ValueError(f"activation={activation!r} in a kernel with attention; accepted: none, gelu")
    streams, kernel = len(qkv), use_triton(implementation, qkv)
    if normed is not None and 1 < streams <= MAX_STREAMS and kernel:
        return _attention_rows(
            qkv, keys, values, scalars, rope, normed, weight, query_heads, pinned_slots, order, bias, activation, out,
            linear_out, workspace, config if isinstance(config, AttentionRowsConfig) else None, wait, pdl,
        )  # fmt: skip
    if streams > 1 or not kernel:
        out = attention_decode(
            qkv, keys, values, scalars, rope, query_heads=query_heads, pinned_slots=pinned_slots, order=order, out=out,
            workspace=workspace, pdl=pdl, implementation=implementation,
        )  # fmt: skip
        if normed is not None and not kernel:
            linear_out = _rows_twin(normed, weight, bias, activation, linear_out)
            return out, linear_out
        linear_out = norm_linear(
            x, weight, norm_weight=norm_weight, norm_bias=norm_bias, bias=bias, eps=eps, norm=norm,
            activation=activation, out=linear_out, prefetch=prefetch, pdl=pdl, implementation=implementation,
        )  # fmt: skip
        return out, linear_out
    rows, hidden = weight.shape
    check_attention(qkv, keys, values, scalars, rope, query_heads, pinned_slots, order, None, None)
    check_linear(x, weight, norm_weight, norm_bias, bias, norm, activation)
    width = query_heads * keys.shape[3]
    out, linear_out = _room("out", out, width, keys), _room("linear_out", linear_out, rows, weight)
    if not isinstance(config, AttentionLinearConfig):
        config = default_attention_linear(
            hidden, keys.shape[3], keys.shape[2] - pinned_slots, pinned_slots, shared_bytes(x.device)
        )
    check_tile(config.linear, hidden, weight)
    grid, arguments, constants = launch_arguments(
        qkv, keys, values, scalars, rope, query_heads, pinned_slots, order, None, None, 0.0, out, workspace,
        config.attention,
    )  # fmt: skip
    _launch(
        grid, arguments, constants, x, weight, norm_weight, norm_bias, bias, eps, norm, activation, linear_out, config,
        wait, prefetch, pdl,
    )  # fmt: skip
    return out, linear_out


def _rows_twin(normed, weight, bias, activation, out) -> torch.Tensor:
    """The linear layer of a norm that is given, in plain PyTorch."""
    y = linear_residual_twin(normed, weight, None, bias, None)
    y = F.gelu(y) if activation == "gelu" else y
    return y.to(weight.dtype) if out is None else out.copy_(y)


def _attention_rows(
    qkv, keys, values, scalars, rope, normed, weight, query_heads, pinned_slots, order, bias, activation, out,
    linear_out, workspace, config, wait, pdl,
):  # fmt: skip
    streams, kv_heads, slots, head_dim = keys.shape
    check_attention(qkv, keys, values, scalars, rope, query_heads, pinned_slots, order, None, None)
    check_tensor("normed", normed, (streams, weight.shape[1]), dtypes=(weight.dtype,), device=qkv.device)
    if out is None:
        out = torch.empty(streams, query_heads * head_dim, dtype=keys.dtype, device=qkv.device)
    if linear_out is None:
        linear_out = torch.empty(streams, len(weight), dtype=weight.dtype, device=qkv.device)
    if config is None:
        processors = multiprocessors(qkv.device)
        attention = several_attention(streams * kv_heads, head_dim, slots - pinned_slots, pinned_slots, processors)
        config = AttentionRowsConfig(attention, replace(BESIDE, warps=attention.warps))
    grid, arguments, constants = launch_arguments(
        qkv, keys, values, scalars, rope, query_heads, pinned_slots, order, None, None, 0.0, out, workspace,
        config.attention,
    )  # fmt: skip
    rows, row_constants = product_arguments(normed, weight, linear_out, None, bias, None, activation, config.rows)
    del row_constants["STAGES"], row_constants["KIND"]
    tiles = -(-len(weight) // config.rows.rows)
    serving = even_programs(tiles, multiprocessors(qkv.device) * config.rows.per_sm)
    launch(
        _attention_rows_kernel, (serving + grid[0] * grid[1] * streams,), grid[0], kv_heads, serving, *arguments,
        *rows, **constants, **row_constants, ROW_STAGES=config.rows.stages, ROW_KIND=dot_kind(weight.dtype),
        LATE=config.attention.late, ROWS_LATE=config.rows.late, WAIT=wait, num_warps=config.rows.warps, pdl=pdl,
    )  # fmt: skip
    return out, linear_out


def _launch(
    grid, arguments, constants, x, weight, norm_weight, norm_bias, bias, eps, norm, activation, out, config, wait,
    prefetch, pdl,
):  # fmt: skip
    (rows, hidden), linear, attending = weight.shape, config.linear, grid[0] * grid[1]
    room = multiprocessors(x.device) * linear.per_sm - attending
    serving = min(-(-rows // linear.rows), room if room > 0 else multiprocessors(x.device))
    launch(
        _attention_linear_kernel, (attending + serving,), grid[0], grid[1], *arguments,
        x[0], weight, weight if bias is None else bias, norm_weight, norm_weight if norm_bias is None else norm_bias,
        out[0], rows, eps, weight.stride(0), linear.ahead, *prefetch.arguments(weight, serving), **constants,
        K=hidden, BN=linear.rows, BK=linear.columns, LAYER=norm == "layer", ACT=activation == "gelu",
        HAS_BIAS=bias is not None, HAS_BETA=norm_bias is not None, EVEN=rows % linear.rows == 0,
        EVICT="evict_first" if linear.evict else "", ROW_STAGES=linear.stages, HOLD=linear.hold, FILL=linear.fill,
        LATE=config.attention.late, ROWS_LATE=linear.late, WAIT=wait, NEXT=bool(prefetch),
        num_warps=linear.warps, pdl=pdl,
    )  # fmt: skip


def _room(name: str, tensor: torch.Tensor | None, width: int, like: torch.Tensor) -> torch.Tensor:
    """An output of one stream, given or made."""
    if tensor is None:
        return torch.empty(1, width, dtype=like.dtype, device=like.device)
    check_tensor(name, tensor, (1, width), dtypes=FLOAT_DTYPES, device=like.device, contiguous=False)
    return tensor
