"""Decode attention over two frames in one kernel: rotate, write the new key and value, split attention, combine.

Programs share the ring of one key-value head: split-K along the slots. The loads of a program are all in flight at
once, and are issued before the wait for the previous kernel, on which they do not depend. The last program to finish
combines the partial results. Programs of their own serve the pinned slots, with the query rotated to its frame
position; the last of them also writes the new token and attends to it from registers. An eviction moves no memory.
"""

import math
from dataclasses import replace

import torch

from sinkstream.kernels.attention_decode_twin import attention_decode_twin
from sinkstream.kernels.attention_filled import attention_filled_kernel, filled_arguments
from sinkstream.kernels.config import (
    MAX_SPLITS,
    AttentionConfig,
    count_programs,
    default_attention,
    live_programs,
    several_attention,
)
from sinkstream.kernels.observed import NOT_OBSERVED, Observed
from sinkstream.kernels.online_softmax import (
    combine,
    gather_rows,
    load_newest,
    load_rotated,
    load_slots,
    newest_scores,
    online_softmax_init,
    online_softmax_run,
    online_softmax_update_new,
    store_partial,
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
    prefetch_next,
    tl,
    triton,
    use_triton,
)

FIELDS = 8  # scalars of a stream: slot, window position, frame position, pinned, first, length, token, query
ORDERS = ("per-head", "blocks")
COMBINED_VALUES = 64  # partial results in a thread's registers while it combines them, those in flight included


@jit
def attend_split(
    split, programs, head, kv_heads, stream,
    qkv_ptr, key_ptr, value_ptr, scalar_ptr, rope_ptr, qn_ptr, kn_ptr, part_ptr, count_ptr, out_ptr,
    query_ptr, score_ptr, sum_ptr, kept, qkv_stride, out_stride, slots, pinned_slots, ring, per, ring_programs, scale,
    eps, next_a, next_a_end, next_a_share, next_b, next_b_end, next_b_share,
    G: tl.constexpr, D: tl.constexpr, C: tl.constexpr, RD: tl.constexpr, Q_STEP: tl.constexpr, K_BASE: tl.constexpr,
    V_BASE: tl.constexpr, KV_STEP: tl.constexpr, NORM: tl.constexpr, BT: tl.constexpr, TILES: tl.constexpr,
    STAGES: tl.constexpr, DOT: tl.constexpr, SP: tl.constexpr, SIZE: tl.constexpr, GC: tl.constexpr,
    KIND: tl.constexpr, QUERIES: tl.constexpr, SCORES: tl.constexpr, LIVE: tl.constexpr, NEXT: tl.constexpr,
    LATE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """What program (split, key-value head, stream) does. Its G queries share every key and value that is read.

    The first `ring_programs` splits serve the ring, the others the pinned slots; the last one also the new token.
    LIVE: the slots that are visible are divided, oldest first, instead of all slots; programs that are left over end.
    QUERIES: the first one keeps the rotated queries. SCORES: every program keeps the scores of its slots.
    """
    which = stream * kv_heads + head
    if PDL and not LATE:
        gdc_launch_dependents()
    slot, pinned = tl.load(scalar_ptr + stream * 8), tl.load(scalar_ptr + stream * 8 + 3)
    first, length = tl.load(scalar_ptr + stream * 8 + 4), tl.load(scalar_ptr + stream * 8 + 5)
    if LIVE:
        of_ring = tl.cdiv(length, per)
        live = of_ring + tl.maximum(tl.cdiv(pinned, per), 1)
    else:
        of_ring, live = ring_programs, programs
    alive = split < live if LIVE else True
    if alive:
        in_ring = split < of_ring
        first, length = tl.where(in_ring, first, 0), tl.where(in_ring, length, pinned)
        offset = tl.where(in_ring, pinned_slots, 0)
        size = tl.where(in_ring, ring, pinned_slots)
        base = which.to(tl.int64) * slots
        keys, values = key_ptr + (base + offset) * D, value_ptr + (base + offset) * D
        start = (split - tl.where(in_ring, 0, of_ring)) * per
        end, skip = tl.minimum(start + per, length if LIVE else size), slot - offset
        k, v, seen = load_slots(
            keys, values, start, end if STAGES == 0 else start, first, length, size, skip, C, D, BT, LIVE
        )  # fmt: skip
        if NEXT:
            prefetch_next(which * programs + split, next_a, next_a_end, next_a_share, next_b, next_b_end, next_b_share)
        if PDL:
            gdc_wait()
        row = qkv_ptr + stream * qkv_stride
        window = rope_ptr + stream * 2 * RD
        rope = window + tl.where(in_ring, 0, RD)
        QR: tl.constexpr = 16 if DOT else 1
        q = load_rotated(row + head * G * Q_STEP, G, Q_STEP, rope, qn_ptr, eps, KIND, QR, C, D, RD, NORM, SIZE)
        new_key, new_value = row + K_BASE + head * KV_STEP, row + V_BASE + head * KV_STEP
        if QUERIES:  # noqa: SIM102  (known when the kernel is compiled)
            if split == 0:
                place = tl.maximum(tl.load(scalar_ptr + stream * 8 + 7), 0)
                g, columns = tl.arange(0, QR)[:, None], tl.arange(0, C)[None, :]
                kept_query = query_ptr + ((which.to(tl.int64) * G + g) * kept + place) * D + columns
                for c in tl.static_range(D // C):
                    tl.store(kept_query + c * C, q[c].to(query_ptr.dtype.element_ty), mask=(g < G) & (columns < D))
        score_row = score_ptr
        if SCORES:
            score_row = score_ptr + which.to(tl.int64) * G * slots + offset
        newest = split == live - 1
        if DOT:  # loaded along with the query; without matrix units registers are too few for that
            new_k, kept_k, new_v = load_newest(
                new_key, new_value, newest, rope, window, kn_ptr, eps, C, D, RD, NORM, SIZE
            )  # fmt: skip
        m, s, a = online_softmax_init(16 if DOT else BT, C, D)
        m, s, a = online_softmax_run(
            k, v, seen, keys, values, start, end, first, length, size, skip, q, scale, m, s, a, score_row, slots,
            G, C, D, BT, TILES, STAGES, DOT, KIND, SCORES, LIVE,
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
            z = newest_scores(q, new_k, scale)
            if SCORES:
                g = tl.arange(0, QR)
                tl.store(score_ptr + (which.to(tl.int64) * G + g) * slots + slot, z, mask=g < G)
            m, s, a = online_softmax_update_new(z, new_v, m, s, a)
        part = part_ptr + which.to(tl.int64) * programs * (G * D + 2 * G)
        store_partial(part + split * (G * D + 2 * G), m, s, a, QR, G, C, D)
        tl.debug_barrier()
        if tl.atomic_add(count_ptr + which, 1, sem="acq_rel") == live - 1:
            tl.debug_barrier()
            sums = sum_ptr
            if SCORES:
                sums = sum_ptr + which * G
            combine(part, out_ptr + stream * out_stride + head * G * D, sums, live, G, GC, D, SP, SIZE, SCORES)
            tl.store(count_ptr + which, 0)
    else:
        if NEXT:
            prefetch_next(which * programs + split, next_a, next_a_end, next_a_share, next_b, next_b_end, next_b_share)


@jit
def _attention_decode_kernel(
    qkv_ptr, key_ptr, value_ptr, scalar_ptr, rope_ptr, qn_ptr, kn_ptr, part_ptr, count_ptr, out_ptr,
    query_ptr, score_ptr, sum_ptr, kept, qkv_stride, out_stride, slots, pinned_slots, ring, per, ring_programs, scale,
    eps, next_a, next_a_end, next_a_share, next_b, next_b_end, next_b_share,
    G: tl.constexpr, D: tl.constexpr, C: tl.constexpr, RD: tl.constexpr, Q_STEP: tl.constexpr, K_BASE: tl.constexpr,
    V_BASE: tl.constexpr, KV_STEP: tl.constexpr, NORM: tl.constexpr, BT: tl.constexpr, TILES: tl.constexpr,
    STAGES: tl.constexpr, DOT: tl.constexpr, SP: tl.constexpr, SIZE: tl.constexpr, GC: tl.constexpr,
    KIND: tl.constexpr, QUERIES: tl.constexpr, SCORES: tl.constexpr, LIVE: tl.constexpr, NEXT: tl.constexpr,
    LATE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (split, key-value head, stream)."""
    attend_split(
        tl.program_id(0), tl.num_programs(0), tl.program_id(1), tl.num_programs(1), tl.program_id(2),
        qkv_ptr, key_ptr, value_ptr, scalar_ptr, rope_ptr, qn_ptr, kn_ptr, part_ptr, count_ptr, out_ptr,
        query_ptr, score_ptr, sum_ptr, kept, qkv_stride, out_stride, slots, pinned_slots, ring, per, ring_programs,
        scale, eps, next_a, next_a_end, next_a_share, next_b, next_b_end, next_b_share,
        G, D, C, RD, Q_STEP, K_BASE, V_BASE, KV_STEP, NORM, BT, TILES, STAGES, DOT, SP, SIZE, GC, KIND, QUERIES,
        SCORES, LIVE, NEXT, LATE, PDL,
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
    most_visible: int | None = None,
    out: torch.Tensor | None = None,
    observed: Observed = NOT_OBSERVED,
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
        One layer's slots, pinned ones first; keys rotated. Written in place at each stream's slot. Contiguous, or the
        last slots of every head of such tensors.
    scalars : Tensor, (streams, 8), int32
        Slot to write, -, -, pinned entries visible, ring index of the oldest visible window token, visible window
        length with the new token, -, place of the query in `observed.queries` (negative: 0). The kernel reads slots
        before it waits for the previous kernel, so with `pdl` the scalars must be final before the previous kernel
        starts.
    rope : Tensor, (streams, 2, 2, rotary_dim / 2), float32
        Cosine and sine at the window position of the query, then at its frame position (`rope_frames`).
    query_heads : int
    pinned_slots : int
        Slots in front of the ring.
    order : {"per-head", "blocks"}
        Of `qkv`: q, k, v of head 0, of head 1, ... (GPT-NeoX), or all q, all k, all v.
    q_norm, k_norm : Tensor, (head_dim,), optional
        RMSNorm of queries and keys before the rotation, with `eps` (Qwen3).
    most_visible : int, optional
        The most slots that a query sees, the new token's included. With it the programs divide what a stream sees now
        instead of all slots, so that slots that hold nothing cost nothing; not together with `observed`.
    out : Tensor, (streams, query_heads * head_dim), optional
    observed : Observed
        What is kept of the queries and their attention; default: nothing.
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
    observed.check(keys, query_heads)
    check_most_visible(most_visible, keys, observed)
    rest = (query_heads, pinned_slots, order, q_norm, k_norm, eps)
    if not use_triton(implementation, qkv):
        return out.copy_(attention_decode_twin(qkv, keys, values, scalars, rope, *rest, observed, most_visible))
    if config is None:
        sizes = head_dim, slots - pinned_slots, pinned_slots
        if streams > 1 and query_heads == kv_heads:
            config = several_attention(streams * kv_heads, *sizes, multiprocessors(keys.device))
        else:
            config = default_attention(query_heads // kv_heads, *sizes)
    if config.fill and any(observed.constants.values()):
        config = replace(config, fill=False)
    grid, arguments, constants = launch_arguments(
        qkv, keys, values, scalars, rope, *rest, out, observed, workspace, config, most_visible
    )
    kernel, constants = _attention_decode_kernel, constants | {"LIVE": most_visible is not None}
    if config.fill:
        kernel, (arguments, constants) = attention_filled_kernel, filled_arguments(arguments, constants)
    launch(
        kernel, grid, *arguments, *prefetch.arguments(keys, math.prod(grid)), **constants, NEXT=bool(prefetch),
        LATE=config.late, num_warps=config.warps, carveout=config.carveout, registers=config.registers, pdl=pdl,
    )  # fmt: skip
    return out


def check_inputs(qkv, keys, values, scalars, rope, query_heads, pinned_slots, order, q_norm, k_norm) -> None:
    """Check the inputs of `attention_decode`. Raises ValueError."""
    device = qkv.device
    check_tensor("keys", keys, (None, None, None, None), dtypes=FLOAT_DTYPES, device=device, contiguous=False)
    check_tensor("values", values, tuple(keys.shape), dtypes=(keys.dtype,), device=device, contiguous=False)
    streams, kv_heads, slots, head_dim = keys.shape
    apart = slot_stride(keys) * head_dim
    wanted = (kv_heads * apart, apart, head_dim, 1)
    if any(s != w for p in (keys, values) for n, s, w in zip(p.shape, p.stride(), wanted) if n > 1):
        raise ValueError(
            f"keys and values have strides {keys.stride()} and {values.stride()}; accepted: contiguous, or the last"
            " slots of every head of such tensors"
        )
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


def check_most_visible(most_visible: int | None, keys: torch.Tensor, observed: Observed) -> None:
    """Check `most_visible` for an op on these keys. Raises ValueError."""
    if most_visible is None:
        return
    if not 1 <= most_visible <= keys.shape[2]:
        raise ValueError(f"most_visible={most_visible}; accepted: 1 to {keys.shape[2]}, the slots that there are")
    if any(observed.constants.values()):
        raise ValueError("most_visible where attention is observed; accepted: None, so that every slot is written")


def slot_stride(keys: torch.Tensor) -> int:
    """From one head of keys (streams, kv_heads, slots, head_dim) to the next, in slots."""
    return keys.shape[2] if keys.is_contiguous() else keys.stride(1) // keys.shape[3]


def launch_arguments(
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
    out,
    observed,
    workspace,
    config,
    most_visible=None,
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
    chunk = min(head_dim & -head_dim, config.columns)
    if chunk < 16:
        raise ValueError(f"head_dim={head_dim}; accepted by the kernel: multiples of 16")
    per, ring_programs, pinned_programs = count_programs(config.splits, ring, pinned_slots)
    programs = ring_programs + pinned_programs
    if config.fill:
        programs = config.splits
    elif most_visible is not None:
        programs = min(programs, live_programs(per, most_visible))
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
        *observed.arguments, qkv.stride(0), out.stride(0), slot_stride(keys), pinned_slots, ring, per, ring_programs,
        scale, eps,
    ]  # fmt: skip
    constants = {
        "G": group, "D": head_dim, "C": chunk, "RD": 2 * rope.shape[3],
        "Q_STEP": 3 * head_dim if order == "per-head" else head_dim,
        "K_BASE": bases[0], "V_BASE": bases[1], "KV_STEP": bases[2],
        "NORM": q_norm is not None, "BT": config.tile, "TILES": -(-per // config.tile), "STAGES": config.stages,
        "DOT": dot, "SP": parts, "SIZE": size, "GC": together, "KIND": kind,
        **observed.constants,
    }  # fmt: skip
    return grid, arguments, constants
