"""Chunks of a forward that cross prunes at which pinned tokens are chosen by attention, in the model's own layers.

As `TwoFrames`, but which tokens are pinned changes on the way: each layer chooses them at every prune of the chunk
before its queries attend (`cache.choices`). What is pinned in the end is taken over once the forward has returned.
"""

from dataclasses import dataclass, replace

import torch

from sinkstream.cache.choices import (
    Chosen,
    choose,
    choosing_tokens,
    computed_fast,
    groups_of,
    groups_on_device,
    positions_of,
    set_of_tokens,
    tokens_across,
)
from sinkstream.cache.chunks import unused_mask
from sinkstream.cache.observe import AttentionObserver
from sinkstream.cache.pinned import Refreshed
from sinkstream.cache.ring import SoftRing
from sinkstream.cache.rope import Rope
from sinkstream.kernels.attention_prefill import attention_prefill
from sinkstream.kernels.band import ALL_PINNED, Band, Columns
from sinkstream.kernels.chunk_entries import read_entries
from sinkstream.kernels.pinned_sets import Groups, GroupSizes, Layer, group_rows
from sinkstream.kernels.runtime import to_device
from sinkstream.policies import EvictionPolicy, PruneSchedule, Steps


def chosen_across(ring: SoftRing, schedule: PruneSchedule, tokens: int) -> int:
    """How many of the next `tokens` tokens one chunk takes in which pinned tokens are chosen; 0: none can be.

    What stays at the chunk's first token is chosen before it, and the first prune of all also fills the pinned slots.
    """
    tokens = choosing_tokens(schedule.policy, tokens)
    if not tokens or not chooses(ring, schedule.policy):
        return 0
    if ring.first_window == 0 and not schedule.plan(1).drop[0]:
        return 0
    return tokens_across(schedule, tokens)[0]


def chooses(ring: SoftRing, policy: EvictionPolicy) -> bool:
    """Whether pinned tokens can be chosen in a chunk: one row, positions in the cache, a policy of attention alone."""
    return (
        choosing_tokens(policy, 1) > 0
        and ring.keys.shape[1] == 1
        and not ring.original_positions
        and computed_fast(ring.keys)
    )


@dataclass(frozen=True)
class _Frame:
    """What is one rotation's: the band of its queries, what turns keys back, and what each choice reads."""

    band: Band
    back: torch.Tensor
    groups: Groups


class ChosenFrames:
    """Attention of one chunk that crosses prunes at which pinned tokens are chosen.

    Parameters
    ----------
    ring : SoftRing
        Of one row; after the prune at the chunk's first token, if there was one, and after another one before.
    steps : Steps
        Of the chunk's tokens.
    observer : AttentionObserver
        Of the stream; shown the queries, and what they give to the tokens that stay.
    """

    def __init__(self, ring: SoftRing, steps: Steps, observer: AttentionObserver):
        self.ring, self.observer = ring, observer
        self.cached, self.pinned, self.length = ring.live, ring.pinned, ring.live - ring.pinned
        dropped, device = steps.drop.cumsum() - steps.drop[0], ring.keys.device
        oldest, entries = dropped - self.length, torch.arange(self.length + len(steps), device=device)
        self.first = self.length + int(oldest[-1])  # oldest window entry that stays
        # queries of earlier tokens that may be read; what those gave is known where attention is added up
        self.before = 0 if observer.accumulate else min(observer.keep, ring.seen)
        self.which = to_device(torch.from_numpy(set_of_tokens(steps.drop)), device)
        places = torch.arange(ring.sink, ring.pinned, device=device) + ring.first_window - ring.pinned - ring.base
        host = groups_of(
            steps.drop,
            oldest,
            dropped,
            length=self.length,
            before=self.before,
            latest=observer.keep,
            accumulates=observer.accumulate,
        )
        sizes = GroupSizes.of(host)
        table = to_device(group_rows(host, observer.accumulate, sizes.groups), device)
        self._frames: dict[Rope, _Frame] = {}
        for rope in ring.rope.kinds:
            cos, sin = rope.angles(ring.first_window - ring.base + entries)
            band = Band(oldest, dropped, rope.frequencies(device), past=min(ring.seen, ALL_PINNED), length=self.length)
            in_frame = torch.stack(rope.angles(places), 1)
            groups = groups_on_device(host, table, sizes, in_frame, rope, accumulates=observer.accumulate)
            self._frames[rope] = _Frame(band, torch.stack([cos, -sin], 1), groups)
        self._last: dict[int, tuple[torch.Tensor, ...]] = {}  # of a layer in the end: raw keys, values, sources, totals

    def mask(self) -> torch.Tensor:
        """As `TwoFrames.mask`."""
        return unused_mask(self.ring.keys.device)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """As `TwoFrames.attend`, of one row."""
        ring, frame, sink, dtype = self.ring, self._frames[self.ring.rope.layer(layer)], self.ring.sink, query.dtype
        implementation = None if not query.requires_grad else "torch"  # gradients flow through the twins only
        query, past, own = query.to(key.dtype), slice(0, self.cached), slice(self.cached, None)
        entries = read_entries(
            key[:, :, past],
            value[:, :, past],
            ring.pinned_keys[layer, :, :, sink:],
            key[0, :, own].transpose(0, 1),
            value[0, :, own].transpose(0, 1),
            frame.back,
            frame.band,
            pinned_slot=sink,
            ring_slot=self.pinned,
            leaving=self.first,
            implementation=implementation,
        )
        queries = query[0]
        if self.before:
            queries = torch.cat([self.observer.queries[layer][0, :, -self.before :].to(key.dtype), queries], 1)
        held = Layer.of(replace(entries, totals=self._totals(layer)), queries)
        chosen = choose(held, frame.groups, self.which, scaling=scaling, implementation=implementation)
        self._take(layer, chosen, frame.band, query, scaling, implementation)
        sinks, window = slice(0, sink), slice(self.pinned, self.cached)
        keys, values = ([part[:, :, which] for which in (sinks, window, own)] for part in (key, value))
        columns = Columns(keys[0], values[0], keys[1], values[1], keys[2], values[2], chosen.columns)
        return attention_prefill(query, columns, frame.band, scaling=scaling, implementation=implementation).to(dtype)

    def refreshed(self, leaving: int) -> Refreshed:
        """What is pinned after the chunk, in which `leaving` tokens leave the window."""
        assert leaving == self.first, "the prunes of the chunk, all of them"
        keys, values, sources, totals = (torch.stack(parts)[:, None] for parts in zip(*self._in_order()))
        before = self.ring.pinned_positions[..., self.ring.sink :].expand(sources.shape)
        channels = {"accumulated": totals} if self.observer.accumulate else {}
        return Refreshed(keys, values, channels, positions_of(sources, before, self.ring.first_window))

    def _in_order(self) -> list[tuple[torch.Tensor, ...]]:
        return [self._last[layer] for layer in range(len(self.ring.keys))]

    def _totals(self, layer: int) -> torch.Tensor | None:
        """Attention that pinned tokens, window and chunk have received; None where none is read."""
        if not self.observer.accumulate:
            return None
        ring, tokens = self.ring, len(self.which)
        return ring.channels["accumulated"][layer, 0, :, ring.start + ring.sink : ring.tail + tokens].contiguous()

    @torch.no_grad()
    def _take(
        self,
        layer: int,
        chosen: Chosen,
        band: Band,
        query: torch.Tensor,
        scaling: float,
        implementation: str | None,
    ) -> None:
        """Keep what is read once the forward has returned."""
        observer, totals = self.observer, chosen.found.totals[:, -1]
        observer.see_queries(layer, query, scaling)
        if observer.accumulate:
            weights = totals.new_zeros(1, len(totals), self.cached + len(self.which))
            weights[0, :, self.pinned :] = chosen.received(band, scaling, implementation)
            observer.add(layer, weights)
        self._last[layer] = chosen.raw.detach(), chosen.values.detach().clone(), chosen.sources, totals.clone()
