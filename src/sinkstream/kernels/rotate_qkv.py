"""Rotary positions of a chunk, in place: queries and keys of every token, as the product of a layer has left them."""

import torch

from sinkstream.kernels.attention_decode import ORDERS
from sinkstream.kernels.attention_decode_twin import split_qkv
from sinkstream.kernels.runtime import FLOAT_DTYPES, check_tensor, jit, launch, tl, triton, use_triton

TOKENS = 16  # of one program


@jit(do_not_specialize=["tokens"])
def _rotate_qkv_kernel(
    qkv_ptr, rope_ptr, qn_ptr, kn_ptr, tokens, stride, query_heads, eps, Q_STEP: tl.constexpr, K_BASE: tl.constexpr,
    KV_STEP: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, TM: tl.constexpr,
    SIZE: tl.constexpr, REST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (tile of tokens, head); keys come after the queries. Each thread writes what it alone has read."""
    rows, head = tl.program_id(0) * TM + tl.arange(0, TM), tl.program_id(1)
    here = rows < tokens
    own = tl.where(head < query_heads, head * Q_STEP, K_BASE + (head - query_heads) * KV_STEP)
    place = qkv_ptr + rows.to(tl.int64)[:, None] * stride + own
    pair = tl.arange(0, SIZE)[None, :]
    mask = here[:, None] & (pair < HALF)
    one = tl.load(place + pair, mask=mask, other=0.0).to(tl.float32)
    other = tl.load(place + HALF + pair, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        weight = tl.where(head < query_heads, qn_ptr, kn_ptr)
        square = tl.sum(one * one, 1) + tl.sum(other * other, 1)
        if REST > 0:
            tail = 2 * HALF + tl.arange(0, REST)[None, :]
            valid = here[:, None] & (tail < D)
            rest = tl.load(place + tail, mask=valid, other=0.0).to(tl.float32)
            square += tl.sum(rest * rest, 1)
        scale = tl.rsqrt(square / D + eps)[:, None]
        one *= scale * tl.load(weight + pair, mask=pair < HALF, other=0.0).to(tl.float32)
        other *= scale * tl.load(weight + HALF + pair, mask=pair < HALF, other=0.0).to(tl.float32)
        if REST > 0:
            rest *= scale * tl.load(weight + tail, mask=tail < D, other=0.0).to(tl.float32)
            tl.store(place + tail, rest.to(qkv_ptr.dtype.element_ty), mask=valid)
    angle = rope_ptr + rows[:, None] * (2 * HALF) + pair
    cos = tl.load(angle, mask=mask, other=0.0)
    sin = tl.load(angle + HALF, mask=mask, other=0.0)
    tl.store(place + pair, (one * cos - other * sin).to(qkv_ptr.dtype.element_ty), mask=mask)
    tl.store(place + HALF + pair, (other * cos + one * sin).to(qkv_ptr.dtype.element_ty), mask=mask)


def rotate_qkv(
    qkv: torch.Tensor,
    rotation: torch.Tensor,
    *,
    query_heads: int,
    kv_heads: int,
    order: str,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
    implementation: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rotate queries and keys of a chunk of tokens in place.

    Parameters
    ----------
    qkv : Tensor, (tokens, (query_heads + 2 * kv_heads) * head_dim)
        Rows may be strided. Values are left alone.
    rotation : Tensor, (tokens, 2, rotary_dim / 2), float32
        Cosine and sine of every token's position.
    order : {"per-head", "blocks"}
        As in `attention_decode`.
    q_norm, k_norm : Tensor, (head_dim,), optional
        RMSNorm of queries and keys before the rotation, with `eps` (Qwen3).
    implementation : {"auto", "triton", "torch"}, optional

    Returns
    -------
    query, key, value : Tensor, (tokens, query_heads or kv_heads, head_dim)
        Views of `qkv`.

    Raises
    ------
    ValueError
        Naming the argument that the op cannot serve and what is accepted.
    """
    tokens, dim = len(qkv), qkv.shape[1] // (query_heads + 2 * kv_heads)
    device, width = qkv.device, (query_heads + 2 * kv_heads) * dim
    check_tensor("qkv", qkv, (None, width), dtypes=FLOAT_DTYPES, device=device, contiguous=False)
    check_tensor("rotation", rotation, (tokens, 2, None), dtypes=(torch.float32,), device=device)
    half = rotation.shape[2]
    if order not in ORDERS:
        raise ValueError(f"order={order!r} is unknown; accepted: {', '.join(ORDERS)}")
    if not 1 <= half <= dim // 2:
        raise ValueError(f"rotation has {half} angles; accepted: 1 to {dim // 2}, half of head_dim")
    if (q_norm is None) != (k_norm is None):
        raise ValueError("q_norm and k_norm; accepted: both or neither")
    parts = split_qkv(qkv, query_heads, kv_heads, dim, order)
    if not use_triton(implementation, qkv):
        for part, norm in ((parts[0], q_norm), (parts[1], k_norm)):
            part.copy_(rotate_twin(part, rotation, norm, eps))
        return parts
    per_head, rest = order == "per-head", dim - 2 * half if q_norm is not None else 0
    launch(
        _rotate_qkv_kernel, (-(-tokens // TOKENS), query_heads + kv_heads), qkv, rotation,
        qkv if q_norm is None else q_norm, qkv if k_norm is None else k_norm, tokens, qkv.stride(0), query_heads, eps,
        Q_STEP=3 * dim if per_head else dim, K_BASE=dim if per_head else query_heads * dim,
        KV_STEP=3 * dim if per_head else dim, D=dim, HALF=half, NORM=q_norm is not None, TM=TOKENS,
        SIZE=triton.next_power_of_2(half), REST=triton.next_power_of_2(rest) if rest else 0, num_warps=4, pdl=False,
    )  # fmt: skip
    return parts


def rotate_twin(x: torch.Tensor, rotation: torch.Tensor, norm: torch.Tensor | None, eps: float) -> torch.Tensor:
    """The twin of the kernel for one part ``(tokens, heads, head_dim)``, float32."""
    wide, half = x.float(), rotation.shape[2]
    if norm is not None:
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * norm.float()
    cos, sin = rotation[:, None].unbind(2)
    one, other = wide[..., :half], wide[..., half : 2 * half]
    return torch.cat([one * cos - other * sin, other * cos + one * sin, wide[..., 2 * half :]], -1)
