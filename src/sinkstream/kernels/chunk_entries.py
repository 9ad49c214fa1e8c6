"""Keys and values of a chunk in the order that choices of pinned tokens are made in, and those of the tokens chosen.

Sources are the pinned tokens before the chunk, then the window from its oldest token on, the chunk's own tokens behind;
only so many of these as may leave within the chunk, for no other is chosen. One kernel puts them in order, and one
takes the sets that were chosen, of which the last goes to the pinned slots: short chunks are bound by launches.
"""

from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from sinkstream.kernels.attention_prefill import turned
from sinkstream.kernels.band import Band
from sinkstream.kernels.online_softmax import rotated
from sinkstream.kernels.runtime import FLOAT_DTYPES, check_tensor, jit, launch, tl, triton, use_triton

ROWS = 16  # of one program


@dataclass(frozen=True)
class Entries:
    """What one layer holds of a stream while a chunk is computed.

    Attributes
    ----------
    window : Tensor, (kv_heads, entries, head_dim)
        Keys of the window and of the chunk, as they were rotated.
    sources : Tensor, (kv_heads, pinned + leaving, head_dim), float32
        Keys of the pinned tokens and of the first entries, not rotated.
    values : Tensor, (kv_heads, pinned + leaving, head_dim)
    sinks : Tensor, (kv_heads, sinks, head_dim)
        Keys in the slots before those of the pinned tokens that change.
    totals : Tensor or None, (kv_heads, pinned + entries), float32
        What the sources had received before the chunk; 0 for its own tokens. Where it is read.
    """

    window: torch.Tensor
    sources: torch.Tensor
    values: torch.Tensor
    sinks: torch.Tensor
    totals: torch.Tensor | None = None


@dataclass(frozen=True)
class PinnedSlots:
    """Where the tokens that are pinned after a chunk go, of one layer.

    Attributes
    ----------
    keys, values : Tensor, (rows, kv_heads, pinned, head_dim)
        Row `band.row` is written. Rows and heads may be strided, alike in both.
    raw : Tensor, (rows, kv_heads, pinned, head_dim), float32
        As `keys`, not rotated.
    sources : Tensor, (kv_heads, pinned), int64
        Which sources they are.
    band : Band
        Of the chunk.
    """

    keys: torch.Tensor
    values: torch.Tensor
    raw: torch.Tensor
    sources: torch.Tensor
    band: Band


@jit(do_not_specialize=["pinned", "entries", "leaving", "ring", "pinned_slot", "ring_slot"])
def _read_entries_kernel(
    keys_ptr, values_ptr, pinned_ptr, key_ptr, value_ptr, angle_ptr, band_ptr, window_ptr, sources_ptr, out_ptr,
    sinks_ptr, total_ptr, before_ptr, keys_row, keys_head, values_row, values_head, pinned_row, pinned_head, key_row,
    key_head, value_row, value_head, total_row, total_head, pinned, entries, leaving, ring, pinned_slot, ring_slot,
    D: tl.constexpr, RD: tl.constexpr, SIZE: tl.constexpr, TM: tl.constexpr, TOTALS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (tile of sources, key-value head)."""
    head, held_row = tl.program_id(1).to(tl.int64), tl.load(band_ptr + 6).to(tl.int64)
    start, length = tl.load(band_ptr + 2), tl.load(band_ptr + 3)
    end = tl.minimum(length + tl.load(band_ptr), entries)
    source, columns = tl.program_id(0) * TM + tl.arange(0, TM), tl.arange(0, SIZE)[None, :]
    entry = source - pinned
    is_pinned, is_past = source < pinned, (source >= pinned) & (entry < length)
    is_own = (entry >= length) & (entry < end)
    wide, leaves = columns < D, entry < leaving
    slot = tl.where(is_pinned, pinned_slot + source, ring_slot + (start + tl.maximum(entry, 0)) % ring)
    kept_keys = keys_ptr + held_row * keys_row + head * keys_head
    kept_values = values_ptr + held_row * values_row + head * values_head
    pinned_keys = pinned_ptr + held_row * pinned_row + head * pinned_head
    row = (entry - length).to(tl.int64)[:, None]
    past = kept_keys + slot.to(tl.int64)[:, None] * D
    mine = key_ptr + row * key_row + head * key_head
    of_past, of_own = is_past[:, None] & wide, is_own[:, None] & wide
    key = tl.load(past + columns, mask=of_past, other=0.0)
    key = tl.where(of_own, tl.load(mine + columns, mask=of_own, other=0.0), key)
    tl.store(window_ptr + (head * entries + entry)[:, None] * D + columns, key, mask=of_past | of_own)
    if tl.program_id(0) * TM < pinned + leaving:  # some of the tile may be chosen
        held, own = ((is_pinned | is_past) & leaves)[:, None] & wide, (is_own & leaves)[:, None] & wide
        value = tl.load(kept_values + slot.to(tl.int64)[:, None] * D + columns, mask=held, other=0.0)
        new = tl.load(value_ptr + row * value_row + head * value_head + columns, mask=own, other=0.0)
        place = (head * (pinned + leaving) + source)[:, None] * D + columns
        tl.store(out_ptr + place, tl.where(own, new, value), mask=held | own)
        angles = angle_ptr + tl.minimum(tl.maximum(entry, 0), entries - 1)[:, None] * RD  # loaded without a mask
        back = rotated(past, columns, held & of_past, angles, past, 0.0, D, RD, False, SIZE)
        back = tl.where(own, rotated(mine, columns, own, angles, mine, 0.0, D, RD, False, SIZE), back)
        raw = tl.load(pinned_keys + source[:, None] * D + columns, mask=is_pinned[:, None] & wide)
        tl.store(sources_ptr + place, tl.where(is_pinned[:, None], raw, back), mask=held | own)
    if tl.program_id(0) * TM < pinned_slot:
        is_sink = (source < pinned_slot)[:, None] & wide
        sink = tl.load(kept_keys + source[:, None] * D + columns, mask=is_sink)
        tl.store(sinks_ptr + (head * pinned_slot + source)[:, None] * D + columns, sink, mask=is_sink)
    if TOTALS:
        total = total_ptr + held_row * total_row + head * total_head + slot
        given = tl.load(total, mask=is_pinned | is_past, other=0.0)
        tl.store(before_ptr + head * (pinned + entries) + source, given, mask=source < pinned + entries)


@jit(do_not_specialize=["sources", "rows", "pinned"])
def _take_sets_kernel(
    source_ptr, value_ptr, chosen_ptr, frame_ptr, keys_ptr, values_ptr, slot_keys_ptr, slot_values_ptr, raw_ptr,
    taken_ptr, band_ptr, slot_row, slot_head, raw_row, raw_head, sources, rows, pinned, D: tl.constexpr,
    RD: tl.constexpr, SIZE: tl.constexpr, TM: tl.constexpr, STORES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (tile of chosen tokens, key-value head). STORES: those of the last set go to their slots, too."""
    head = tl.program_id(1).to(tl.int64)
    row, columns = tl.program_id(0) * TM + tl.arange(0, TM), tl.arange(0, SIZE)[None, :]
    here = (row < rows)[:, None] & (columns < D)
    taken = tl.load(chosen_ptr + head * rows + row, mask=row < rows, other=0)
    source = head * sources + taken
    angles = frame_ptr + (row % pinned)[:, None] * RD
    key = rotated(source_ptr + source[:, None] * D, columns, here, angles, source_ptr, 0.0, D, RD, False, SIZE)
    place = (head * rows + row)[:, None] * D + columns
    key = key.to(keys_ptr.dtype.element_ty)
    tl.store(keys_ptr + place, key, mask=here)
    value = tl.load(value_ptr + source[:, None] * D + columns, mask=here, other=0.0)
    tl.store(values_ptr + place, value, mask=here)
    if STORES:
        index, held_row = row - (rows - pinned), tl.load(band_ptr + 6).to(tl.int64)
        last = (index >= 0)[:, None] & here
        slot = held_row * slot_row + head * slot_head + index[:, None] * D + columns
        tl.store(slot_keys_ptr + slot, key, mask=last)
        tl.store(slot_values_ptr + slot, value, mask=last)
        raw = tl.load(source_ptr + source[:, None] * D + columns, mask=last)
        tl.store(raw_ptr + held_row * raw_row + head * raw_head + index[:, None] * D + columns, raw, mask=last)
        tl.store(taken_ptr + head * pinned + index, taken.to(tl.int64), mask=(index >= 0) & (row < rows))


def read_entries(
    keys: torch.Tensor,
    values: torch.Tensor,
    pinned_keys: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    angles: torch.Tensor,
    band: Band,
    *,
    pinned_slot: int,
    ring_slot: int,
    leaving: int,
    totals: torch.Tensor | None = None,
    implementation: str | None = None,
) -> Entries:
    """Put the keys and values of one stream and one layer in order.

    Parameters
    ----------
    keys, values : Tensor, (rows, kv_heads, slots, head_dim)
        Rows and heads may be strided.
    pinned_keys : Tensor, (rows, kv_heads, pinned, head_dim), float32
        Not rotated. Rows and heads may be strided.
    key, value : Tensor, (tokens, kv_heads, head_dim)
        Of the chunk; may be strided, but for the last axis.
    angles : Tensor, (entries, 2, rotary_dim / 2), float32
        Cosine and sine that turn every entry of the window and the chunk back to position 0; more of them than the
        chunk has entries leave room behind.
    band : Band
        Of the chunk: the row, where in the ring the oldest entry lies, and how many lie there.
    pinned_slot, ring_slot : int
        Slots of the first pinned token, which the sinks lie before, and of the ring's first; the ring ends with the
        slots.
    leaving : int
        Entries, from the oldest on, that may be chosen.
    totals : Tensor or None, (rows, kv_heads, slots), float32
        Attention that every slot has received, where it is read. Rows and heads may be strided.
    implementation : {"auto", "triton", "torch"}, optional

    Raises
    ------
    ValueError
        Naming the argument that the op cannot serve and what is accepted.
    """
    (rows, kv_heads, slots, dim), pinned, entries = keys.shape, pinned_keys.shape[2], len(angles)
    start, length, ring = band.start, band.length, max(1, slots - ring_slot)  # of no slots, where the window is empty
    for name, part, shape, dtypes in (
        ("values", values, (rows, kv_heads, slots, dim), (keys.dtype,)),
        ("pinned_keys", pinned_keys, (rows, kv_heads, None, dim), (torch.float32,)),
        ("key", key, (band.rows, kv_heads, dim), (keys.dtype,)),
        ("value", value, (band.rows, kv_heads, dim), (keys.dtype,)),
        ("angles", angles, (entries, 2, None), (torch.float32,)),
    ):
        check_tensor(name, part, shape, dtypes=dtypes, device=keys.device, contiguous=False)
    if not 0 <= length <= slots - ring_slot or not 0 <= start < ring or not 0 <= pinned_slot <= ring_slot - pinned:
        raise ValueError(
            f"start={start}, length={length}, pinned_slot={pinned_slot} with {slots - ring_slot} slots of the ring"
            f" behind {ring_slot}; accepted: start < {ring}, length <= {slots - ring_slot}, and {pinned} pinned slots"
            " before the ring"
        )
    if length + band.tokens > entries or not 0 <= leaving <= entries:
        raise ValueError(
            f"{length} + {band.tokens} entries, leaving={leaving}, and {entries} angles; accepted: as many at most"
        )
    if totals is not None:
        known = (torch.float32, torch.float64)
        check_tensor("totals", totals, (rows, kv_heads, slots), dtypes=known, device=keys.device, contiguous=False)
    if not use_triton(implementation, keys) or keys.dtype not in FLOAT_DTYPES:
        found = _read_entries_twin(keys, values, pinned_keys, key, value, angles, band, pinned_slot, ring_slot, leaving)
        if totals is None:
            return found
        frame = slice(pinned_slot, pinned_slot + pinned)
        return replace(found, totals=_totals_twin(totals[band.row], band, frame, ring_slot, entries))
    assert all(part.stride(2) == dim for part in (keys, values, pinned_keys)), "the slots of a head are contiguous"
    window = keys.new_empty(kv_heads, entries, dim)
    found = keys.new_empty(kv_heads, pinned + leaving, dim)
    sources, sinks = torch.empty(found.shape, device=keys.device), keys.new_empty(kv_heads, pinned_slot, dim)
    before = None if totals is None else totals.new_empty(kv_heads, pinned + entries)
    count = max(pinned + entries, pinned_slot)
    launch(
        _read_entries_kernel, (-(-count // ROWS), kv_heads), keys, values, pinned_keys, key, value,
        angles.contiguous(), band.table, window, sources, found, sinks, sources if totals is None else totals,
        sources if before is None else before, *keys.stride()[:2], *values.stride()[:2], *pinned_keys.stride()[:2],
        key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        *((0, 0) if totals is None else totals.stride()[:2]), pinned, entries, leaving, ring, pinned_slot, ring_slot,
        D=dim, RD=2 * angles.shape[2], SIZE=triton.next_power_of_2(dim), TM=ROWS, TOTALS=totals is not None,
        num_warps=4, pdl=False,
    )  # fmt: skip
    return Entries(window, sources, found, sinks, before)


def _read_entries_twin(keys, values, pinned_keys, key, value, angles, band: Band, pinned_slot, ring_slot, leaving):
    """The twin of the kernel; entries behind those of the chunk are zero."""
    pinned, ring = pinned_keys.shape[2], max(1, keys.shape[2] - ring_slot)
    index = ring_slot + (band.start + torch.arange(band.length, device=keys.device)) % ring
    room = (0, 0, 0, len(angles) - band.length - band.tokens)
    parts = ((keys, key), (values, value))
    found = [[held[band.row].index_select(1, index), new[: band.tokens].transpose(0, 1)] for held, new in parts]
    window, theirs = (F.pad(torch.cat(part, 1), room) for part in found)
    raw = turned(window[:, :leaving].float(), angles[:leaving])
    frame = values[band.row, :, pinned_slot : pinned_slot + pinned]
    sources, sinks = torch.cat([pinned_keys[band.row], raw], 1), keys[band.row, :, :pinned_slot]
    return Entries(window, sources, torch.cat([frame, theirs[:, :leaving]], 1), sinks)


def _totals_twin(held: torch.Tensor, band: Band, frame: slice, ring_slot: int, entries: int) -> torch.Tensor:
    """The twin of the kernel for what one stream's slots ``(kv_heads, slots)`` have received."""
    ring = max(1, held.shape[1] - ring_slot)
    past = held.index_select(1, ring_slot + (band.start + torch.arange(band.length, device=held.device)) % ring)
    return torch.cat([held[:, frame], F.pad(past, (0, entries - band.length))], 1)


def take_sets(
    entries: Entries,
    chosen: torch.Tensor,
    frame: torch.Tensor,
    *,
    slots: PinnedSlots | None = None,
    implementation: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys, rotated to their places in the frame of pinned keys, and values of the tokens of several sets.

    Parameters
    ----------
    entries : Entries
    chosen : Tensor, (kv_heads, sets, pinned), int32
        Sources.
    frame : Tensor, (pinned, 2, rotary_dim / 2), float32
        Cosine and sine of the places.
    slots : PinnedSlots or None
        Where the tokens of the last set are written, if anywhere.
    implementation : {"auto", "triton", "torch"}, optional

    Returns
    -------
    keys, values : Tensor, (kv_heads, sets * pinned, head_dim), in the dtype of the window
    """
    kv_heads, sets, pinned = chosen.shape
    dim, rows, window = entries.window.shape[2], sets * pinned, entries.window
    check_tensor("chosen", chosen, (len(window), None, len(frame)), dtypes=(torch.int32,), device=window.device)
    if not use_triton(implementation, window) or window.dtype not in FLOAT_DTYPES:
        index = chosen.flatten(1).long()[..., None].expand(-1, -1, dim)
        raw = entries.sources.gather(1, index).unflatten(1, (sets, pinned))
        keys, values = turned(raw, frame).flatten(1, 2).to(window.dtype), entries.values.gather(1, index)
        if slots is not None:
            _store_last(slots, keys[:, -pinned:], values[:, -pinned:], raw[:, -1], chosen[:, -1])
        return keys, values
    keys, values = window.new_empty(kv_heads, rows, dim), window.new_empty(kv_heads, rows, dim)
    where: tuple[torch.Tensor | int, ...] = (keys, values, entries.sources, chosen, chosen, 0, 0, 0, 0)
    if slots is not None:
        assert slots.keys.stride() == slots.values.stride(), "keys and values lie in the same order"
        assert slots.keys.stride(2) == slots.raw.stride(2) == dim, "the slots of a head are contiguous"
        where = (
            slots.keys, slots.values, slots.raw, slots.sources, slots.band.table, *slots.keys.stride()[:2],
            *slots.raw.stride()[:2],
        )  # fmt: skip
    launch(
        _take_sets_kernel, (-(-rows // ROWS), kv_heads), entries.sources, entries.values, chosen, frame.contiguous(),
        keys, values, *where, entries.sources.shape[1], rows, pinned, D=dim, RD=2 * frame.shape[2],
        SIZE=triton.next_power_of_2(dim), TM=ROWS, STORES=slots is not None, num_warps=4, pdl=False,
    )  # fmt: skip
    return keys, values


def _store_last(slots: PinnedSlots, keys, values, raw, sources) -> None:
    """The twin of the kernel for the slots."""
    slots.sources.copy_(sources)
    for held, new in ((slots.keys, keys), (slots.values, values), (slots.raw, raw)):
        held.index_copy_(0, slots.band.device_row, new[None])
