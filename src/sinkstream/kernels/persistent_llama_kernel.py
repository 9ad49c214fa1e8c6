"""The persistent kernel: all layers of a decode step of one stream, for Llama-like models with small layers.

A program that has written its tile of a phase adds one to the phase's counter, loads the weights of its next tile to
registers, and then waits until the counter says that all tiles are there; the weights of the next layer are on their
way to L2 meanwhile. Counters only grow, so no program resets what another one reads. The host's side, which says what
the phases are, is `persistent_llama`.
"""

# ruff: noqa: RUF005, SIM102 - Triton compiles sums of tuples, not starred ones; constants are tested on their own
from sinkstream.kernels.chunks import load_row_chunks
from sinkstream.kernels.persistent_parts import (
    addresses,
    arrive,
    combine,
    pointer,
    products,
    rows_of,
    share_of_attention,
    wait_for,
)
from sinkstream.kernels.runtime import jit, prefetch_l2, tl


@jit
def _weighted(xs, gammas):
    """A vector times the weight of a norm, by chunks, float32."""
    out = ()
    for c in tl.static_range(len(xs)):
        out = out + (xs[c].to(tl.float32) * gammas[c].to(tl.float32),)
    return out


@jit
def _rms(xs, eps, K: tl.constexpr):
    """The factor of an RMSNorm, one for every (equal) row."""
    square = xs[0].to(tl.float32) * xs[0].to(tl.float32)
    for c in tl.static_range(1, len(xs)):
        square += xs[c].to(tl.float32) * xs[c].to(tl.float32)
    return 1.0 / tl.sqrt(tl.sum(square, 1) / K + eps)


@jit
def _swiglu(gate, up):
    return gate / (1.0 + tl.exp(-gate)) * up


@jit
def _fetch_layer(
    at, pid, of, start, size, H: tl.constexpr, M: tl.constexpr, CONTEXT: tl.constexpr, QKV: tl.constexpr,
    BQ: tl.constexpr, BO: tl.constexpr, BG: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Prefetch to L2 what a program reads of a layer; `start`, `size`: bytes of its keys, and of its values."""
    p = pid.to(tl.int64)
    prefetch_l2(pointer(at[6], of), start, start + size, size)
    prefetch_l2(pointer(at[7], of), start, start + size, size)
    prefetch_l2(pointer(at[1], of), p * (BQ * H * 2), p * 0 + QKV * H * 2, BQ * H * 2)
    prefetch_l2(pointer(at[2], of), p * (BO * CONTEXT * 2), p * 0 + H * CONTEXT * 2, BO * CONTEXT * 2)
    prefetch_l2(pointer(at[4], of), p * (BG * H * 2), p * 0 + M * H * 2, BG * H * 2)
    prefetch_l2(pointer(at[4], of) + M * H, p * (BG * H * 2), p * 0 + M * H * 2, BG * H * 2)
    prefetch_l2(pointer(at[5], of), p * (BD * M * 2), p * 0 + H * M * 2, BD * M * 2)


@jit
def _slots(
    keys, values, start, end, first, length, extent, skip, D: tl.constexpr, BT: tl.constexpr
):  # fmt: skip
    """Keys of BT slots in two halves of their columns, values in one piece, and which slots are visible.

    As in `load_slots`; a key meets its partner in the other half when it is rotated.
    """
    slots = start + tl.arange(0, BT)
    age = tl.where(slots < first, slots - first + extent, slots - first)
    seen = (slots < end) & (age < length) & (slots != skip)
    half, whole = tl.arange(0, D // 2)[None, :], tl.arange(0, D)[None, :]
    k = tl.load(keys + slots[:, None] * D + half, mask=seen[:, None], other=0.0)
    k_other = tl.load(keys + D // 2 + slots[:, None] * D + half, mask=seen[:, None], other=0.0)
    v = tl.load(values + slots[:, None] * D + whole, mask=seen[:, None], other=0.0)
    return k, k_other, v, seen


@jit
def _attend(
    qkv, part, head, split, k, k_other, v, seen, keys, values, slot, rope, in_ring, scale, QH: tl.constexpr,
    KVH: tl.constexpr, D: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """One query head and one split of its slots; the last split also writes the new token and attends to it."""
    C: tl.constexpr = D // 2
    GROUP: tl.constexpr = QH // KVH
    columns, whole = tl.arange(0, C), tl.arange(0, D)
    frame = rope + tl.where(in_ring, 0, D)
    cos, sin = tl.load(frame + columns), tl.load(frame + C + columns)
    one = tl.load(qkv + head * D + columns).to(tl.float32)
    other = tl.load(qkv + head * D + C + columns).to(tl.float32)
    new = qkv + (QH + head // GROUP) * D  # loaded by all splits: so no load waits for another
    key, key_other = tl.load(new + columns).to(tl.float32), tl.load(new + C + columns).to(tl.float32)
    value = tl.load(new + KVH * D + whole).to(tl.float32)
    window_cos, window_sin = tl.load(rope + columns), tl.load(rope + C + columns)
    q, r = (one * cos - other * sin) * scale, (other * cos + one * sin) * scale
    z = tl.sum(k.to(tl.float32) * q[None, :] + k_other.to(tl.float32) * r[None, :], 1)
    z = tl.where(seen, z, -float("inf"))
    m = tl.max(z, 0)
    p = tl.exp2(z - tl.where(m == -float("inf"), 0.0, m))
    total = tl.sum(p, 0)
    mean = tl.sum(p[:, None] * v.to(tl.float32), 0)
    if split == S - 1:
        y = tl.sum(q * (key * cos - key_other * sin) + r * (key_other * cos + key * sin), 0)
        if head % GROUP == 0:
            place = keys + slot * D + columns
            tl.store(place, (key * window_cos - key_other * window_sin).to(keys.dtype.element_ty))
            tl.store(place + C, (key_other * window_cos + key * window_sin).to(keys.dtype.element_ty))
            tl.store(values + slot * D + whole, value.to(keys.dtype.element_ty))
        top = tl.maximum(m, y)
        old, fresh = tl.exp2(m - top), tl.exp2(y - top)
        m, total = top, total * old + fresh
        mean = mean * old + fresh * value
    mine = part + (head * S + split) * (D + 2)
    tl.store(mine + whole, mean)
    tl.store(mine + D, m)
    tl.store(mine + D + 1, total)


@jit(do_not_specialize=["first_layer", "end_layer", "layers", "pinned_slots", "ring", "per", "ring_programs", "stride"])
def persistent_llama_kernel(
    even_ptr, odd_ptr, table_ptr, scalar_ptr, rope_ptr, buffer_ptr, part_ptr, count_ptr, first_layer, end_layer, layers,
    eps, pinned_slots, ring, per, ring_programs, stride, scale,
    H: tl.constexpr, M: tl.constexpr, QH: tl.constexpr, KVH: tl.constexpr, D: tl.constexpr, BK: tl.constexpr,
    BQ: tl.constexpr, BO: tl.constexpr, BG: tl.constexpr, BD: tl.constexpr, BT: tl.constexpr, S: tl.constexpr,
    SP: tl.constexpr, PHASE: tl.constexpr, AHEAD: tl.constexpr, COMPILED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: its tile of every phase of the layers first_layer .. end_layer - 1.

    Counters, a line each: steps done, then tiles of each phase, then splits of each head. Everything that a phase
    overwrites was read by programs whose later tiles the phase has waited for. PHASE: only this one, without waiting;
    -1 for all. `stride`: slots from one kv head to the next.
    """
    pid = tl.program_id(0)
    QKV: tl.constexpr = (QH + 2 * KVH) * D
    CONTEXT: tl.constexpr = QH * D
    GROUP: tl.constexpr = QH // KVH
    qkv = buffer_ptr
    context = qkv + QKV
    between = context + CONTEXT
    middle = between + H
    waits: tl.constexpr = COMPILED and PHASE < 0
    done = tl.load(count_ptr) * layers
    c_qkv, c_context, c_o, c_middle = count_ptr + 32, count_ptr + 64, count_ptr + 96, count_ptr + 128
    c_down, c_heads = count_ptr + 160, count_ptr + 192
    n_qkv: tl.constexpr = (QKV + BQ - 1) // BQ
    n_o: tl.constexpr = (H + BO - 1) // BO
    n_middle: tl.constexpr = (M + BG - 1) // BG
    n_down: tl.constexpr = (H + BD - 1) // BD
    slot, attends, head, split, in_ring, first, length, offset, extent, own, start, end = share_of_attention(
        scalar_ptr, pid, pinned_slots, ring, per, ring_programs, stride, QH, GROUP, D, S
    )
    fetch_start = (own + (offset + start) * D) * 2
    fetch_size = tl.where(attends & (head % GROUP == 0), tl.maximum(end - start, 0), 0) * (D * 2)
    at = addresses(table_ptr + first_layer * 8, 8)
    if AHEAD:
        _fetch_layer(at, pid, even_ptr, fetch_start, fetch_size, H, M, CONTEXT, QKV, BQ, BO, BG, BD)
    r_q, r_o = pid * BQ + tl.arange(0, BQ), pid * BO + tl.arange(0, BO)
    r_g, r_d = pid * BG + tl.arange(0, BG // 2), pid * BD + tl.arange(0, BD)
    r_h = r_g + BG // 2  # gate and up come in two halves, so that a thread holds the input once for both
    for layer in range(first_layer, end_layer):
        turn = done + layer + 1
        odd = layer % 2 == 1
        x_in = tl.multiple_of(tl.where(odd, odd_ptr.to(tl.int64), even_ptr.to(tl.int64)).to(even_ptr.dtype), 16)
        x_out = tl.multiple_of(tl.where(odd, even_ptr.to(tl.int64), odd_ptr.to(tl.int64)).to(even_ptr.dtype), 16)
        following = addresses(table_ptr + tl.minimum(layer + 1, end_layer - 1) * 8, 8)
        if PHASE < 0 or PHASE == 0:
            w_q = load_row_chunks(pointer(at[1], even_ptr), r_q, QKV, H, H, BK, False, "evict_first")
            gamma_q = rows_of(pointer(at[0], even_ptr), H, BK, BQ)
        if PHASE < 0 or PHASE == 1:
            keys, values = pointer(at[6], even_ptr) + own, pointer(at[7], even_ptr) + own
            k, k_other, v, seen = _slots(
                keys + offset * D, values + offset * D, start, end, first, length, extent, slot - offset, D, BT
            )  # fmt: skip
        if AHEAD:
            if layer + 1 < end_layer:
                _fetch_layer(following, pid, even_ptr, fetch_start, fetch_size, H, M, CONTEXT, QKV, BQ, BO, BG, BD)
        if PHASE < 0 or PHASE == 0:
            if pid < n_qkv:
                wait_for(c_down, (turn - 1) * n_down, waits)
                x_q = rows_of(x_in, H, BK, BQ)
                y_q = products(w_q, _weighted(x_q, gamma_q)) * _rms(x_q, eps, H)
                tl.store(qkv + r_q, y_q.to(qkv.dtype.element_ty), mask=r_q < QKV)
                arrive(c_qkv, waits)
        if PHASE < 0 or PHASE == 1:
            if attends:
                wait_for(c_qkv, turn * n_qkv, waits)
                _attend(
                    qkv, part_ptr, head, split, k, k_other, v, seen, keys, values, slot, rope_ptr, in_ring, scale, QH,
                    KVH, D, S,
                )  # fmt: skip
                tl.debug_barrier()
                if tl.atomic_add(c_heads + head, 1, sem="acq_rel") == S - 1:
                    tl.debug_barrier()
                    combine(part_ptr, context, head, D, S, SP)
                    tl.store(c_heads + head, 0)
                    arrive(c_context, waits)
        if PHASE < 0 or PHASE == 2:
            w_o = load_row_chunks(pointer(at[2], even_ptr), r_o, H, CONTEXT, CONTEXT, BK, False, "evict_first")
            if pid < n_o:
                if n_o > n_qkv:
                    wait_for(c_down, (turn - 1) * n_down, waits)
                old_o = tl.load(x_in + r_o, mask=r_o < H, other=0.0, cache_modifier=".cg").to(tl.float32)
                wait_for(c_context, turn * QH, waits)
                y_o = products(w_o, rows_of(context, CONTEXT, BK, BO)) + old_o
                tl.store(between + r_o, y_o.to(qkv.dtype.element_ty), mask=r_o < H)
                arrive(c_o, waits)
        if PHASE < 0 or PHASE == 3:
            gate_w, up_w = pointer(at[4], even_ptr), pointer(at[4], even_ptr) + M * H
            w_g = load_row_chunks(gate_w, r_g, M, H, H, BK, False, "evict_first")
            w_u = load_row_chunks(up_w, r_g, M, H, H, BK, False, "evict_first")
            w_h = load_row_chunks(gate_w, r_h, M, H, H, BK, False, "evict_first")
            w_v = load_row_chunks(up_w, r_h, M, H, H, BK, False, "evict_first")
            gamma_g = rows_of(pointer(at[3], even_ptr), H, BK, BG // 2)
            if pid < n_middle:
                wait_for(c_o, turn * n_o, waits)
                x_g = rows_of(between, H, BK, BG // 2)
                normed, scale_g = _weighted(x_g, gamma_g), _rms(x_g, eps, H)
                y_g = _swiglu(products(w_g, normed) * scale_g, products(w_u, normed) * scale_g)
                y_h = _swiglu(products(w_h, normed) * scale_g, products(w_v, normed) * scale_g)
                tl.store(middle + r_g, y_g.to(qkv.dtype.element_ty), mask=r_g < M)
                tl.store(middle + r_h, y_h.to(qkv.dtype.element_ty), mask=r_h < M)
                arrive(c_middle, waits)
        if PHASE < 0 or PHASE == 4:
            w_d = load_row_chunks(pointer(at[5], even_ptr), r_d, H, M, M, BK, False, "evict_first")
            if pid < n_down:
                if n_down > n_middle:
                    wait_for(c_o, turn * n_o, waits)
                old_d = tl.load(between + r_d, mask=r_d < H, other=0.0, cache_modifier=".cg").to(tl.float32)
                wait_for(c_middle, turn * n_middle, waits)
                y_d = products(w_d, rows_of(middle, M, BK, BD)) + old_d
                tl.store(x_out + r_d, y_d.to(qkv.dtype.element_ty), mask=r_d < H)
                arrive(c_down, waits)
        at = following
    if waits:
        if pid == 0:  # every program has read the number of steps before its last tile
            wait_for(c_down, (done + layers) * n_down, waits)
            tl.atomic_add(count_ptr, 1)
