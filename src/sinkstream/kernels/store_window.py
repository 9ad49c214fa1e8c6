"""What stays of a chunk goes to its slots: keys and values of the tokens that the window still holds, in a ring."""

import torch

from sinkstream.kernels.attention_prefill import Band
from sinkstream.kernels.runtime import FLOAT_DTYPES, check_tensor, jit, launch, tl, triton, use_triton

TOKENS = 16  # of one program


@jit(do_not_specialize=["ring"])
def _store_window_kernel(
    key_ptr, value_ptr, keys_ptr, values_ptr, band_ptr, key_row, key_head, value_row, value_head, slot_stride,
    head_stride, ring, D: tl.constexpr, SIZE: tl.constexpr, TM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (tile of tokens, key-value head); what does not stay is neither read nor written."""
    tokens, stays, slot = tl.load(band_ptr), tl.load(band_ptr + 4), tl.load(band_ptr + 5)
    head = tl.program_id(1).to(tl.int64)
    rows, columns = tl.program_id(0) * TM + tl.arange(0, TM), tl.arange(0, SIZE)[None, :]
    mask = ((rows >= stays) & (rows < tokens))[:, None] & (columns < D)
    place = head * head_stride + ((slot + rows) % ring).to(tl.int64)[:, None] * slot_stride + columns
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
    implementation: str | None = None,
) -> None:
    """Write keys and values of the chunk's tokens from `band.stays` on to their slots of the ring.

    Parameters
    ----------
    key, value : Tensor, (tokens, kv_heads, head_dim)
        May be strided, but for the last axis.
    keys, values : Tensor, (kv_heads, ring, head_dim)
        Written in place. May be strided, but for the last axis.
    band : Band
        Of these tokens.
    implementation : {"auto", "triton", "torch"}, optional

    Raises
    ------
    ValueError
        Naming the argument that the op cannot serve and what is accepted.
    """
    tokens, heads, dim = key.shape
    ring = keys.shape[1]
    for name, part, shape in (
        ("key", key, (band.tokens, heads, dim)),
        ("value", value, (band.tokens, heads, dim)),
        ("keys", keys, (heads, None, dim)),
        ("values", values, (heads, ring, dim)),
    ):
        check_tensor(name, part, shape, dtypes=FLOAT_DTYPES, device=key.device, contiguous=False)
    if tokens - band.stays > ring:
        raise ValueError(f"{tokens - band.stays} tokens stay; accepted: at most {ring}, the slots of the ring")
    if use_triton(implementation, key) and tokens > band.stays:
        launch(
            _store_window_kernel, (-(-tokens // TOKENS), heads), key, value, keys, values, band.table, key.stride(0),
            key.stride(1), value.stride(0), value.stride(1), keys.stride(1), keys.stride(0), ring, D=dim,
            SIZE=triton.next_power_of_2(dim), TM=TOKENS, num_warps=4, pdl=False,
        )  # fmt: skip
        return
    row = band.stays
    while row < tokens:
        slot = (band.slot + row) % ring
        count = min(tokens - row, ring - slot)
        for new, slots in ((key, keys), (value, values)):
            slots[:, slot : slot + count].copy_(new[row : row + count].transpose(0, 1))
        row += count
