"""The twin of `attention_decode`: plain PyTorch in float32, or float64 for float64 inputs."""

import torch

from sinkstream.kernels.observed import NOT_OBSERVED


def split_qkv(qkv, query_heads: int, kv_heads: int, head_dim: int, order: str):
    """Views of queries (streams, query_heads, head_dim), keys and values (streams, kv_heads, head_dim)."""
    if order == "per-head":
        return qkv.unflatten(1, (query_heads, 3, head_dim)).unbind(2)
    return qkv.unflatten(1, (-1, head_dim)).split((query_heads, kv_heads, kv_heads), 1)


def attention_decode_twin(
    qkv,
    keys,
    values,
    scalars,
    rope,
    query_heads,
    pinned_slots,
    order,
    q_norm,
    k_norm,
    eps,
    observed=NOT_OBSERVED,
    most_visible=None,
) -> torch.Tensor:
    """The twin of the kernel: plain PyTorch in float32 (float64 for float64 inputs), result in that precision."""
    most = keys.shape[2] if most_visible is None else most_visible
    assert int(scalars[:, 3].add(scalars[:, 5]).max()) <= most, f"a query sees more than {most} slots"
    work = torch.float64 if keys.dtype == torch.float64 else torch.float32
    streams, kv_heads, slots, head_dim = keys.shape
    q, k, v = (part.to(work) for part in split_qkv(qkv, query_heads, kv_heads, head_dim, order))
    if q_norm is not None:
        q, k = (
            x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * w.to(work) for x, w in ((q, q_norm), (k, k_norm))
        )
    window, frame = (tuple(rope[:, i, j, None].to(work) for j in (0, 1)) for i in (0, 1))
    which, slot = torch.arange(streams, device=keys.device), scalars[:, 0].long()
    keys[which, :, slot] = _rotate(k, *window).to(keys.dtype)
    values[which, :, slot] = v.to(values.dtype)
    index = torch.arange(slots, device=keys.device)
    ring = slots - pinned_slots
    age = (index - pinned_slots - scalars[:, 4:5]) % ring
    seen = torch.where(index < pinned_slots, index < scalars[:, 3:4], age < scalars[:, 5:6])
    seen = seen | (index == slot[:, None])
    wide = keys.to(work)
    scores = torch.cat(
        [
            _rotate(q, *angles).unflatten(1, (kv_heads, -1)) @ part.transpose(2, 3)
            for angles, part in ((frame, wide[:, :, :pinned_slots]), (window, wide[:, :, pinned_slots:]))
        ],
        dim=-1,
    )
    scores = (scores * head_dim**-0.5).masked_fill(~seen[:, None, None], float("-inf"))
    observed.keep(_rotate(q, *window), scores, scalars)
    weights = scores.softmax(-1)
    visible = values.to(work).masked_fill(~seen[:, None, :, None], 0.0)
    return (weights @ visible).flatten(1)


def _rotate(x, cos, sin):
    """Rotate the first 2 * len(cos) columns: pairs are (i, i + half)."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)
