"""Prompts go through the transformers module and a `StreamingCache`; then the stream is handed over to the static ring.

Both caches hold the same things: window keys at positions relative to a base, pinned keys in a frame of their own, an
unrotated copy of these, and what the scorer reads. So a stream can change hands in either direction, at any token.
"""

import copy

import torch

from sinkstream.cache import StreamingCache
from sinkstream.engine.refresh import copy_sinks, pinned_angles, window_slots
from sinkstream.engine.state import StreamState


class PrefillCache(StreamingCache):
    """A streaming cache that holds no more than one chunk beside what its policy keeps."""

    chunk_tokens = 128

    def _capacity(self) -> int:
        return self.policy.peak + self.chunk_tokens


@torch.no_grad()
def give_to_cache(state: StreamState, stream: int, cache: StreamingCache) -> None:
    """Fill an empty cache with a stream that has begun, so that the transformers module can go on with it."""
    cache.reset()
    counters = state.counters[stream]
    if not counters.seen:
        return
    cache._allocate(1, state.device)
    cache._schedule = copy.deepcopy(state.schedules[stream])
    ring, pinned, one = cache.ring, counters.pinned, slice(stream, stream + 1)
    window = window_slots(state, stream, counters.first_window, counters.window)
    slots = torch.cat([torch.arange(pinned, device=state.device), window])
    ring.base, ring.tail = counters.base, len(slots)
    for source, target in [(state.keys, ring.keys), (state.values, ring.values), *_channel_pairs(state, ring)]:
        target[:, :, :, : len(slots)] = source[:, one].index_select(3, slots)
    if "position" in ring.channels:
        ring.channels["position"][..., : len(slots)] = _positions(state, stream)
    if counters.pruned:
        ring.first_window = counters.first_window
        copy_sinks(state, stream)
        ring.pinned_keys = state.pinned_keys[:, one].clone()
        ring.pinned_values = ring.values[..., :pinned, :].clone()
        ring.pinned_channels = {n: c[..., :pinned].clone() for n, c in ring.channels.items()}
        ring.pinned_positions = _positions(state, stream)[..., :pinned]
        ring._write_pinned()
    if cache.observer is not None:
        _give_queries(state, stream, cache)
    if {"nll", "entropy"} & state.channels.keys():
        cache._log_probs = state.logits[one].log_softmax(-1)[None]


@torch.no_grad()
def take_from_cache(state: StreamState, stream: int, cache: StreamingCache, logits: torch.Tensor) -> None:
    """Put what a cache holds into the static ring.

    Parameters
    ----------
    logits : Tensor, (vocab,)
        After the last token.
    """
    ring, counters, rope, one = cache.ring, state.counters[stream], state.spec.rope, slice(stream, stream + 1)
    state.schedules[stream] = cache._schedule
    counters.events += cache.stats()["events"]
    counters.rebases += ring.rebases
    counters.pruned = ring.pinned > 0 or ring.first_window > 0
    counters.first_window = ring.first_window if counters.pruned else state.geometry.sink
    counters.seen, counters.base, counters.refreshed_at = ring.seen, ring.base, -1
    pinned, window = counters.pinned, counters.window
    slots = torch.cat(
        [
            torch.arange(pinned, device=state.device),
            window_slots(state, stream, counters.first_window, window),
        ]
    )
    live = slice(ring.start, ring.tail)
    pairs = [(state.keys, ring.keys), (state.values, ring.values), *_channel_pairs(state, ring)]
    for target, source in pairs:
        target[:, one].index_copy_(3, slots, source[:, :, :, live])
    if counters.pruned and pinned:
        state.pinned_keys[:, one] = ring.pinned_keys
        if "position" in ring.channels:
            state.pinned_positions[:, one] = ring.pinned_positions[..., state.geometry.sink :]
        angles = pinned_angles(state, stream, base=counters.base, refreshed=True)
        state.keys[:, one, :, :pinned] = rope.rotate(ring.pinned_keys, *angles).to(state.keys.dtype)
    if cache.observer is not None and state.queries is not None:
        for layer, queries in cache.observer.queries.items():
            places = torch.arange(counters.seen - queries.shape[2], counters.seen, device=state.device)
            state.queries[layer, one].index_copy_(2, places % state.observed_queries, queries)
    state.logits[stream] = logits


def _channel_pairs(state: StreamState, ring) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(channel, ring.channels[name]) for name, channel in state.channels.items()]


def _positions(state: StreamState, stream: int) -> torch.Tensor:
    """Token index of everything cached, ``(layers or 1, 1, kv_heads or 1, kept)``, pinned first."""
    counters, sink = state.counters[stream], state.geometry.sink
    chosen = state.pinned_positions[:, stream : stream + 1, :, : max(0, counters.pinned - sink)]
    lead = chosen.shape[:-1]
    sinks = torch.arange(min(counters.pinned, sink), device=state.device).expand(*lead, -1)
    window = torch.arange(counters.first_window, counters.first_window + counters.window, device=state.device)
    return torch.cat([sinks, chosen, window.expand(*lead, -1)], -1)


def _give_queries(state: StreamState, stream: int, cache: StreamingCache) -> None:
    cache.observer.scaling = state.spec.head_dim**-0.5
    if state.queries is None:
        return
    count = min(state.counters[stream].seen, state.observed_queries)
    seen = state.counters[stream].seen
    places = torch.arange(seen - count, seen, device=state.device) % state.observed_queries
    kept = state.queries[:, stream : stream + 1].index_select(3, places)
    cache.observer.queries = {i: q.clone() for i, q in enumerate(kept)}
