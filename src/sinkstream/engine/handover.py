"""Prompts go through the transformers module and a `PrefillCache`; then the stream is handed over to the static ring.

Both hold the same things in the same buffers, in another order: window keys at positions relative to a base, pinned
keys in a frame of their own, an unrotated copy of these, and what the scorer reads. So a stream can change hands in
either direction, at any token; one layer at a time is put in order.
"""

import copy

import torch

from sinkstream.engine.prefill import PrefillCache
from sinkstream.engine.refresh import copy_sinks, pinned_angles, window_slots
from sinkstream.engine.state import StreamState


@torch.no_grad()
def give_to_cache(state: StreamState, stream: int, cache: PrefillCache) -> None:
    """Lend a cache the buffers of a stream and fill it with it, so that the transformers module can go on with it."""
    counters, one = state.counters[stream], slice(stream, stream + 1)
    cache.storage = state.keys[:, one], state.values[:, one]
    if not counters.seen:
        cache.reset()
        return
    pinned = counters.pinned
    uncertain = {"nll", "entropy"} & state.channels.keys()
    schedule = copy.deepcopy(state.schedules[stream])
    ring = cache.resume(schedule, state.device, logits=state.logits[one] if uncertain else None)
    frame = {}
    if counters.pruned:
        copy_sinks(state, stream)
        frame = {
            "first_window": counters.first_window,
            "pinned_keys": state.pinned_keys[:, one],
            "pinned_positions": _slot_positions(state, stream)[..., :pinned],
        }
    source = {"keys": state.keys, "values": state.values, **state.channels}
    source = {name: buffer[:, one] for name, buffer in source.items()}
    if "position" in ring.channels:
        source["position"] = _slot_positions(state, stream)
    ring.load(source, _live_slots(state, stream), base=counters.base, **frame)
    if cache.observer is not None:
        _give_queries(state, stream, cache)


@torch.no_grad()
def take_from_cache(state: StreamState, stream: int, cache: PrefillCache, logits: torch.Tensor) -> None:
    """Put what a cache holds in the order of the static ring.

    Parameters
    ----------
    logits : Tensor, (vocab,)
        After the last token.
    """
    ring, counters, rope, one = cache.ring, state.counters[stream], state.spec.rope, slice(stream, stream + 1)
    state.schedules[stream] = cache.schedule
    counters.events += cache.stats()["events"]
    counters.rebases += ring.rebases
    counters.pruned = ring.pinned > 0 or ring.first_window > 0
    counters.first_window = ring.first_window if counters.pruned else state.geometry.sink
    counters.seen, counters.base, counters.refreshed_at = ring.seen, ring.base, -1
    pinned, slots, stored = counters.pinned, _live_slots(state, stream), ring.stored
    for name, target in {"keys": state.keys, "values": state.values, **state.channels}.items():
        for row, kept in zip(target[:, one], stored[name]):
            row.copy_(torch.zeros_like(row).index_copy_(2, slots, kept))
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


def _live_slots(state: StreamState, stream: int) -> torch.Tensor:
    """Slots of everything cached, ``(kept,)`` int64: pinned first, then the window from its oldest token on."""
    counters = state.counters[stream]
    window = window_slots(state, stream, counters.first_window, counters.window)
    return torch.cat([torch.arange(counters.pinned, device=state.device), window])


def _slot_positions(state: StreamState, stream: int) -> torch.Tensor:
    """Token index in every slot, ``(layers or 1, 1, kv_heads or 1, slots)``; -1 where nothing is cached."""
    counters, g = state.counters[stream], state.geometry
    chosen = state.pinned_positions[:, stream : stream + 1]
    found = torch.full((*chosen.shape[:-1], g.slots), -1, dtype=torch.int64, device=state.device)
    found[..., : g.sink] = torch.arange(g.sink, device=state.device)
    found[..., g.sink : g.pinned_slots] = chosen
    window = torch.arange(counters.first_window, counters.first_window + counters.window, device=state.device)
    found[..., window_slots(state, stream, counters.first_window, counters.window)] = window
    return found


def _give_queries(state: StreamState, stream: int, cache: PrefillCache) -> None:
    cache.observer.scaling = state.spec.head_dim**-0.5
    if state.queries is None:
        return
    count = min(state.counters[stream].seen, state.observed_queries)
    seen = state.counters[stream].seen
    places = torch.arange(seen - count, seen, device=state.device) % state.observed_queries
    kept = state.queries[:, stream : stream + 1].index_select(3, places)
    cache.observer.queries = {i: q.clone() for i, q in enumerate(kept)}
