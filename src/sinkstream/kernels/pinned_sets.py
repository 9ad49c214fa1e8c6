"""Which tokens stay pinned at every prune inside a chunk of a prompt, of one layer.

What stays pinned in a layer follows from the queries and keys of that layer alone, and where the prunes are is known.
So a chunk crosses them: its products are computed once, and between them only this choice goes prune by prune. All
that does not depend on it, the softmax over the window, is computed beforehand for all queries at once.

Entries of the window are counted from its oldest token before the chunk on, the chunk's own tokens behind; sources are
the pinned tokens before the chunk and then these entries. Queries are read in groups, one for each prune: the latest
ones before it, or all since the prune before.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from sinkstream.kernels.attention_prefill import turned
from sinkstream.kernels.band import SCALARS, Band
from sinkstream.kernels.pinned_sets_kernels import choose_sets_kernel, window_received_kernel, window_sums_kernel
from sinkstream.kernels.runtime import (
    HALF_DTYPES,
    check_tensor,
    dot_kind,
    has_dependent_launch,
    launch,
    multiprocessors,
    triton,
    use_triton,
)

ROWS = 64  # queries of one tile, those of several query heads
CHOOSING_ROWS = 128  # the same of the choice, which has one program a kv head
TILE = 64  # keys of one tile
MOST_SPLITS = 16  # of the window
PROGRAMS = 8  # of a multiprocessor, up to which the window is split: a program goes from tile to tile
TWIN_TILE = 256  # the same of the twin
COLUMNS = 64  # widest column chunk


class Group(NamedTuple):
    """The queries that are read before one prune of a chunk, or after the last one.

    Attributes
    ----------
    begin, queries : int
        The first query and how many, in `Layer.queries`.
    own : int
        Window entry of the first query's own token.
    first : int
        Oldest window entry that they see.
    leaving : int
        How many of the oldest entries leave then.
    sums : int
        Where the sums of their softmax lie.
    turn : int
        By how many positions they are turned back to where they stand in the frame of the pinned keys.
    """

    begin: int
    queries: int
    own: int
    first: int
    leaving: int
    sums: int
    turn: int


@dataclass(frozen=True)
class GroupSizes:
    """What the kernels of the groups of one chunk are launched for: as many, or more where a graph serves many chunks.

    Attributes
    ----------
    groups : int
    queries : int
        Of one group.
    leaving : int
        Entries that leave at one prune.
    rows : int
        Sums of one query head.
    """

    groups: int
    queries: int
    leaving: int
    rows: int

    @classmethod
    def of(cls, groups: Sequence[Group]) -> "GroupSizes":
        """Those of these groups and no others."""
        queries = max((group.queries for group in groups), default=0)
        leaving = max((group.leaving for group in groups), default=0)
        return cls(len(groups), queries, leaving, sum(group.queries for group in groups))

    def hold(self, other: "GroupSizes") -> bool:
        """Whether a chunk of other sizes can be computed in its place."""
        return (
            self.groups >= other.groups
            and self.queries >= other.queries
            and self.leaving >= other.leaving
            and self.rows >= other.rows
        )


@dataclass(frozen=True)
class Groups:
    """Queries that are read before each prune of a chunk; of several layers the same.

    Attributes
    ----------
    host : sequence of Group
    table : Tensor, (1 + sizes.groups, 7), int32
        On the device: how many groups and how many prunes, then the fields of each group.
    shift : Tensor, (sizes.groups, 2, rotary_dim / 2), float32
        Cosine and sine that turn their queries back.
    frame : Tensor, (pinned, 2, rotary_dim / 2), float32
        Cosine and sine of the place of every pinned token in that frame.
    sizes : GroupSizes
    accumulates : bool
        Whether a candidate is judged by what all queries gave it, the groups being all queries of the chunk, the last
        one without a prune; else by what its group gives it.
    """

    host: Sequence[Group]
    table: torch.Tensor
    shift: torch.Tensor
    frame: torch.Tensor
    sizes: GroupSizes
    accumulates: bool

    @property
    def prunes(self) -> int:
        """Groups that end with a prune: all of them, or all but the last."""
        return len(self.host) - self.accumulates

    @property
    def sets(self) -> int:
        """Sets of pinned tokens that are written; those behind the last prune are the last one again."""
        return 1 + self.sizes.groups - self.accumulates


FIELDS = len(Group._fields)
TURN = Group._fields.index("turn")


def group_rows(groups: Sequence[Group], accumulates: bool, most: int) -> torch.Tensor:
    """`Groups.table` on the host, of at most so many groups."""
    rows = np.zeros((1 + most, FIELDS), dtype=np.int32)
    rows[0, :2] = len(groups), len(groups) - accumulates
    if groups:
        rows[1 : 1 + len(groups)] = groups
    return torch.from_numpy(rows)


@dataclass(frozen=True)
class Layer:
    """What one layer holds of a stream while a chunk is computed.

    Attributes
    ----------
    queries : Tensor, (query_heads, any, head_dim)
        Rotated for the window. May be strided, but for the last axis.
    sinks : Tensor, (kv_heads, sinks, head_dim)
        In the frame of pinned keys. May be strided, but for the last axis.
    window : Tensor, (kv_heads, entries, head_dim)
        Rotated for the window.
    sources : Tensor, (kv_heads, pinned + any, head_dim), float32
        The first of the same, not rotated, behind the pinned tokens: as many as leave.
    totals : Tensor or None, (kv_heads, pinned + entries), float32
        Attention that the sources received before the chunk, where it accumulates.
    """

    queries: torch.Tensor
    sinks: torch.Tensor
    window: torch.Tensor
    sources: torch.Tensor
    totals: torch.Tensor | None = None


@dataclass(frozen=True)
class PinnedSets:
    """What stays pinned in the course of a chunk.

    Attributes
    ----------
    chosen : Tensor, (kv_heads, sets, pinned), int32
        Sources, oldest first: before the chunk, and after each prune.
    totals : Tensor, (kv_heads, sets, pinned), float32
        What these had received when they were chosen; of the last set at the end of the chunk. Only where it
        accumulates.
    sums : Tensor, (kv_heads, rows, group), float32
        Logarithm, base 2, of the sum of the softmax of every query. Only where it accumulates.
    """

    chosen: torch.Tensor
    totals: torch.Tensor
    sums: torch.Tensor


def pinned_sets(
    layer: Layer, groups: Groups, *, scaling: float, pdl: bool = False, implementation: str | None = None
) -> PinnedSets:
    """Choose the pinned tokens of every prune of a chunk, as `select` does by the attention that candidates receive.

    Parameters
    ----------
    layer : Layer
    groups : Groups
        Where it accumulates, the queries are those of the chunk, all of them.
    scaling : float
        Of the scores.
    pdl : bool
        Whether the first kernel may start before the previous one has ended; only where that is a kernel of ours. The
        second one may in any case.
    implementation : {"auto", "triton", "torch"}, optional
        float32, and heads whose size is no multiple of 16, take the twin.

    Raises
    ------
    ValueError
        Naming the argument that the op cannot serve and what is accepted.
    """
    kernel = _checked(layer, groups, implementation)
    kv_heads, entries, dim = layer.window.shape
    heads, pinned, device = len(layer.queries), len(groups.frame), layer.window.device
    group = heads // kv_heads
    if not kernel:
        return pinned_sets_twin(layer, groups, scaling)
    sizes = groups.sizes
    most = max(16, triton.next_power_of_2(sizes.queries * group))
    tile = min(ROWS, most)
    tiles = -(-sizes.queries * group // tile)
    splits = window_splits(sizes.groups * kv_heads * tiles, entries, multiprocessors(device))
    shapes = {"G": group, "D": dim, "C": min(dim & -dim, COLUMNS), "RD": 2 * groups.shift.shape[2], "BT": TILE}
    common = {**shapes, "SPLITS": splits, "FIELDS": FIELDS, "KIND": dot_kind(layer.window.dtype)}
    strides, scale = layer.queries.stride()[:2], scaling / math.log(2)
    parts = torch.empty(kv_heads, sizes.rows, group, splits, device=device)
    if sizes.rows:
        launch(
            window_sums_kernel, (sizes.groups, kv_heads * splits, tiles), layer.queries, layer.sinks, layer.window,
            groups.table, groups.shift, parts, *strides, entries, layer.sinks.shape[1], layer.sinks.stride(0),
            sizes.rows, scale, BM=tile, num_warps=4, pdl=pdl and has_dependent_launch(device), **common,
        )  # fmt: skip
    chosen = torch.empty(kv_heads, groups.sets, pinned, dtype=torch.int32, device=device)
    totals, sums = torch.empty(chosen.shape, device=device), torch.empty(kv_heads, sizes.rows, group, device=device)
    width = pinned + sizes.leaving
    scores = torch.empty(kv_heads, width, device=device)
    launch(
        choose_sets_kernel, (kv_heads,), layer.queries, layer.window, layer.sources, groups.table, groups.shift,
        groups.frame, parts, sums, scores if layer.totals is None else layer.totals, scores, chosen, totals, *strides,
        groups.sets, entries, layer.sources.shape[1] - pinned, sizes.rows, pinned, width, scale,
        BM=min(CHOOSING_ROWS, most), ADDS=groups.accumulates, ONE=pinned <= TILE, num_warps=8,
        pdl=bool(sizes.rows) and has_dependent_launch(device), **common,
    )  # fmt: skip
    return PinnedSets(chosen, totals, sums)


def window_splits(programs: int, entries: int, processors: int) -> int:
    """Over how many programs the window is split for each of so many; a power of four, so that few are compiled."""
    splits = 1
    while splits < MOST_SPLITS and 4 * splits * programs <= PROGRAMS * processors and splits * TILE < entries:
        splits *= 4
    return splits


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
    if not _kernel(layer, implementation):
        return window_received_twin(layer, sums, band, scaling)
    out = torch.empty(len(layer.window), layer.window.shape[1], device=sums.device)
    _receive(layer, sums, band, scaling, (out, out, out, 0, 0, 0), (0, 1, 0, 0), stores=False, pdl=False)
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
    pdl: bool = False,
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
    pdl : bool
        As for `pinned_sets`.
    """
    assert layer.totals is not None, "where attention is accumulated"
    pinned, ring = found.totals.shape[2], totals.shape[2] - ring_slot
    if not _kernel(layer, implementation):
        device, (first, end) = totals.device, (band.length + int(band.first[-1]), band.length + band.tokens)
        given = layer.totals[:, pinned:] + window_received_twin(layer, found.sums, band, scaling)
        held = totals[band.row]
        held[:, pinned_slot : pinned_slot + pinned] = found.totals[:, -1]
        held[:, ring_slot + (band.start + torch.arange(first, end, device=device)) % ring] = given[:, first:end]
        return
    last = found.totals[:, -1]
    where = (totals, layer.totals, last, *totals.stride()[:2], last.stride(0))
    _receive(layer, found.sums, band, scaling, where, (pinned, ring, pinned_slot, ring_slot), stores=True, pdl=pdl)


def _receive(
    layer: Layer, sums, band: Band, scaling: float, where: tuple, slots: tuple, *, stores: bool, pdl: bool
) -> None:
    """Launch the kernel; `where` and `slots` are what it writes to."""
    (kv_heads, entries, dim), (heads, queries, _) = layer.window.shape, layer.queries.shape
    out, before, last, out_row, out_head, last_head = where
    launch(
        window_received_kernel, (-(-max(entries, slots[0]) // TILE), kv_heads), layer.queries, layer.window, sums,
        band.table, out, before, last, *layer.queries.stride()[:2], out_row, out_head, last_head, queries, entries,
        *slots, scaling / math.log(2), G=heads // kv_heads, D=dim, C=min(dim & -dim, COLUMNS), BM=ROWS, BT=TILE,
        SCALARS=SCALARS, KIND=dot_kind(layer.window.dtype), STORES=stores, num_warps=4,
        pdl=pdl and has_dependent_launch(sums.device),
    )  # fmt: skip


def _kernel(layer: Layer, implementation: str | None) -> bool:
    window = layer.window
    return use_triton(implementation, window) and window.shape[2] % 16 == 0 and window.dtype in HALF_DTYPES


def _checked(layer: Layer, groups: Groups, implementation: str | None) -> bool:
    """Check the arguments; whether the kernel computes them."""
    window, kv_heads = layer.window, len(layer.window)
    dtypes, device, dim = (*HALF_DTYPES, torch.float32, torch.float64), window.device, window.shape[2]
    check_tensor("window", window, (None, None, None), dtypes=dtypes, device=device)
    queries = (None, None, dim)
    check_tensor("queries", layer.queries, queries, dtypes=(window.dtype,), device=device, contiguous=False)
    sinks = (kv_heads, None, dim)
    check_tensor("sinks", layer.sinks, sinks, dtypes=(window.dtype,), device=device, contiguous=False)
    pinned, known = len(groups.frame), (torch.float32, torch.float64)
    check_tensor("sources", layer.sources, (kv_heads, None, dim), dtypes=known, device=device)
    leave = sum(one.leaving for one in groups.host)
    if not pinned + leave <= layer.sources.shape[1] <= pinned + window.shape[1]:
        raise ValueError(
            f"{layer.sources.shape[1]} sources; accepted: {pinned + leave} to {pinned + window.shape[1]}, the pinned"
            " tokens and at least the entries that leave"
        )
    if len(layer.queries) % kv_heads:
        raise ValueError(f"{len(layer.queries)} query heads and {kv_heads} kv heads; accepted: a multiple")
    if groups.accumulates:
        if layer.totals is None:
            raise ValueError("totals is None; accepted: those of the sources, where attention is accumulated")
        shape = kv_heads, pinned + window.shape[1]
        check_tensor("totals", layer.totals, shape, dtypes=known, device=device)
    return _kernel(layer, implementation)


# ---- twins ----


def pinned_sets_twin(layer: Layer, groups: Groups, scaling: float) -> PinnedSets:
    """The twin of the kernels: plain PyTorch in float32 (float64 for float64 inputs), prune by prune."""
    work = torch.float64 if layer.window.dtype == torch.float64 else torch.float32
    kv_heads, pinned, adds = len(layer.window), len(groups.frame), groups.accumulates
    heads = layer.queries.to(work).unflatten(0, (kv_heads, -1))
    window, sinks, scale = layer.window.to(work), layer.sinks.to(work), scaling / math.log(2)
    chosen = [torch.arange(pinned, device=window.device).expand(kv_heads, -1)]
    received = window.new_zeros(kv_heads, pinned + window.shape[1]) if layer.totals is None else layer.totals
    before, totals, sums = received[:, pinned:], [received[:, :pinned]], list[torch.Tensor]()
    for index, (begin, count, own, first, leaving, *_) in enumerate(groups.host):
        query = heads[:, :, begin : begin + count]
        frame = turned(query, groups.shift[index : index + 1])
        raw = _taken(layer.sources, chosen[-1]).to(work)
        keys = turned(raw, groups.frame).to(layer.window.dtype).to(work)
        end, device = own + count, window.device
        seen = torch.arange(first, end, device=device) <= own + torch.arange(count, device=device)[:, None]
        parts = [frame @ part[:, None].mT for part in (sinks, keys)]
        parts.append((query @ window[:, None, first:end].mT).masked_fill(~seen, float("-inf")))
        z = torch.cat(parts, -1) * scale
        whole = torch.logsumexp(z * math.log(2), -1, keepdim=True) / math.log(2)
        sums.append(whole[..., 0].transpose(1, 2))
        given = (z - whole).exp2().sum(2).mean(1)[:, sinks.shape[1] :]
        score = given[:, : pinned + leaving]
        if adds:
            totals[-1] = totals[-1] + given[:, :pinned]
        if index == groups.prunes:
            break
        if adds:
            query, whole = heads[:, :, : begin + count], torch.cat(sums, 1).transpose(1, 2)[..., None]
            z = query @ window[:, None, first : first + leaving].mT * scale
            entry = torch.arange(first, first + leaving, device=device)
            seen = entry <= own - begin + torch.arange(begin + count, device=device)[:, None]
            given = (z - whole).exp2().masked_fill(~seen, 0.0).sum(2).mean(1)
            score = torch.cat([totals[-1], before[:, first : first + leaving] + given], -1)
        best = _best(score, pinned)
        entries = torch.arange(pinned + first, pinned + first + leaving, device=device).expand(kv_heads, -1)
        chosen.append(torch.cat([chosen[-1], entries], -1).gather(-1, best))
        totals.append(score.gather(-1, best))
    more = groups.sets - len(chosen)
    every = torch.cat(sums, 1) if sums else window.new_zeros(kv_heads, 0, heads.shape[1])
    every = F.pad(every, (0, 0, 0, groups.sizes.rows - every.shape[1]))
    return PinnedSets(
        torch.stack(chosen + chosen[-1:] * more, 1).int(), torch.stack(totals + totals[-1:] * more, 1), every
    )


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


def _best(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """Indices of the `keep` highest scores, ascending; of equal ones the later, as policies select."""
    order = scores.flip(-1).sort(dim=-1, descending=True, stable=True).indices[..., :keep]
    return (scores.shape[-1] - 1 - order).sort(dim=-1).values


def _taken(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return rows.gather(1, index.long()[..., None].expand(-1, -1, rows.shape[2]))
