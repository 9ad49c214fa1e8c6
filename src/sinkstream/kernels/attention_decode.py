"""Decode attention over two frames in one kernel: rotate, write the new key and value, split attention, combine.

Programs share the ring of one key-value head: split-K along the slots. The loads of a program are all in flight at
once, and are issued before the wait for the previous kernel, on which they do not depend. The last program to finish
combines the partial results. Programs of their own serve the pinned slots, with the query rotated to its frame
position; the last of them also writes the new token and attends to it from registers. An eviction moves no memory.
"""

# ruff: noqa: RUF005 - Triton compiles sums of tuples, not starred ones
import math

import torch

from sinkstream.kernels.config import (
    MAX_SPLITS,
    AttentionConfig,
    count_programs,
    default_attention,
    several_attention,
)
from sinkstream.kernels.runtime import (
    FLOAT_DTYPES,
    HALF_DTYPES,
    NO_PREFETCH,
    Prefetch,
    check_tensor,
    dot_kind,
    gdc_launch_dependents,
    gdc_wait,
    jit,
    launch,
    multiprocessors,
    prefetch_l2,
    tl,
    triton,
    use_triton,
)

FIELDS = 8  # scalars of a stream: slot, window position, frame position, pinned, first, length, token, spare
ORDERS = ("per-head", "blocks")
COMBINED_VALUES = 64  # partial results in a thread's registers while it combines them, those in flight included


@jit
def rotated(
    row, columns, valid, rope, norm_ptr, eps, D: tl.constexpr, RD: tl.constexpr, NORM: tl.constexpr, SIZE: tl.constexpr
):
    """Columns of a rotated vector, float32; `row` points to its first value. NORM: RMSNorm over all D columns first."""
    half: tl.constexpr = RD // 2
    partner = tl.where(columns < half, columns + half, tl.where(columns < RD, columns - half, columns))
    cos = tl.load(rope + columns % half, mask=columns < RD, other=1.0)
    sin = tl.load(rope + half + columns % half, mask=columns < RD, other=0.0)
    x = tl.load(row + columns, mask=valid, other=0.0).to(tl.float32)
    y = tl.load(row + partner, mask=valid, other=0.0).to(tl.float32)
    if NORM:
        everything = tl.arange(0, SIZE)[None, :]
        whole = tl.load(row + everything, mask=everything < D, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(whole * whole, 1) / D + eps)[:, None]
        x = x * scale * tl.load(norm_ptr + columns).to(tl.float32)
        y = y * scale * tl.load(norm_ptr + partner).to(tl.float32)
    return x * cos + tl.where(columns < half, -y, y) * sin


@jit
def load_rotated(
    row, count, stride, rope, norm_ptr, eps, kind: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
    RD: tl.constexpr, NORM: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """`count` rotated heads in column chunks: a tuple of (ROWS, C) of dtype `kind`, rows past `count` are zero."""
    index = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, C)[None, :]
    rows = row + tl.minimum(index, count - 1) * stride
    chunks = ()
    for c in tl.static_range(D // C):
        x = rotated(rows, c * C + columns, index < count, rope, norm_ptr, eps, D, RD, NORM, SIZE)
        chunks = chunks + (x.to(kind),)
    return chunks


@jit
def load_newest(
    key, value, newest, rope, window, norm_ptr, eps, C: tl.constexpr, D: tl.constexpr, RD: tl.constexpr,
    NORM: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """The new token's key as it is attended to and as it is kept, and its value; unless `newest`, nothing is read."""
    count = tl.where(newest, 1, 0)
    attended = load_rotated(key, count, 0, rope, norm_ptr, eps, tl.float32, 1, C, D, RD, NORM, SIZE)
    kept = load_rotated(key, count, 0, window, norm_ptr, eps, tl.float32, 1, C, D, RD, NORM, SIZE)
    values = ()
    for c in tl.static_range(D // C):
        values = values + (tl.load(value + c * C + tl.arange(0, C)[None, :], mask=newest, other=0.0),)
    return attended, kept, values


@jit
def load_slots(keys, values, start, end, first, length, ring, skip, C: tl.constexpr, D: tl.constexpr, BT: tl.constexpr):
    """Keys and values of BT slots in column chunks (BT, C), and which slots are visible; others are not read.

    A slot is visible if (slot - first) mod ring < length; `skip` is where the new token is being written.
    """
    slots = start + tl.arange(0, BT)
    age = tl.where(slots < first, slots - first + ring, slots - first)
    seen = (slots < end) & (age < length) & (slots != skip)
    place = slots[:, None] * D + tl.arange(0, C)[None, :]
    k = ()
    v = ()
    for c in tl.static_range(D // C):
        k = k + (tl.load(keys + place + c * C, mask=seen[:, None], other=0.0),)
    for c in tl.static_range(D // C):
        v = v + (tl.load(values + place + c * C, mask=seen[:, None], other=0.0),)
    return k, v, seen


@jit
def online_softmax_update(q, k, v, seen, scale, m, s, a, DOT: tl.constexpr, KIND: tl.constexpr):
    """Online softmax, base 2: one tile more in maxima m, sums s and weighted values a (a tuple of chunks).

    With DOT there is one softmax per query. Without it there is one per *row of the tile*, so that threads exchange
    nothing until `gather_rows` merges the rows at the end.
    """
    if DOT:
        z = tl.dot(q[0], tl.trans(k[0].to(KIND)))
        for c in tl.static_range(1, len(k)):
            z = tl.dot(q[c], tl.trans(k[c].to(KIND)), z)
        z = tl.where(seen[None, :], z * scale, -float("inf"))
        top = tl.maximum(m, tl.max(z, 1))
        safe = tl.where(top == -float("inf"), 0.0, top)
        p = tl.exp2(z - safe[:, None])
        old = tl.exp2(m - safe)
        s = s * old + tl.sum(p, 1)
        p = p.to(KIND)
    else:
        product = k[0].to(tl.float32) * q[0]
        for c in tl.static_range(1, len(k)):
            product += k[c].to(tl.float32) * q[c]
        z = tl.where(seen, tl.sum(product, 1) * scale, -float("inf"))
        top = tl.maximum(m, z)
        safe = tl.where(top == -float("inf"), 0.0, top)
        p = tl.exp2(z - safe)
        old = tl.exp2(m - safe)
        s = s * old + p
    out = ()
    for c in tl.static_range(len(v)):
        if DOT:
            out = out + (tl.dot(p, v[c].to(KIND), a[c] * old[:, None]),)
        else:
            out = out + (a[c] * old[:, None] + p[:, None] * v[c].to(tl.float32),)
    return top, s, out


@jit
def online_softmax_init(ROWS: tl.constexpr, C: tl.constexpr, D: tl.constexpr):
    """An online softmax of ROWS rows before its first tile."""
    a = ()
    for _ in tl.static_range(D // C):
        a = a + (tl.zeros((ROWS, C), tl.float32),)
    return tl.full((ROWS,), -float("inf"), tl.float32), tl.zeros((ROWS,), tl.float32), a


@jit
def gather_rows(m, s, a):
    """One online softmax from those of all rows of a tile: shapes (1,), (1,) and a tuple of (1, C)."""
    top = tl.max(m, 0)
    weight = tl.exp2(m - tl.where(top == -float("inf"), 0.0, top))
    out = ()
    for c in tl.static_range(len(a)):
        out = out + (tl.sum(a[c] * weight[:, None], 0)[None, :],)
    return tl.full((1,), 0.0, tl.float32) + top, tl.full((1,), 0.0, tl.float32) + tl.sum(s * weight, 0), out


@jit
def online_softmax_update_new(q, k, v, scale, m, s, a):
    """Online softmax: the new token, from registers; k and v are tuples of (1, C)."""
    z = tl.sum(q[0].to(tl.float32) * k[0], 1)
    for c in tl.static_range(1, len(k)):
        z += tl.sum(q[c].to(tl.float32) * k[c], 1)
    z *= scale
    top = tl.maximum(m, z)
    old, p = tl.exp2(m - top), tl.exp2(z - top)
    out = ()
    for c in tl.static_range(len(v)):
        out = out + (a[c] * old[:, None] + p[:, None] * v[c].to(tl.float32),)
    return top, s * old + p, out


@jit
def online_softmax_run(
    k, v, seen, keys, values, start, end, first, length, ring, skip, q, scale, m, s, a, C: tl.constexpr,
    D: tl.constexpr, BT: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr, DOT: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    """All tiles of one program. Without STAGES k and v hold the first tile, and the next one is in flight."""
    if STAGES > 0:
        for t in tl.range(0, TILES, num_stages=STAGES):
            k, v, seen = load_slots(keys, values, start + t * BT, end, first, length, ring, skip, C, D, BT)
            m, s, a = online_softmax_update(q, k, v, seen, scale, m, s, a, DOT, KIND)
    elif TILES <= 4:
        for t in tl.static_range(TILES):
            old_k, old_v, old_seen = k, v, seen
            if t + 1 < TILES:
                k, v, seen = load_slots(keys, values, start + (t + 1) * BT, end, first, length, ring, skip, C, D, BT)
            m, s, a = online_softmax_update(q, old_k, old_v, old_seen, scale, m, s, a, DOT, KIND)
    else:
        for t in tl.range(0, TILES):
            old_k, old_v, old_seen = k, v, seen
            k, v, seen = load_slots(keys, values, start + (t + 1) * BT, end, first, length, ring, skip, C, D, BT)
            m, s, a = online_softmax_update(q, old_k, old_v, old_seen, scale, m, s, a, DOT, KIND)
    return m, s, a


@jit
def store_partial(part, m, s, a, ROWS: tl.constexpr, G: tl.constexpr, C: tl.constexpr, D: tl.constexpr):
    """Partial results of one program: G * D weighted values, G maxima, G sums, float32."""
    g = tl.arange(0, ROWS)
    place = part + g[:, None] * D + tl.arange(0, C)[None, :]
    for c in tl.static_range(D // C):
        tl.store(place + c * C, a[c], mask=(g < G)[:, None])
    tl.store(part + G * D + g, m, mask=g < G)
    tl.store(part + G * D + G + g, s, mask=g < G)


@jit
def load_partials(
    part, programs, g, G: tl.constexpr, GC: tl.constexpr, D: tl.constexpr, SP: tl.constexpr, SIZE: tl.constexpr
):
    """Partial results of all programs for queries g .. g + GC - 1: m and s (SP, GC), weighted values (SP, GC, SIZE)."""
    width: tl.constexpr = G * D + 2 * G
    row, query = tl.arange(0, SP)[:, None], g + tl.arange(0, GC)[None, :]
    columns = tl.arange(0, SIZE)[None, None, :]
    valid = (row < programs) & (query < G)
    m = tl.load(part + row * width + G * D + query, mask=valid, other=0.0, cache_modifier=".cg")
    s = tl.load(part + row * width + G * D + G + query, mask=valid, other=1.0, cache_modifier=".cg")
    place = part + (row * width + query * D)[:, :, None] + columns
    a = tl.load(place, mask=valid[:, :, None] & (columns < D), other=0.0, cache_modifier=".cg")
    return tl.where(row < programs, m, -float("inf")), s, a


@jit
def combine(
    part, out_ptr, programs, G: tl.constexpr, GC: tl.constexpr, D: tl.constexpr, SP: tl.constexpr, SIZE: tl.constexpr
):
    """Reduce the partial results of all programs of a head, GC queries at a time; the next queries are in flight."""
    query, columns = tl.arange(0, GC)[:, None], tl.arange(0, SIZE)[None, :]
    m, s, a = load_partials(part, programs, 0, G, GC, D, SP, SIZE)
    for g in tl.static_range(0, G, GC):
        old_m, old_s, old_a = m, s, a
        if g + GC < G:
            m, s, a = load_partials(part, programs, g + GC, G, GC, D, SP, SIZE)
        weight = tl.exp2(old_m - tl.max(old_m, 0)[None, :])
        y = tl.sum(old_a * weight[:, :, None], 0) / tl.sum(old_s * weight, 0)[:, None]
        tl.store(out_ptr + (g + query) * D + columns, y, mask=(g + query < G) & (columns < D))


@jit
def attend_split(
    split, programs, head, kv_heads, stream,
    qkv_ptr, key_ptr, value_ptr, scalar_ptr, rope_ptr, qn_ptr, kn_ptr, part_ptr, count_ptr, out_ptr,
    qkv_stride, out_stride, slots, pinned_slots, ring, per, ring_programs, scale, eps,
    next_a, next_a_end, next_a_share, next_b, next_b_end, next_b_share,
    G: tl.constexpr, D: tl.constexpr, C: tl.constexpr, RD: tl.constexpr, Q_STEP: tl.constexpr, K_BASE: tl.constexpr,
    V_BASE: tl.constexpr, KV_STEP: tl.constexpr, NORM: tl.constexpr, BT: tl.constexpr, TILES: tl.constexpr,
    STAGES: tl.constexpr, DOT: tl.constexpr, SP: tl.constexpr, SIZE: tl.constexpr, GC: tl.constexpr,
    KIND: tl.constexpr, NEXT: tl.constexpr, LATE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """What program (split, key-value head, stream) does. Its G queries share every key and value that is read.

    The first `ring_programs` splits serve the ring, the others the pinned slots; the last one also the new token.
    """
    which = stream * kv_heads + head
    if PDL and not LATE:
        gdc_launch_dependents()
    in_ring = split < ring_programs
    slot, pinned = tl.load(scalar_ptr + stream * 8), tl.load(scalar_ptr + stream * 8 + 3)
    first, length = tl.load(scalar_ptr + stream * 8 + 4), tl.load(scalar_ptr + stream * 8 + 5)
    first, length = tl.where(in_ring, first, 0), tl.where(in_ring, length, pinned)
    offset = tl.where(in_ring, pinned_slots, 0)
    size = tl.where(in_ring, ring, pinned_slots)
    base = which.to(tl.int64) * slots
    keys, values = key_ptr + (base + offset) * D, value_ptr + (base + offset) * D
    start = (split - tl.where(in_ring, 0, ring_programs)) * per
    end, skip = tl.minimum(start + per, size), slot - offset
    k, v, seen = load_slots(
        keys, values, start, end if STAGES == 0 else start, first, length, size, skip, C, D, BT
    )  # fmt: skip
    if NEXT:
        share = (which * programs + split).to(tl.int64)
        prefetch_l2(next_a, share * next_a_share, next_a_end, next_a_share)
        prefetch_l2(next_b, share * next_b_share, next_b_end, next_b_share)
    if PDL:
        gdc_wait()
    row = qkv_ptr + stream * qkv_stride
    window = rope_ptr + stream * 2 * RD
    rope = window + tl.where(in_ring, 0, RD)
    QR: tl.constexpr = 16 if DOT else 1
    q = load_rotated(row + head * G * Q_STEP, G, Q_STEP, rope, qn_ptr, eps, KIND, QR, C, D, RD, NORM, SIZE)
    new_key, new_value = row + K_BASE + head * KV_STEP, row + V_BASE + head * KV_STEP
    newest = split == programs - 1
    if DOT:  # loaded along with the query; without matrix units registers are too few for that
        new_k, kept_k, new_v = load_newest(
            new_key, new_value, newest, rope, window, kn_ptr, eps, C, D, RD, NORM, SIZE
        )  # fmt: skip
    m, s, a = online_softmax_init(16 if DOT else BT, C, D)
    m, s, a = online_softmax_run(
        k, v, seen, keys, values, start, end, first, length, size, skip, q, scale, m, s, a, C, D, BT, TILES, STAGES,
        DOT, KIND,
    )  # fmt: skip
    if PDL and LATE:
        gdc_launch_dependents()
    if not DOT:
        m, s, a = gather_rows(m, s, a)
    if newest:
        if not DOT:
            new_k, kept_k, new_v = load_newest(
                new_key, new_value, newest, rope, window, kn_ptr, eps, C, D, RD, NORM, SIZE
            )  # fmt: skip
        place = (base + slot) * D + tl.arange(0, C)[None, :]
        for c in tl.static_range(D // C):
            tl.store(key_ptr + place + c * C, kept_k[c].to(key_ptr.dtype.element_ty))
            tl.store(value_ptr + place + c * C, new_v[c].to(value_ptr.dtype.element_ty))
        m, s, a = online_softmax_update_new(q, new_k, new_v, scale, m, s, a)
    part = part_ptr + which.to(tl.int64) * programs * (G * D + 2 * G)
    store_partial(part + split * (G * D + 2 * G), m, s, a, QR, G, C, D)
    tl.debug_barrier()
    if tl.atomic_add(count_ptr + which, 1, sem="acq_rel") == programs - 1:
        tl.debug_barrier()
        combine(part, out_ptr + stream * out_stride + head * G * D, programs, G, GC, D, SP, SIZE)
        tl.store(count_ptr + which, 0)


@jit
def _attention_decode_kernel(
    qkv_ptr, key_ptr, value_ptr, scalar_ptr, rope_ptr, qn_ptr, kn_ptr, part_ptr, count_ptr, out_ptr,
    qkv_stride, out_stride, slots, pinned_slots, ring, per, ring_programs, scale, eps,
    next_a, next_a_end, next_a_share, next_b, next_b_end, next_b_share,
    G: tl.constexpr, D: tl.constexpr, C: tl.constexpr, RD: tl.constexpr, Q_STEP: tl.constexpr, K_BASE: tl.constexpr,
    V_BASE: tl.constexpr, KV_STEP: tl.constexpr, NORM: tl.constexpr, BT: tl.constexpr, TILES: tl.constexpr,
    STAGES: tl.constexpr, DOT: tl.constexpr, SP: tl.constexpr, SIZE: tl.constexpr, GC: tl.constexpr,
    KIND: tl.constexpr, NEXT: tl.constexpr, LATE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (split, key-value head, stream)."""
    attend_split(
        tl.program_id(0), tl.num_programs(0), tl.program_id(1), tl.num_programs(1), tl.program_id(2),
        qkv_ptr, key_ptr, value_ptr, scalar_ptr, rope_ptr, qn_ptr, kn_ptr, part_ptr, count_ptr, out_ptr,
        qkv_stride, out_stride, slots, pinned_slots, ring, per, ring_programs, scale, eps,
        next_a, next_a_end, next_a_share, next_b, next_b_end, next_b_share,
        G, D, C, RD, Q_STEP, K_BASE, V_BASE, KV_STEP, NORM, BT, TILES, STAGES, DOT, SP, SIZE, GC, KIND, NEXT, LATE,
        PDL,
    )  # fmt: skip


class Workspace:
    """Partial results and arrival counters of `attention_decode`, kept between calls (one per engine is enough).

    Parameters
    ----------
    streams, query_heads, kv_heads, head_dim : int
    device : torch.device
    """

    def __init__(self, streams: int, query_heads: int, kv_heads: int, head_dim: int, device: torch.device):
        self.shape = (streams, query_heads, kv_heads, head_dim)
        self.partials = torch.empty(streams * query_heads * MAX_SPLITS * (head_dim + 2), device=device)
        self.counters = torch.zeros(streams * kv_heads, dtype=torch.int32, device=device)


def attention_decode(
    qkv: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scalars: torch.Tensor,
    rope: torch.Tensor,
    *,
    query_heads: int,
    pinned_slots: int,
    order: str,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
    out: torch.Tensor | None = None,
    workspace: Workspace | None = None,
    config: AttentionConfig | None = None,
    prefetch: Prefetch = NO_PREFETCH,
    pdl: bool = False,
    implementation: str | None = None,
) -> torch.Tensor:
    """Append one token a stream and attend to every visible slot: pinned slots in one frame, the ring in the other.

    Parameters
    ----------
    qkv : Tensor, (streams, (query_heads + 2 * kv_heads) * head_dim)
        Queries, keys and values of the new tokens, not rotated. Rows may be strided.
    keys, values : Tensor, (streams, kv_heads, slots, head_dim)
        One layer's slots, pinned ones first; keys rotated. Written in place at each stream's slot.
    scalars : Tensor, (streams, 8), int32
        Slot to write, -, -, pinned entries visible, ring index of the oldest visible window token, visible window
        length with the new token, -, -. The kernel reads slots before it waits for the previous kernel, so with `pdl`
        the scalars must be final before the previous kernel starts.
    rope : Tensor, (streams, 2, 2, rotary_dim / 2), float32
        Cosine and sine at the window position of the query, then at its frame position (`rope_frames`).
    query_heads : int
    pinned_slots : int
        Slots in front of the ring.
    order : {"per-head", "blocks"}
        Of `qkv`: q, k, v of head 0, of head 1, ... (GPT-NeoX), or all q, all k, all v.
    q_norm, k_norm : Tensor, (head_dim,), optional
        RMSNorm of queries and keys before the rotation, with `eps` (Qwen3).
    out : Tensor, (streams, query_heads * head_dim), optional
    workspace : Workspace, optional
        Allocated for this call if missing; a captured graph needs one of its own.
    config, prefetch, pdl, implementation
        As in `norm_linear`.

    Returns
    -------
    Tensor, (streams, query_heads * head_dim)

    Raises
    ------
    ValueError
        Naming the argument that the op cannot serve and what is accepted.
    """
    check_inputs(qkv, keys, values, scalars, rope, query_heads, pinned_slots, order, q_norm, k_norm)
    streams, kv_heads, slots, head_dim = keys.shape
    if out is None:
        out = torch.empty(streams, query_heads * head_dim, dtype=keys.dtype, device=keys.device)
    check_tensor(
        "out", out, (streams, query_heads * head_dim), dtypes=FLOAT_DTYPES, device=keys.device, contiguous=False
    )
    rest = (query_heads, pinned_slots, order, q_norm, k_norm, eps)
    if not use_triton(implementation, qkv):
        return out.copy_(attention_decode_twin(qkv, keys, values, scalars, rope, *rest))
    if config is None:
        sizes = head_dim, slots - pinned_slots, pinned_slots
        if streams > 1 and query_heads == kv_heads:
            config = several_attention(streams * kv_heads, *sizes, multiprocessors(keys.device))
        else:
            config = default_attention(query_heads // kv_heads, *sizes)
    grid, arguments, constants = launch_arguments(qkv, keys, values, scalars, rope, *rest, out, workspace, config)
    launch(
        _attention_decode_kernel, grid, *arguments, *prefetch.arguments(keys, math.prod(grid)), **constants,
        NEXT=bool(prefetch), LATE=config.late, num_warps=config.warps, pdl=pdl,
    )  # fmt: skip
    return out


def check_inputs(qkv, keys, values, scalars, rope, query_heads, pinned_slots, order, q_norm, k_norm) -> None:
    """Check the inputs of `attention_decode`. Raises ValueError."""
    device = qkv.device
    check_tensor("keys", keys, (None, None, None, None), dtypes=FLOAT_DTYPES, device=device)
    check_tensor("values", values, tuple(keys.shape), dtypes=(keys.dtype,), device=device)
    streams, kv_heads, slots, head_dim = keys.shape
    if query_heads < 1 or query_heads % kv_heads:
        raise ValueError(f"query_heads={query_heads}; accepted: a multiple of the {kv_heads} key-value heads")
    width = (query_heads + 2 * kv_heads) * head_dim
    check_tensor("qkv", qkv, (streams, width), dtypes=FLOAT_DTYPES, device=device, contiguous=False)
    check_tensor("scalars", scalars, (streams, FIELDS), dtypes=(torch.int32,), device=device)
    check_tensor("rope", rope, (streams, 2, 2, None), dtypes=(torch.float32,), device=device)
    if not 1 <= rope.shape[3] <= head_dim // 2:
        raise ValueError(f"rope has {rope.shape[3]} angles; accepted: 1 to {head_dim // 2}, half of head_dim")
    if order not in ORDERS:
        raise ValueError(f"order={order!r} is unknown; accepted: {', '.join(ORDERS)}")
    if order == "per-head" and query_heads != kv_heads:
        raise ValueError(f"order='per-head' with {query_heads} query and {kv_heads} key-value heads; accepted: as many")
    if not 0 <= pinned_slots < slots:
        raise ValueError(f"pinned_slots={pinned_slots}; accepted: 0 to {slots - 1}, so that the ring has a slot")
    if (q_norm is None) != (k_norm is None):
        raise ValueError("q_norm and k_norm; accepted: both or neither")
    for name, weight in (("q_norm", q_norm), ("k_norm", k_norm)):
        if weight is not None:
            check_tensor(name, weight, (head_dim,), dtypes=FLOAT_DTYPES, device=device)


def split_qkv(qkv, query_heads: int, kv_heads: int, head_dim: int, order: str):
    """Views of queries (streams, query_heads, head_dim), keys and values (streams, kv_heads, head_dim)."""
    if order == "per-head":
        return qkv.unflatten(1, (query_heads, 3, head_dim)).unbind(2)
    return qkv.unflatten(1, (-1, head_dim)).split((query_heads, kv_heads, kv_heads), 1)


def attention_decode_twin(
    qkv, keys, values, scalars, rope, query_heads, pinned_slots, order, q_norm, k_norm, eps
) -> torch.Tensor:
    """The twin of the kernel: plain PyTorch in float32 (float64 for float64 inputs), result in that precision."""
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
    weights = (scores * head_dim**-0.5).masked_fill(~seen[:, None, None], float("-inf")).softmax(-1)
    visible = values.to(work).masked_fill(~seen[:, None, :, None], 0.0)
    return (weights @ visible).flatten(1)


def _rotate(x, cos, sin):
    """Rotate the first 2 * len(cos) columns: pairs are (i, i + half)."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def launch_arguments(
    qkv, keys, values, scalars, rope, query_heads, pinned_slots, order, q_norm, k_norm, eps, out, workspace, config
) -> tuple[tuple[int, int, int], list, dict]:
    """Grid (splits, key-value heads, streams), arguments and constants of `attend_split`, prefetches left out.

    Raises
    ------
    ValueError
        Naming what the kernel, unlike the twin, does not serve.
    """
    streams, kv_heads, slots, head_dim = keys.shape
    if workspace is None:
        workspace = Workspace(streams, query_heads, kv_heads, head_dim, keys.device)
    if workspace.shape != (streams, query_heads, kv_heads, head_dim):
        raise ValueError(
            f"workspace was made for (streams, query_heads, kv_heads, head_dim) = {workspace.shape};"
            f" accepted here: {(streams, query_heads, kv_heads, head_dim)}"
        )
    group, ring = query_heads // kv_heads, slots - pinned_slots
    dot = config.dot or group > 1
    if keys.dtype not in HALF_DTYPES:
        raise ValueError(f"keys have dtype {keys.dtype}; accepted by the kernel: {', '.join(map(str, HALF_DTYPES))}")
    if group > 16:
        raise ValueError(f"{group} queries a key-value head; accepted by the kernel: at most 16")
    if not 1 <= config.splits <= MAX_SPLITS:
        raise ValueError(f"splits={config.splits} in the configuration; accepted: 1 to {MAX_SPLITS}")
    chunk = min(head_dim & -head_dim, config.columns)
    if chunk < 16:
        raise ValueError(f"head_dim={head_dim}; accepted by the kernel: multiples of 16")
    per, ring_programs, pinned_programs = count_programs(config.splits, ring, pinned_slots)
    programs = ring_programs + pinned_programs
    if programs > MAX_SPLITS:
        raise ValueError(
            f"{programs} programs for {ring} ring and {pinned_slots} pinned slots; accepted: at most {MAX_SPLITS},"
            f" with fewer splits than {config.splits}"
        )
    heads = query_heads
    bases = (head_dim, 2 * head_dim, 3 * head_dim) if order == "per-head" else (
        heads * head_dim, (heads + kv_heads) * head_dim, head_dim)  # fmt: skip
    kind = dot_kind(keys.dtype) if dot else tl.float32
    scale = head_dim**-0.5 * 1.4426950408889634
    norms = (qkv, qkv) if q_norm is None else (q_norm, k_norm)
    parts, size = triton.next_power_of_2(programs), triton.next_power_of_2(head_dim)
    together, registers = triton.next_power_of_2(group), parts * size / (32 * config.warps)
    while together > 1 and registers * together * (1 if together >= group else 2) > COMBINED_VALUES:
        together //= 2
    grid = (programs, kv_heads, streams)
    arguments = [
        qkv, keys, values, scalars, rope, *norms, workspace.partials, workspace.counters, out,
        qkv.stride(0), out.stride(0), slots, pinned_slots, ring, per, ring_programs, scale, eps,
    ]  # fmt: skip
    constants = {
        "G": group, "D": head_dim, "C": chunk, "RD": 2 * rope.shape[3],
        "Q_STEP": 3 * head_dim if order == "per-head" else head_dim,
        "K_BASE": bases[0], "V_BASE": bases[1], "KV_STEP": bases[2],
        "NORM": q_norm is not None, "BT": config.tile, "TILES": -(-per // config.tile), "STAGES": config.stages,
        "DOT": dot, "SP": parts, "SIZE": size, "GC": together, "KIND": kind,
    }  # fmt: skip
    return grid, arguments, constants
