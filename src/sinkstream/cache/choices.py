"""Chunks that cross prunes at which pinned tokens are chosen by attention: what each layer chooses, and among what.

Where such prunes are is known. Which tokens stay pinned in a layer follows from what the queries of that layer look at,
so the layers are computed one after the other over the whole chunk, and in each of them the choice goes prune by prune
(`kernels.pinned_sets`). Weights are read once a chunk, not once a prune.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sinkstream.cache.rope import Rope
from sinkstream.kernels.band import Band, SetColumns
from sinkstream.kernels.chunk_angles import angles_of
from sinkstream.kernels.chunk_entries import PinnedSlots, take_sets
from sinkstream.kernels.pinned_sets import (
    TURN,
    Group,
    Groups,
    GroupSizes,
    Layer,
    PinnedSets,
    pinned_sets,
)
from sinkstream.kernels.runtime import HALF_DTYPES, use_triton
from sinkstream.kernels.window_received import window_received
from sinkstream.policies import EvictionPolicy, PruneSchedule, Steps, scored_field

# most tokens of such a chunk where attention is added up: what the chunk's queries give to a token that leaves is added
# up at the prune, one after the other; what came before the chunk is known
ACCUMULATED_TOKENS = 512
SET_TOKENS = 32_768  # most pinned tokens of one chunk, those of every prune counted: each layer gathers all of them


# ---- which chunks ----


def choosing_tokens(policy: EvictionPolicy, chunk_tokens: int) -> int:
    """Most tokens of such a chunk; 0 where the choices of a policy do not follow from attention alone."""
    scorer, field = policy.scorer, scored_field(policy.scorer)
    if scorer is None or field not in ("attention", "accumulated") or not scorer.per_head:
        return 0
    if PruneSchedule(policy).signals():
        return 0
    return min(chunk_tokens, ACCUMULATED_TOKENS) if field == "accumulated" else chunk_tokens


def most_prunes(policy: EvictionPolicy) -> int:
    """Prunes within such a chunk at the most; 0 where the sets are too large."""
    return max(0, SET_TOKENS // policy.refresh - 1)


def prunes_within(coming_drops: np.ndarray) -> np.ndarray:
    """Tokens, counted from the chunk's first, before which something is dropped, the first one left out."""
    return np.flatnonzero(coming_drops[1:]) + 1


def tokens_across(schedule: PruneSchedule, tokens: int) -> tuple[int, int]:
    """How many of the next tokens such a chunk takes, `tokens` at the most, and how many prunes are within."""
    return tokens_of(schedule.policy, schedule.plan(tokens))


def tokens_of(policy: EvictionPolicy, steps: Steps) -> tuple[int, int]:
    """As `tokens_across`, of steps that are known."""
    prunes, most = prunes_within(steps.drop), most_prunes(policy)
    return (len(steps), len(prunes)) if len(prunes) <= most else (int(prunes[most]), most)


def computed_fast(keys: torch.Tensor) -> bool:
    """Whether such a chunk is worth it: on a GPU only where kernels compute the choices.

    In plain PyTorch the choices launch more than the forwards of chunks that are cut.
    """
    return not keys.is_cuda or (keys.dtype in HALF_DTYPES and use_triton(None, keys) and keys.shape[-1] % 16 == 0)


# ---- by what ----


def set_of_tokens(drop: np.ndarray) -> np.ndarray:
    """Which set of pinned tokens each token of a chunk sees, ``(tokens,)`` int32; `drop` as in `Steps`."""
    return np.searchsorted(prunes_within(drop), np.arange(len(drop)), side="right").astype(np.int32)


def groups_of(
    drop: np.ndarray,
    oldest: np.ndarray,
    turn: np.ndarray,
    *,
    length: int,
    before: int,
    latest: int,
    accumulates: bool,
) -> list[Group]:
    """The queries that each choice of a chunk reads.

    Parameters
    ----------
    drop : array, (tokens,)
        Entries dropped before each token, as in `Steps`.
    oldest, turn : array, (tokens,)
        As `first` and `turn` of a `Band`.
    length : int
        Window tokens before the chunk.
    before : int
        Queries of earlier tokens that stand in front of the chunk's.
    latest : int
        Most queries that a choice reads, where it does not accumulate.
    accumulates : bool
        As in `Groups`.
    """
    prunes, tokens, found, start, sums = prunes_within(drop), len(drop), list[Group](), 0, 0
    for end in [int(at) for at in prunes] + [tokens] * accumulates:
        first = int(oldest[end - 1])
        count = end - start if accumulates else min(latest, end - first)
        leaving = int(drop[end]) if end < tokens else 0
        own = length + end - count
        found.append(Group(before + end - count, count, own, first + length, leaving, sums, int(turn[end - 1])))
        start, sums = end, sums + count
    return found


def groups_on_device(
    host: Sequence[Group],
    table: torch.Tensor,
    sizes: GroupSizes,
    frame: torch.Tensor,
    rope: Rope,
    *,
    accumulates: bool,
) -> Groups:
    """The groups of a chunk as kernels read them; nothing that is launched depends on the host.

    Parameters
    ----------
    host : sequence of Group
    table : Tensor, (1 + sizes.groups, FIELDS), int32
        `group_rows` of them, on the device.
    sizes : GroupSizes
    frame : Tensor, (pinned, 2, rotary_dim / 2), float32
        As in `Groups`.
    rope : Rope
        Of the layer.
    accumulates : bool
        As in `Groups`.
    """
    shift = angles_of(table[1:, TURN], rope.frequencies(table.device), back=True)
    return Groups(host, table, shift, frame, sizes, accumulates)


# ---- what is chosen ----


@dataclass(frozen=True)
class Chosen:
    """Pinned tokens of one layer in the course of a chunk.

    Attributes
    ----------
    layer : Layer
    found : PinnedSets
    columns : SetColumns
    """

    layer: Layer
    found: PinnedSets
    columns: SetColumns

    @property
    def keys(self) -> torch.Tensor:
        """Keys ``(kv_heads, pinned, head_dim)`` that are pinned in the end, rotated to their places: a view."""
        return self.columns.keys[:, -self.columns.size :]

    @property
    def values(self) -> torch.Tensor:
        """As `keys`."""
        return self.columns.values[:, -self.columns.size :]

    @property
    def sources(self) -> torch.Tensor:
        """Which sources are pinned in the end, ``(kv_heads, pinned)``, int64."""
        return self.found.chosen[:, -1].long()

    @property
    def raw(self) -> torch.Tensor:
        """As `keys`, float32, not rotated."""
        return self.layer.sources.gather(1, self.sources[..., None].expand(-1, -1, self.columns.keys.shape[2]))

    def received(self, band: Band, scaling: float, implementation: str | None = None) -> torch.Tensor:
        """As `window_received`."""
        return window_received(self.layer, self.found.sums, band, scaling=scaling, implementation=implementation)


def choose(
    layer: Layer,
    groups: Groups,
    which: torch.Tensor,
    *,
    scaling: float,
    slots: PinnedSlots | None = None,
    implementation: str | None = None,
) -> Chosen:
    """Choose the pinned tokens of one layer at every prune of a chunk.

    Parameters
    ----------
    layer : Layer
    groups : Groups
    which : Tensor, (tokens,), int32
        `set_of_tokens`, on the device.
    scaling : float
        Of the scores.
    slots : PinnedSlots or None
        Where the tokens that are pinned in the end are written, if anywhere.
    implementation : {"auto", "triton", "torch"}, optional
        As for `pinned_sets`.
    """
    found = pinned_sets(layer, groups, scaling=scaling, implementation=implementation)
    keys, values = take_sets(layer, found.chosen, groups.frame, slots=slots, implementation=implementation)
    return Chosen(layer, found, SetColumns(keys, values, which, found.chosen.shape[2]))


def positions_of(sources: torch.Tensor, before: torch.Tensor, first_entry: int) -> torch.Tensor:
    """Indices in the stream of the tokens that are pinned in the end.

    Parameters
    ----------
    sources : Tensor, (..., pinned), int64
        `Chosen.sources`, of one layer or several.
    before : Tensor, (..., pinned), int64
        Indices of the tokens that were pinned before the chunk.
    first_entry : int
        Index of the oldest window token before the chunk.
    """
    size = sources.shape[-1]
    older = before.gather(-1, sources.clamp(max=size - 1))
    return torch.where(sources < size, older, sources + (first_entry - size))
