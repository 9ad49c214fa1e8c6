"""Chunks of a prompt that cross prunes at which pinned tokens are chosen, straight into the static ring.

What is chosen, and among what, is that of `cache.choices`.
"""

import torch

from sinkstream.cache.choices import (
    Chosen,
    choose,
    choosing_tokens,
    computed_fast,
    groups_of,
    positions_of,
    set_of_tokens,
)
from sinkstream.engine.prompt import Chunk, Coming
from sinkstream.engine.span import StreamSpan
from sinkstream.engine.state import StreamState
from sinkstream.kernels.band import SetColumns
from sinkstream.kernels.chunk_entries import read_entries
from sinkstream.kernels.pinned_sets import Layer
from sinkstream.kernels.runtime import to_device

FEWEST_PRUNES = 2  # of such a chunk; with fewer, cut at the prune, its forwards are captured


def chooses_in_chunk(state: StreamState) -> bool:
    """Whether pinned tokens can be chosen in a chunk: the policy looks at attention alone, at positions in the cache.

    Pinned tokens at their original positions may stand any number of positions before the chunk.
    """
    return choosing_tokens(state.policy, 1) > 0 and not state.geometry.original and computed_fast(state.keys)


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
        self.which = to_device(torch.from_numpy(set_of_tokens(coming.steps.drop)), device)
        assert coming.turn is not None, "original positions have no frame of their own"
        self.groups = groups_of(
            coming.steps.drop,
            coming.oldest,
            coming.turn,
            torch.arange(g.sink, g.pinned_slots, device=device),
            state.spec.rope,
            length=band.length,
            before=self.before,
            latest=kept,
            accumulates=self.accumulates,
        )
        self.chosen: Chosen | None = None  # of the layer that is computed
        self.sources: list[torch.Tensor] = []  # of the tokens that are pinned in the end, of every layer

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
        self.chosen = choose(held, entries, self.groups, self.which, scaling=state.spec.head_dim**-0.5)
        self.sources.append(self.chosen.sources)
        return self.chosen.columns

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
        assert self.chosen is not None, "chosen in this layer, before"
        state, row, refreshed = self.whole, self.band.row, self.refreshed
        state.keys[layer, row, :, refreshed] = self.chosen.keys
        state.values[layer, row, :, refreshed] = self.chosen.values
        state.pinned_keys[layer, row, :, refreshed] = self.chosen.raw
        self.chosen = None  # the sets of one layer are held at a time

    def write_positions(self) -> None:
        """Write where the tokens stand that are pinned in the end, once all layers have been computed."""
        positions = self.whole.pinned_positions[:, self.band.row]
        positions.copy_(positions_of(torch.stack(self.sources), positions, self.first_entry))

    def accumulate(self, layer: int, query: torch.Tensor) -> None:
        """Attention received by the tokens that stay; sinks, which are no candidates, keep what they have."""
        if not self.accumulates:
            return
        chosen = self.chosen
        assert chosen is not None and chosen.layer.totals is not None, "chosen in this layer, before"
        totals = self.whole.channels["accumulated"][layer, self.band.row]
        first, size = self.band.length + int(self.coming.oldest[-1]), chosen.columns.size
        given = chosen.received(first, self.whole.spec.head_dim**-0.5)
        totals[:, self.slots[first:]] = chosen.layer.totals[:, size + first :] + given
        totals[:, self.refreshed] = chosen.found.totals[:, -1]
