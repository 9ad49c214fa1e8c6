"""Decode attention as one wave of programs whose pipelines are filled before they wait for the previous kernel.

A program walks an equal share of the tiles that its stream sees: pinned slots first, then the ring, oldest token first.
The tiles go through shared memory, and the first ones are in flight before the wait, on which they do not depend. The
first program of a head has the pinned slots, the last one the new token. A query has two rows of one matrix, rotated to
its place in the window and to that in the frame; a tile counts for one of them. The last program to finish combines
the partial results; a single one has none. `attention_decode` takes this kernel where `AttentionConfig.fill` says so.
"""

# ruff: noqa: RUF005 - Triton compiles sums of tuples, not starred ones
from sinkstream.kernels.config import chunk_widths
from sinkstream.kernels.online_softmax import (
    combine,
    newest_scores,
    online_softmax_update,
    rotated,
    tile_scores,
)
from sinkstream.kernels.runtime import gdc_launch_dependents, gdc_wait, jit, prefetch_next, tl, triton

ROWS = 16  # rows of a tile of queries: the fewest that the matrix units take


@jit
def chunk_columns(c: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr):
    """The columns of a chunk, (1, width)."""
    if c == 0:
        return tl.arange(0, WIDE)[None, :]
    else:
        return WIDE + tl.arange(0, REST)[None, :]


@jit
def within(seen, columns, c: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr):
    """`seen` without columns past the end of the head, of which only a second chunk has some."""
    if c == 0 or WIDE + REST == D:
        return seen
    else:
        return seen & (columns < D)


@jit
def zero_chunks(ROWS: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr, kind: tl.constexpr):
    """Zeros of `kind`, (ROWS, width) of every chunk."""
    chunks = (tl.zeros((ROWS, WIDE), kind),)
    if REST:
        chunks = chunks + (tl.zeros((ROWS, REST), kind),)
    return chunks


@jit
def load_heads(
    rows, valid, rope, norm_ptr, eps, kind: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr,
    RD: tl.constexpr, NORM: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Rotated heads, (rows, width) of every chunk; rows that are not `valid`, and columns past the end, are zero.

    `rows` points to the first value of each, `rope` to the angles of each; all are (rows, 1).
    """
    chunks = ()
    for c in tl.static_range(2 if REST else 1):
        columns = chunk_columns(c, WIDE, REST)
        inside = columns if c == 0 or WIDE + REST == D else tl.minimum(columns, D - 1)
        x = rotated(rows, inside, valid, rope, norm_ptr, eps, D, RD, NORM, SIZE)
        chunks = chunks + (tl.where(within(valid, columns, c, D, WIDE, REST), x, 0.0).to(kind),)
    return chunks


@jit
def load_tile_of(base, slots, seen, D: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr):
    """Keys or values of slots, (slots, width) of every chunk; where nothing is `seen` zero, and not read."""
    chunks = ()
    for c in tl.static_range(2 if REST else 1):
        columns = chunk_columns(c, WIDE, REST)
        mask = within(seen[:, None], columns, c, D, WIDE, REST)
        chunks = chunks + (tl.load(base + slots[:, None] * D + columns, mask=mask, other=0.0),)
    return chunks


@jit
def visible_tile(tile, of_pinned, pinned, first, length, pinned_slots, ring, skip, BT: tl.constexpr):
    """Slots of a tile of what a stream sees, and which of them are seen; `skip` is where the new token is written."""
    in_ring = tile >= of_pinned
    index = tl.where(in_ring, tile - of_pinned, tile) * BT + tl.arange(0, BT)
    age = first + index
    of_ring = pinned_slots + tl.where(age < ring, age, age - ring)
    slots = tl.where(in_ring, of_ring, index)
    return slots, (index < tl.where(in_ring, length, pinned)) & (slots != skip)


@jit
def begin_with_newest(
    newest, q, row_k, row_v, place_k, place_v, window, kn_ptr, eps, scale, G: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr, RD: tl.constexpr, NORM: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """An online softmax that begins with the new token, which is written too; with nothing unless `newest`."""
    one = tl.arange(0, 1)[:, None]
    k = load_heads(row_k + one, (one == 0) & newest, window, kn_ptr, eps, tl.float32, D, WIDE, REST, RD, NORM, SIZE)
    a = ()
    for c in tl.static_range(2 if REST else 1):
        columns = chunk_columns(c, WIDE, REST)
        kept = (columns < D) & newest
        v = tl.load(row_v + columns, mask=kept, other=0.0)
        tl.store(place_k + columns, k[c].to(place_k.dtype.element_ty), mask=kept)
        tl.store(place_v + columns, v.to(place_v.dtype.element_ty), mask=kept)
        a = a + (tl.zeros((ROWS, 1), tl.float32) + v.to(tl.float32),)
    seen = (tl.arange(0, ROWS) < G) & newest
    return tl.where(seen, newest_scores(q, k, scale), -float("inf")), tl.where(seen, 1.0, 0.0), a


@jit
def merge_frames(g, m, s, a, G: tl.constexpr, ROWS: tl.constexpr, REST: tl.constexpr):
    """The online softmax of query g from its rows of window and frame: m, s, and (1, width) of every chunk."""
    rows = tl.arange(0, ROWS)
    mine = (rows == g) | (rows == G + g)
    top = tl.max(tl.where(mine, m, -float("inf")), 0)
    weight = tl.where(mine, tl.exp2(m - tl.where(top == -float("inf"), 0.0, top)), 0.0)
    out = ()
    for c in tl.static_range(2 if REST else 1):
        out = out + (tl.sum(a[c] * weight[:, None], 0)[None, :],)
    return top, tl.sum(s * weight, 0), out


@jit
def attention_filled_kernel(
    qkv_ptr, key_ptr, value_ptr, scalar_ptr, rope_ptr, qn_ptr, kn_ptr, part_ptr, count_ptr, out_ptr, qkv_stride,
    out_stride, slots, pinned_slots, ring, scale, eps, next_a, next_a_end, next_a_share, next_b, next_b_end,
    next_b_share,
    G: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, WIDE: tl.constexpr, REST: tl.constexpr, RD: tl.constexpr,
    Q_STEP: tl.constexpr, K_BASE: tl.constexpr, V_BASE: tl.constexpr, KV_STEP: tl.constexpr,
    NORM: tl.constexpr, BT: tl.constexpr, STAGES: tl.constexpr, SP: tl.constexpr, SIZE: tl.constexpr, GC: tl.constexpr,
    KIND: tl.constexpr, NEXT: tl.constexpr, LATE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (split, key-value head, stream). Its G queries share every key and value that is read."""
    split, programs, head, stream = tl.program_id(0), tl.num_programs(0), tl.program_id(1), tl.program_id(2)
    which = stream * tl.num_programs(1) + head
    if PDL and not LATE:
        gdc_launch_dependents()
    slot, pinned = tl.load(scalar_ptr + stream * 8), tl.load(scalar_ptr + stream * 8 + 3)
    first, length = tl.load(scalar_ptr + stream * 8 + 4), tl.load(scalar_ptr + stream * 8 + 5)
    base = which.to(tl.int64) * slots
    keys, values = key_ptr + base * D, value_ptr + base * D
    of_pinned = tl.cdiv(pinned, BT)
    tiles = of_pinned + tl.cdiv(length, BT)
    start, end = tl.cdiv(split * tiles, programs), tl.cdiv((split + 1) * tiles, programs)
    newest = split == programs - 1
    if NEXT:
        prefetch_next(which * programs + split, next_a, next_a_end, next_a_share, next_b, next_b_end, next_b_share)
    row, window = qkv_ptr + stream * qkv_stride, rope_ptr + stream * 2 * RD
    g = tl.arange(0, ROWS)
    q = zero_chunks(ROWS, WIDE, REST, KIND)
    m, s = tl.full((ROWS,), -float("inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    a = zero_chunks(ROWS, WIDE, REST, tl.float32)
    for tile in tl.range(start, tl.maximum(end, start + 1), num_stages=STAGES):  # without a share nothing is seen
        if tile == start:
            if PDL:
                gdc_wait()
            angles = window + tl.where(g < G, 0, RD)[:, None]
            queries = row + (head * G + g % G)[:, None] * Q_STEP
            q = load_heads(queries, (g < 2 * G)[:, None], angles, qn_ptr, eps, KIND, D, WIDE, REST, RD, NORM, SIZE)
            m, s, a = begin_with_newest(
                newest, q, row + K_BASE + head * KV_STEP, row + V_BASE + head * KV_STEP, keys + slot * D,
                values + slot * D, window, kn_ptr, eps, scale, G, ROWS, D, WIDE, REST, RD, NORM, SIZE,
            )  # fmt: skip
        place, seen = visible_tile(tile, of_pinned, pinned, first, length, pinned_slots, ring, slot, BT)
        seen = seen & (tile < end)
        k = load_tile_of(keys, place, seen, D, WIDE, REST)
        v = load_tile_of(values, place, seen, D, WIDE, REST)
        rotated_so = (g < G) == (tile >= of_pinned)
        z = tl.where(rotated_so[:, None], tile_scores(q, k, seen, scale, True, KIND), -float("inf"))
        m, s, a = online_softmax_update(z, v, m, s, a, True, KIND)
    if PDL and LATE:
        gdc_launch_dependents()
    out = out_ptr + stream * out_stride + head * G * D
    part = part_ptr + which.to(tl.int64) * programs * (G * D + 2 * G)
    own = part + split * (G * D + 2 * G)
    for query in tl.static_range(G):
        top, total, y = merge_frames(query, m, s, a, G, ROWS, REST)
        for c in tl.static_range(2 if REST else 1):
            columns = chunk_columns(c, WIDE, REST)
            if SP == 1:
                tl.store(out + query * D + columns, y[c] / total, mask=columns < D)
            else:
                tl.store(own + query * D + columns, y[c], mask=columns < D)
        if SP > 1:
            tl.store(own + G * D + query, top)
            tl.store(own + G * D + G + query, total)
    if SP > 1:
        tl.debug_barrier()
        if tl.atomic_add(count_ptr + which, 1, sem="acq_rel") == programs - 1:
            tl.debug_barrier()
            combine(part, out, out, programs, G, GC, D, SP, SIZE, False)
            tl.store(count_ptr + which, 0)


def filled_arguments(arguments: list, constants: dict) -> tuple[list, dict]:
    """Arguments and constants of `attention_filled_kernel`, from those of `attend_split` for the same programs."""
    qkv_stride, out_stride, slots, pinned_slots, ring, _, _, scale, eps = arguments[14:]
    wide, rest = chunk_widths(constants["D"])
    same = ("G", "D", "RD", "Q_STEP", "K_BASE", "V_BASE", "KV_STEP", "NORM", "BT", "STAGES", "SP", "SIZE", "GC", "KIND")
    rows = max(ROWS, triton.next_power_of_2(2 * constants["G"]))
    return [*arguments[:10], qkv_stride, out_stride, slots, pinned_slots, ring, scale, eps], {
        "ROWS": rows, "WIDE": wide, "REST": rest, **{name: constants[name] for name in same},
    }  # fmt: skip
