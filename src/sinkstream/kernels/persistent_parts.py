"""What the persistent kernels share: barriers, addresses, products along rows, and parts of attention."""

# ruff: noqa: RUF005 - Triton compiles sums of tuples, not starred ones
from sinkstream.kernels.runtime import jit, tl


@jit
def arrive(counter, COMPILED: tl.constexpr):
    """Add one to a counter, after everything that this program has written."""
    if COMPILED:
        tl.inline_asm_elementwise(
            """{
            .reg .pred p;
            .reg .u32 t;
            mov.b32 $0, 0;
            bar.sync 0;
            mov.u32 t, %tid.x;
            setp.ne.u32 p, t, 0;
            @p bra DONE;
            red.release.gpu.global.add.u32 [$1], 1;
            DONE:
            }""",
            "=&r,l",
            [counter.to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@jit
def wait_for(counter, target, COMPILED: tl.constexpr):
    """Wait until a counter has come to `target` (modulo 2^32); what was written before that can be read then."""
    if COMPILED:
        tl.inline_asm_elementwise(
            """{
            .reg .pred p;
            .reg .u32 t;
            mov.b32 $0, 0;
            mov.u32 t, %tid.x;
            setp.ne.u32 p, t, 0;
            @p bra DONE;
            AGAIN:
            ld.acquire.gpu.global.u32 t, [$1];
            sub.u32 t, t, $2;
            setp.lt.s32 p, t, 0;
            @p bra AGAIN;
            DONE:
            bar.sync 0;
            }""",
            "=&r,l,r",
            [counter.to(tl.int64), target],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@jit
def addresses(table, COUNT: tl.constexpr):
    """All addresses of a layer."""
    found = ()
    for i in tl.static_range(COUNT):
        found = found + (tl.load(table + i),)
    return found


@jit
def pointer(address, like):
    """An address as a pointer like `like`."""
    return tl.multiple_of(address.to(like.dtype), 16)


@jit
def rows_of(vector, K: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr):
    """A vector of K values as chunks (BN, BK), all rows alike: laid out like the weights, so nothing is exchanged."""
    columns, rows = tl.arange(0, BK)[None, :], tl.arange(0, BN)[:, None] * 0
    chunks = ()
    for c in tl.static_range((K + BK - 1) // BK):
        place = vector + rows + (c * BK + columns)
        chunks = chunks + (tl.load(place, mask=(c * BK + columns < K) & (rows == 0), other=0.0),)
    return chunks


@jit
def products(weights, xs, tile: tl.constexpr = 0):
    """Sums of products along the rows of a tile: (rows,) float32. `weights`: the chunks of several tiles in turn."""
    first: tl.constexpr = tile * len(xs)
    acc = weights[first].to(tl.float32) * xs[0].to(tl.float32)
    for c in tl.static_range(1, len(xs)):
        acc += weights[first + c].to(tl.float32) * xs[c].to(tl.float32)
    return tl.sum(acc, 1)


@jit
def share_of_attention(
    scalar_ptr, pid, pinned_slots, ring, per, ring_programs, stride, QH: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """A program's part of attention: one head and one split of its slots, the ring's splits before the pinned ones.

    Returns the slot of the new token; whether the program has a part, head and split; whether the split is one of the
    ring; first slot and length of what is visible, in these slots; where these begin and how many there are; where the
    head's keys begin in a layer; and the share start .. end - 1 of the slots, an empty one without a part.
    """
    slot, pinned = tl.load(scalar_ptr), tl.load(scalar_ptr + 3)
    first, length = tl.load(scalar_ptr + 4), tl.load(scalar_ptr + 5)
    attends = pid < QH * S
    head = tl.minimum(pid // S, QH - 1)
    split = pid % S
    in_ring = split < ring_programs
    first, length = tl.where(in_ring, first, 0), tl.where(in_ring, length, pinned)
    offset, extent = tl.where(in_ring, pinned_slots, 0), tl.where(in_ring, ring, pinned_slots)
    own = (head // GROUP).to(tl.int64) * stride * D
    start = (split - tl.where(in_ring, 0, ring_programs)) * per
    end = tl.where(attends, tl.minimum(start + per, extent), 0)
    return slot, attends, head, split, in_ring, first, length, offset, extent, own, start, end


@jit
def combine(part, context, head, D: tl.constexpr, S: tl.constexpr, SP: tl.constexpr):
    """The attention of one head from its partial results."""
    row, columns = tl.arange(0, SP), tl.arange(0, D)
    place = part + (head * S + row) * (D + 2)
    m = tl.load(place + D, mask=row < S, other=-float("inf"), cache_modifier=".cg")
    s = tl.load(place + D + 1, mask=row < S, other=0.0, cache_modifier=".cg")
    a = tl.load(place[:, None] + columns[None, :], mask=(row < S)[:, None], other=0.0, cache_modifier=".cg")
    weight = tl.exp2(m - tl.max(m, 0))
    y = tl.sum(a * weight[:, None], 0) / tl.sum(s * weight, 0)
    tl.store(context + head * D + columns, y.to(context.dtype.element_ty))
