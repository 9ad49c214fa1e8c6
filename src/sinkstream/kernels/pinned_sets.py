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
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from sinkstream.kernels.attention_prefill import turned
from sinkstream.kernels.chunk_entries import Entries
from sinkstream.kernels.pinned_sets_kernels import choose_sets_kernel, window_sums_kernel
from sinkstream.kernels.runtime import (
    HALF_DTYPES,
    check_tensor,
    dot_kind,
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
class Layer(Entries):
    """What the choice of one layer reads: its entries, sources of the window as many as leave or more, and queries.

    Attributes
    ----------
    queries : Tensor, (query_heads, any, head_dim)
        Rotated for the window. May be strided, but for the last axis.
    """

    queries: torch.Tensor = field(kw_only=True)

    @classmethod
    def of(cls, entries: Entries, queries: torch.Tensor) -> "Layer":
        """Entries with their queries."""
        return cls(**vars(entries), queries=queries)


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


def pinned_sets(layer: Layer, groups: Groups, *, scaling: float, implementation: str | None = None) -> PinnedSets:
    """Choose the pinned tokens of every prune of a chunk, as `select` does by the attention that candidates receive.

    Parameters
    ----------
    layer : Layer
    groups : Groups
        Where it accumulates, the queries are those of the chunk, all of them.
    scaling : float
        Of the scores.
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
    common = {**shapes, "SPLITS": splits, "FIELDS": FIELDS, "KIND": dot_kind(layer.window.dtype), "pdl": False}
    strides, scale = layer.queries.stride()[:2], scaling / math.log(2)
    parts = torch.empty(kv_heads, sizes.rows, group, splits, device=device)
    if sizes.rows:
        launch(
            window_sums_kernel, (sizes.groups, kv_heads * splits, tiles), layer.queries, layer.sinks, layer.window,
            groups.table, groups.shift, parts, *strides, entries, layer.sinks.shape[1], layer.sinks.stride(0),
            sizes.rows, scale, BM=tile, num_warps=4, **common,
        )  # fmt: skip
    chosen = torch.empty(kv_heads, groups.sets, pinned, dtype=torch.int32, device=device)
    totals, sums = torch.empty(chosen.shape, device=device), torch.empty(kv_heads, sizes.rows, group, device=device)
    width = pinned + sizes.leaving
    scores = torch.empty(kv_heads, width, device=device)
    launch(
        choose_sets_kernel, (kv_heads,), layer.queries, layer.window, layer.sources, groups.table, groups.shift,
        groups.frame, parts, sums, scores if layer.totals is None else layer.totals, scores, chosen, totals, *strides,
        groups.sets, entries, layer.sources.shape[1] - pinned, sizes.rows, pinned, width, scale,
        BM=min(CHOOSING_ROWS, most), ADDS=groups.accumulates, ONE=pinned <= TILE, num_warps=8, **common,
    )  # fmt: skip
    return PinnedSets(chosen, totals, sums)


def window_splits(programs: int, entries: int, processors: int) -> int:
    """Over how many programs the window is split for each of so many; a power of four, so that few are compiled."""
    splits = 1
    while splits < MOST_SPLITS and 4 * splits * programs <= PROGRAMS * processors and splits * TILE < entries:
        splits *= 4
    return splits


def computed_by_kernel(layer: Layer, implementation: str | None) -> bool:
    """Whether kernels compute the choices of a layer."""
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
    return computed_by_kernel(layer, implementation)


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


def _best(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """Indices of the `keep` highest scores, ascending; of equal ones the later, as policies select."""
    order = scores.flip(-1).sort(dim=-1, descending=True, stable=True).indices[..., :keep]
    return (scores.shape[-1] - 1 - order).sort(dim=-1).values


def _taken(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return rows.gather(1, index.long()[..., None].expand(-1, -1, rows.shape[2]))
