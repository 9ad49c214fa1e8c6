"""What the queries of a chunk that chooses pinned tokens give to the tokens that stay, once all sets are chosen."""

import math

import torch

from sinkstream.kernels.band import SCALARS, Band
from sinkstream.kernels.pinned_sets import COLUMNS, ROWS, TILE, Layer, PinnedSets, computed_by_kernel
from sinkstream.kernels.pinned_sets_kernels import window_received_kernel
from sinkstream.kernels.runtime import dot_kind, launch

TWIN_TILE = 256  # keys of one tile of the twin


def window_received(
    layer: Layer, sums: torch.Tensor, band: Band, *, scaling: float, implementation: str | None = None
) -> torch.Tensor:
    """What the queries of a chunk give to the window entries that stay: all of them see these from themselves on.

    Parameters
    ----------
    layer : Layer
        The queries are those of the chunk.
    sums : Tensor, (kv_heads, queries, group), float32
        As `PinnedSets.sums`.
    band : Band
        Of the chunk.

    Returns
    -------
    Tensor, (kv_heads, entries), float32
        Mean over the query heads of a kv head; 0 for the entries that leave.
    """
    if not computed_by_kernel(layer, implementation):
        return window_received_twin(layer, sums, band, scaling)
    out = torch.empty(len(layer.window), layer.window.shape[1], device=sums.device)
    _receive(layer, sums, band, scaling, (out, out, out, 0, 0, 0), (0, 1, 0, 0), stores=False)
    return out


def store_received(
    layer: Layer,
    found: PinnedSets,
    band: Band,
    totals: torch.Tensor,
    *,
    pinned_slot: int,
    ring_slot: int,
    scaling: float,
    implementation: str | None = None,
) -> None:
    """Write what every token that stays has received to its slot; slots of others are left alone.

    Parameters
    ----------
    layer : Layer
        The queries are those of the chunk.
    found : PinnedSets
    band : Band
        Of the chunk.
    totals : Tensor, (rows, kv_heads, slots), float32
        Row `band.row` is written in place. Rows and heads may be strided.
    pinned_slot, ring_slot : int
        Slots of the first pinned token and of the ring's first; the ring ends with the slots.
    """
    assert layer.totals is not None, "where attention is accumulated"
    pinned, ring = found.totals.shape[2], totals.shape[2] - ring_slot
    if not computed_by_kernel(layer, implementation):
        device, (first, end) = totals.device, (band.length + int(band.first[-1]), band.length + band.tokens)
        given = layer.totals[:, pinned:] + window_received_twin(layer, found.sums, band, scaling)
        held = totals[band.row]
        held[:, pinned_slot : pinned_slot + pinned] = found.totals[:, -1]
        held[:, ring_slot + (band.start + torch.arange(first, end, device=device)) % ring] = given[:, first:end]
        return
    last = found.totals[:, -1]
    where = (totals, layer.totals, last, *totals.stride()[:2], last.stride(0))
    _receive(layer, found.sums, band, scaling, where, (pinned, ring, pinned_slot, ring_slot), stores=True)


def _receive(layer: Layer, sums, band: Band, scaling: float, where: tuple, slots: tuple, *, stores: bool) -> None:
    """Launch the kernel; `where` and `slots` are what it writes to."""
    (kv_heads, entries, dim), (heads, queries, _) = layer.window.shape, layer.queries.shape
    out, before, last, out_row, out_head, last_head = where
    launch(
        window_received_kernel, (-(-max(entries, slots[0]) // TILE), kv_heads), layer.queries, layer.window, sums,
        band.table, out, before, last, *layer.queries.stride()[:2], out_row, out_head, last_head, queries, entries,
        *slots, scaling / math.log(2), G=heads // kv_heads, D=dim, C=min(dim & -dim, COLUMNS), BM=ROWS, BT=TILE,
        SCALARS=SCALARS, KIND=dot_kind(layer.window.dtype), STORES=stores, num_warps=4, pdl=False,
    )  # fmt: skip


def window_received_twin(layer: Layer, sums: torch.Tensor, band: Band, scaling: float) -> torch.Tensor:
    """The twin of the kernel, a tile of window entries at a time."""
    (kv_heads, entries, _), queries = layer.window.shape, band.tokens
    heads, first = layer.queries[:, :queries].to(sums.dtype), band.length + int(band.first[-1])
    heads, end = heads.unflatten(0, (kv_heads, -1)), band.length + queries
    found = [sums.new_zeros(kv_heads, first)]
    whole = sums[:, :queries].transpose(1, 2)[..., None]
    own = band.length + torch.arange(queries, device=sums.device)[:, None]
    for begin in range(first, end, TWIN_TILE):
        entry = torch.arange(begin, min(begin + TWIN_TILE, end), device=sums.device)
        z = heads @ layer.window[:, None, begin : begin + len(entry)].to(sums.dtype).mT * (scaling / math.log(2))
        found.append((z - whole).exp2().masked_fill(entry > own, 0.0).sum(2).mean(1))
    return torch.cat([*found, sums.new_zeros(kv_heads, entries - end)], -1)
