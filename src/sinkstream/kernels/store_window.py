"""What stays of a chunk goes to its slots: the sinks to slots of their own, and what the window holds to a ring."""

import torch

from sinkstream.kernels.band import Band
from sinkstream.kernels.runtime import FLOAT_DTYPES, check_tensor, jit, launch, tl, triton, use_triton

TOKENS = 16  # of one program


@jit(do_not_specialize=["sinks", "ring"])
def _store_window_kernel(
    key_ptr, value_ptr, keys_ptr, values_ptr, band_ptr, key_row, key_head, value_row, value_head, row_stride,
    head_stride, slot_stride, sinks, ring, D: tl.constexpr, SIZE: tl.constexpr, TM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (tile of tokens, key-value head); what does not stay is neither read nor written."""
    tokens, past, stays, slot = (
        tl.load(band_ptr), tl.load(band_ptr + 1), tl.load(band_ptr + 4), tl.load(band_ptr + 5),
    )  # fmt: skip
    held, head = tl.load(band_ptr + 6).to(tl.int64), tl.program_id(1).to(tl.int64)
    rows, columns = tl.program_id(0) * TM + tl.arange(0, TM), tl.arange(0, SIZE)[None, :]
    is_sink = past + rows < tl.minimum(sinks, tl.load(band_ptr + 8))
    mask = ((rows < tokens) & (is_sink | (rows >= stays)))[:, None] & (columns < D)
    slots = tl.where(is_sink, past + rows, sinks + (slot + rows) % ring).to(tl.int64)
    place = held * row_stride + head * head_stride + slots[:, None] * slot_stride + columns
    key = tl.load(key_ptr + rows.to(tl.int64)[:, None] * key_row + head * key_head + columns, mask=mask)
    value = tl.load(value_ptr + rows.to(tl.int64)[:, None] * value_row + head * value_head + columns, mask=mask)
    tl.store(keys_ptr + place, key, mask=mask)
    tl.store(values_ptr + place, value, mask=mask)


def store_window(
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    band: Band,
    *,
    sinks: int = 0,
    implementation: str | None = None,
) -> None:
    """Write keys and values of a chunk's tokens to their slots: of the stream's sinks, and from `band.stays` on.

    Parameters
    ----------
    key, value : Tensor, (tokens, kv_heads, head_dim)
        May be strided, but for the last axis. Padded tokens, which come last, are not written.
    keys, values : Tensor, (rows, kv_heads, sinks + ring, head_dim)
        Row `band.row` is written in place. May be strided, but for the last axis.
    band : Band
        Of these tokens.
    sinks : int
        Slots in front of the ring, for the first tokens of the stream (the first `band.sinks`).
    implementation : {"auto", "triton", "torch"}, optional

    Raises
    ------
    ValueError
        Naming the argument that the op cannot serve and what is accepted.
    """
    _, heads, dim = key.shape
    ring = keys.shape[2] - sinks
    for name, part, shape in (
        ("key", key, (band.rows, heads, dim)),
        ("value", value, (band.rows, heads, dim)),
        ("keys", keys, (None, heads, None, dim)),
        ("values", values, tuple(keys.shape)),
    ):
        check_tensor(name, part, shape, dtypes=FLOAT_DTYPES, device=key.device, contiguous=False)
    if band.tokens - band.stays > ring:
        raise ValueError(f"{band.tokens - band.stays} tokens stay; accepted: at most {ring}, the slots of the ring")
    if not 0 <= band.row < len(keys):
        raise ValueError(f"row={band.row}; accepted: 0 to {len(keys) - 1}")
    if not use_triton(implementation, key):
        for new, slots in ((key, keys), (value, values)):
            _store(new, slots[band.row], band, sinks, ring)
        return
    assert keys.stride() == values.stride(), "keys and values lie in the same order"
    launch(
        _store_window_kernel, (-(-band.rows // TOKENS), heads), key, value, keys, values, band.table, key.stride(0),
        key.stride(1), value.stride(0), value.stride(1), *keys.stride()[:3], sinks, ring, D=dim,
        SIZE=triton.next_power_of_2(dim), TM=TOKENS, num_warps=4, pdl=False,
    )  # fmt: skip


def _store(new: torch.Tensor, slots: torch.Tensor, band: Band, sinks: int, ring: int) -> None:
    """The twin of the kernel, for keys or values of one row."""
    first = max(0, min(min(sinks, band.sinks) - band.past, band.tokens))
    slots[:, band.past : band.past + first].copy_(new[:first].transpose(0, 1))
    row = band.stays
    while row < band.tokens:
        slot = (band.slot + row) % ring
        count = min(band.tokens - row, ring - slot)
        slots[:, sinks + slot : sinks + slot + count].copy_(new[row : row + count].transpose(0, 1))
        row += count
