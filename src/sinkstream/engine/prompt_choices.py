"""Chunks of a prompt that cross prunes at which pinned tokens are chosen.

Where the prunes are is known. Which tokens stay pinned in a layer follows from what the queries of that layer look at,
so the layers are computed one after the other over the whole chunk, and in each of them the choice goes prune by prune
(`kernels.pinned_sets`). Weights are read once a chunk, not once a prune.
"""

import numpy as np
import torch

from sinkstream.engine.inputs import to_device
from sinkstream.engine.prompt import Chunk, Coming
from sinkstream.engine.short_chunks import computed_by_kernels
from sinkstream.engine.span import StreamSpan
from sinkstream.engine.state import StreamState
from sinkstream.kernels.band import SetColumns
from sinkstream.kernels.chunk_entries import read_entries, take_sets
from sinkstream.kernels.pinned_sets import Groups, Layer, PinnedSets, pinned_sets, window_received
from sinkstream.policies import EvictionPolicy, PruneSchedule, scored_field

# most tokens of such a chunk where attention is added up: what the chunk's queries give to a token that leaves is added
# up at the prune, one after the other; what came before the chunk is known
ACCUMULATED_TOKENS = 512
FEWEST_PRUNES = 2  # of such a chunk; with fewer, cut at the prune, its forwards are captured
SET_TOKENS = 32_768  # most pinned tokens of one chunk, those of every prune counted: each layer gathers all of them


def choosing_tokens(policy: EvictionPolicy, chunk_tokens: int) -> int:
    """Most tokens of such a chunk; 0 where the choices of a policy do not follow from attention alone."""
    scorer, field = policy.scorer, scored_field(policy.scorer)
    if scorer is None or field not in ("attention", "accumulated") or not scorer.per_head:
        return 0
    if PruneSchedule(policy).signals():
        return 0
    return min(chunk_tokens, ACCUMULATED_TOKENS) if field == "accumulated" else chunk_tokens


def most_prunes(policy: EvictionPolicy) -> int:
    """Prunes within such a chunk at the most."""
    return SET_TOKENS // policy.refresh - 1


def chooses_in_chunk(state: StreamState) -> bool:
    """Whether pinned tokens can be chosen in a chunk: the policy looks at attention alone, at positions in the cache.

    Pinned tokens at their original positions may stand any number of positions before the chunk. On a GPU kernels must
    compute the choices: in plain PyTorch they launch more than the forwards of chunks that are cut.
    """
    return (
        choosing_tokens(state.policy, 1) > 0
        and not state.geometry.original
        and (not state.keys.is_cuda or (computed_by_kernels(state) and state.spec.head_dim % 16 == 0))
    )


def prunes_within(coming_drops: np.ndarray) -> np.ndarray:
    """Tokens, counted from the chunk's first, before which something is dropped, the first one left out."""
    return np.flatnonzero(coming_drops[1:]) + 1


class ChoosingChunk(Chunk):
    """What the layers do with the tokens of one forward in which pinned tokens are chosen.

    Parameters
    ----------
    span : StreamSpan
        All streams of `state`.
    state : StreamState
    coming : Coming
        Made with ``chooses``. The pinned slots are in use at its first token, and what stays there has been chosen.
    rope_factor : float
        What rotated dimensions are multiplied by.
    """

    def __init__(self, span: StreamSpan, state: StreamState, coming: Coming, rope_factor: float):
        super().__init__(span, coming.band, rope_factor)
        g, band, device = state.geometry, coming.band, state.device
        self.whole, self.coming = state, coming
        self.accumulates = "accumulated" in state.channels
        self.refreshed = slice(g.sink, g.pinned_slots)
        entries = torch.arange(band.length + band.tokens, device=device)
        self.slots = g.pinned_slots + (band.start + entries) % g.ring
        seen, kept = coming.counters.seen, state.observed_queries
        self.first_entry = seen - band.length  # index in the stream of the oldest window token
        cos, sin = state.spec.rope.angles(self.first_entry - coming.counters.base + entries)
        self.back = torch.stack([cos, -sin], 1)
        # queries of earlier tokens that may be read; what those gave is known where attention is added up
        self.before = 0 if self.accumulates else min(kept, seen)
        places = torch.arange(seen - self.before, seen + band.tokens, device=device) % max(1, kept)
        self.older, self.latest = places[: self.before], places[len(places) - min(kept, band.tokens) :]
        prunes = prunes_within(coming.steps.drop)
        which = np.searchsorted(prunes, np.arange(band.tokens), side="right").astype(np.int32)
        self.which = to_device(torch.from_numpy(which), device)
        self.groups = self._groups(prunes)
        # of the layer that is computed, with raw keys, keys and values of the tokens that are pinned in the end
        self.found: tuple[Layer, PinnedSets, torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self.last: list[torch.Tensor] = []  # sources of these, of every layer

    def _groups(self, prunes: np.ndarray) -> Groups:
        """The queries that each choice reads."""
        state, coming, length, tokens = self.whole, self.coming, self.band.length, self.band.tokens
        ends = [int(at) for at in prunes] + [tokens] * self.accumulates
        host, start, sums = [], 0, 0
        for end in ends:
            oldest = int(coming.oldest[end - 1])
            count = end - start if self.accumulates else min(state.observed_queries, end - oldest)
            leaving = int(coming.steps.drop[end]) if end < tokens else 0
            host.append((self.before + end - count, count, length + end - count, oldest + length, leaving, sums))
            start, sums = end, sums + count
        assert coming.turn is not None, "original positions have no frame of their own"
        turn = torch.tensor([[int(coming.turn[end - 1]), 0] for end in ends], dtype=torch.int32)
        table = to_device(torch.cat([torch.tensor(host, dtype=torch.int32), turn], 1), state.device)
        cos, sin = state.spec.rope.angles(table[:, -2])
        g, rope = state.geometry, state.spec.rope
        frame = torch.stack(rope.angles(torch.arange(g.sink, g.pinned_slots, device=state.device)), 1)
        fields = table[:, :-2].contiguous()
        return Groups(host, fields, torch.stack([cos, -sin], 1), frame, len(prunes), self.accumulates)

    def pinned_sets(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> SetColumns:
        """Choose the pinned tokens of one layer; arguments as in `store`."""
        state, row, g = self.whole, self.band.row, self.whole.geometry
        keys, band = state.keys[layer, row], self.band
        entries = read_entries(
            keys,
            state.values[layer, row],
            state.pinned_keys[layer, row, :, self.refreshed],
            key,
            value,
            self.back,
            start=band.start,
            length=band.length,
            pinned_slot=g.sink,
            ring_slot=g.pinned_slots,
        )
        queries = query.transpose(0, 1)
        if self.before and state.queries is not None:
            queries = torch.cat([state.queries[layer, row].index_select(1, self.older), queries], 1)
        held = Layer(queries.contiguous(), keys[:, : g.sink], entries.window, entries.sources, self._totals(layer))
        found = pinned_sets(held, self.groups, scaling=state.spec.head_dim**-0.5)
        set_keys, set_values = take_sets(entries, found.chosen, self.groups.frame)
        size, last = found.chosen.shape[2], found.chosen[:, -1].long()
        raw = entries.sources.gather(1, last[..., None].expand(-1, -1, key.shape[2]))
        self.found = held, found, raw, set_keys[:, -size:], set_values[:, -size:]
        self.last.append(last)
        return SetColumns(set_keys, set_values, self.which, size)

    def _totals(self, layer: int) -> torch.Tensor | None:
        """Attention that pinned tokens, window and chunk have received, ``(kv_heads, …)``; None where none is read."""
        if not self.accumulates:
            return None
        totals = self.whole.channels["accumulated"][layer, self.band.row]
        past = totals.index_select(1, self.slots[: self.band.length])
        return torch.cat([totals[:, self.refreshed], past, past.new_zeros(len(past), self.band.tokens)], 1)

    def keep(self, layer: int, query: torch.Tensor) -> None:
        """As of any chunk; where the latest queries go is the same in all layers."""
        if self.whole.queries is not None:
            latest = query[len(query) - len(self.latest) :].transpose(0, 1)
            self.whole.queries[layer, self.band.row].index_copy_(1, self.latest, latest)

    def store(self, layer: int, query: torch.Tensor | None, key: torch.Tensor, value: torch.Tensor) -> None:
        """As of any chunk, and the tokens that are pinned in the end go to the pinned slots."""
        super().store(layer, query, key, value)
        assert self.found is not None, "chosen in this layer, before"
        state, row, refreshed = self.whole, self.band.row, self.refreshed
        _, _, raw, keys, values = self.found
        state.keys[layer, row, :, refreshed] = keys
        state.values[layer, row, :, refreshed] = values
        state.pinned_keys[layer, row, :, refreshed] = raw
        self.found = None  # the sets of one layer are held at a time

    def write_positions(self) -> None:
        """Write where the tokens stand that are pinned in the end, once all layers have been computed."""
        positions, source = self.whole.pinned_positions[:, self.band.row], torch.stack(self.last)
        size = source.shape[2]
        older = positions.gather(2, source.clamp(max=size - 1))
        positions.copy_(torch.where(source < size, older, self.first_entry + source - size))

    def accumulate(self, layer: int, query: torch.Tensor) -> None:
        """Attention received by the tokens that stay; sinks, which are no candidates, keep what they have."""
        if not self.accumulates:
            return
        assert self.found is not None, "chosen in this layer, before"
        held, found, *_ = self.found
        assert held.totals is not None, "read before the choice"
        totals = self.whole.channels["accumulated"][layer, self.band.row]
        first, size = self.band.length + int(self.coming.oldest[-1]), found.chosen.shape[2]
        given = window_received(held, found.sums, first, scaling=self.whole.spec.head_dim**-0.5)
        totals[:, self.slots[first:]] = held.totals[:, size + first :] + given
        totals[:, self.refreshed] = found.totals[:, -1]
