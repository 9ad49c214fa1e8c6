"""Decode attention fused horizontally with an independent norm and linear layer: one kernel, programs of two kinds.

In a GPT-NeoX layer with parallel residual the up-projection depends on the residual only. Attention alone leaves the
memory idle while it rotates, waits for its last program and combines; programs that stream the rows of the
up-projection hide that time. The rows do not depend on the previous kernel and need not wait for it.
"""

import torch

from sinkstream.kernels.attention_decode import Workspace, attend_split, attention_decode, launch_arguments
from sinkstream.kernels.attention_decode import check_inputs as check_attention
from sinkstream.kernels.chunks import check_weight
from sinkstream.kernels.config import AttentionLinearConfig, default_attention_linear
from sinkstream.kernels.norm_linear import check_inputs as check_linear
from sinkstream.kernels.norm_linear import norm_linear, norm_linear_tiles
from sinkstream.kernels.observed import NOT_OBSERVED, Observed
from sinkstream.kernels.runtime import (
    FLOAT_DTYPES,
    NO_PREFETCH,
    Prefetch,
    check_tensor,
    jit,
    launch,
    multiprocessors,
    prefetch_next,
    shared_bytes,
    tl,
    use_triton,
)


@jit
def _attention_linear_kernel(
    splits, kv_heads,
    qkv_ptr, key_ptr, value_ptr, scalar_ptr, rope_ptr, qn_ptr, kn_ptr, part_ptr, count_ptr, out_ptr,
    query_ptr, score_ptr, sum_ptr, kept, qkv_stride, out_stride, slots, pinned_slots, ring, per, ring_programs, scale,
    head_eps,
    x_ptr, w_ptr, b_ptr, gamma_ptr, beta_ptr, y_ptr, rows, eps, w_stride, ahead,
    next_a, next_a_end, next_a_share, next_b, next_b_end, next_b_share,
    G: tl.constexpr, D: tl.constexpr, C: tl.constexpr, RD: tl.constexpr, Q_STEP: tl.constexpr, K_BASE: tl.constexpr,
    V_BASE: tl.constexpr, KV_STEP: tl.constexpr, NORM: tl.constexpr, BT: tl.constexpr, TILES: tl.constexpr,
    STAGES: tl.constexpr, DOT: tl.constexpr, SP: tl.constexpr, SIZE: tl.constexpr, GC: tl.constexpr,
    KIND: tl.constexpr, QUERIES: tl.constexpr, SCORES: tl.constexpr,
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
            query_ptr, score_ptr, sum_ptr, kept, qkv_stride, out_stride, slots, pinned_slots, ring, per, ring_programs,
            scale, head_eps,
            next_a, next_a_end, next_a_share, next_b, next_b_end, next_b_share,
            G, D, C, RD, Q_STEP, K_BASE, V_BASE, KV_STEP, NORM, BT, TILES, STAGES, DOT, SP, SIZE, GC, KIND, QUERIES,
            SCORES, False, False, LATE, PDL,
        )  # fmt: skip
    else:
        norm_linear_tiles(
            pid - attending, tl.cdiv(rows, BN), tl.num_programs(0) - attending,
            x_ptr, w_ptr, b_ptr, gamma_ptr, beta_ptr, y_ptr, rows, eps, w_stride, ahead,
            K, BN, BK, LAYER, ACT, False, HAS_BIAS, HAS_BETA, EVEN, EVICT, ROW_STAGES, HOLD, FILL, ROWS_LATE, PDL, WAIT,
        )  # fmt: skip
        if NEXT:
            prefetch_next(pid - attending, next_a, next_a_end, next_a_share, next_b, next_b_end, next_b_share)


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
    most_visible: int | None = None,
    out: torch.Tensor | None = None,
    linear_out: torch.Tensor | None = None,
    observed: Observed = NOT_OBSERVED,
    workspace: Workspace | None = None,
    config: AttentionLinearConfig | None = None,
    wait: bool = True,
    prefetch: Prefetch = NO_PREFETCH,
    pdl: bool = False,
    implementation: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention_decode` and `norm_linear` of one stream in one kernel.

    Parameters
    ----------
    qkv, keys, values, scalars, rope, query_heads, pinned_slots, order, out, observed, workspace
        As in `attention_decode`.
    x, weight, norm_weight, norm_bias, bias, eps, norm
        As in `norm_linear`.
    activation : {"none", "gelu"}
    most_visible : int, optional
        As in `attention_decode`, of several streams. One stream divides all slots: the kernel has no registers left.
    linear_out : Tensor, (streams, rows), optional
        Result of the linear layer.
    wait : bool
        With `pdl`: whether the linear layer waits for the previous kernel. It need not if that kernel neither writes x
        nor touches `linear_out`, and triggers this launch only after its own wait (`LinearConfig.late`).
    config, prefetch, pdl, implementation
        As in `norm_linear`. The twins, and several streams, take the two ops one after the other.

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
    if len(qkv) > 1 or not use_triton(implementation, qkv):
        out = attention_decode(
            qkv, keys, values, scalars, rope, query_heads=query_heads, pinned_slots=pinned_slots, order=order,
            most_visible=most_visible, out=out, observed=observed, workspace=workspace, pdl=pdl,
            implementation=implementation,
        )  # fmt: skip
        linear_out = norm_linear(
            x, weight, norm_weight=norm_weight, norm_bias=norm_bias, bias=bias, eps=eps, norm=norm,
            activation=activation, out=linear_out, prefetch=prefetch, pdl=pdl, implementation=implementation,
        )  # fmt: skip
        return out, linear_out
    rows, hidden = weight.shape
    check_attention(qkv, keys, values, scalars, rope, query_heads, pinned_slots, order, None, None)
    check_linear(x, weight, norm_weight, norm_bias, bias, norm, activation)
    observed.check(keys, query_heads)
    width = query_heads * keys.shape[3]
    out, linear_out = _room("out", out, width, keys), _room("linear_out", linear_out, rows, weight)
    if config is None:
        config = default_attention_linear(
            hidden, keys.shape[3], keys.shape[2] - pinned_slots, pinned_slots, shared_bytes(x.device)
        )
    check_weight(weight, hidden)
    grid, arguments, constants = launch_arguments(
        qkv, keys, values, scalars, rope, query_heads, pinned_slots, order, None, None, 0.0, out, observed,
        workspace, config.attention,
    )  # fmt: skip
    _launch(
        grid, arguments, constants, x, weight, norm_weight, norm_bias, bias, eps, norm, activation, linear_out, config,
        wait, prefetch, pdl,
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
