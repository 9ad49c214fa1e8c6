"""Prompts under policies that decide on the way: through the transformers module and a `PrefillCache`, and back.

Both hold the same things in the same buffers, in another order: window keys at positions relative to a base, pinned
keys in a frame of their own, an unrotated copy of these, and what the scorer reads. So a stream can change hands in
either direction, at any token; one layer at a time is put in order.
"""

import copy

import torch
from transformers import PreTrainedModel

from sinkstream.cache.channels import UNCERTAINTY
from sinkstream.cache.observe import AttentionObserver
from sinkstream.engine.prefill import PrefillCache
from sinkstream.engine.refresh import copy_sinks, latest_queries, live_slots, pinned_tokens, write_pinned
from sinkstream.engine.state import StreamState


def prefill_by_module(
    state: StreamState, cache: PrefillCache, model: PreTrainedModel, ids: torch.Tensor, stream: int
) -> None:
    """Append token ids ``(tokens,)`` to a stream through the transformers module, in chunks that end at every prune."""
    try:
        give_to_cache(state, stream, cache)
        logits = cache.prefill(model, ids[None], cache.stream.chunk_tokens)
        take_from_cache(state, stream, cache, logits[0])
    finally:
        cache.reset()


@torch.no_grad()
def give_to_cache(state: StreamState, stream: int, cache: PrefillCache) -> None:
    """Lend a cache the buffers of a stream and fill it with it, so that the transformers module can go on with it."""
    counters, one = state.counters[stream], slice(stream, stream + 1)
    cache.stream.storage = state.keys[:, one], state.values[:, one]
    if not counters.seen:
        cache.reset()
        return
    uncertain = UNCERTAINTY & state.channels.keys()
    schedule = copy.deepcopy(state.schedules[stream])
    ring = cache.stream.resume(schedule, state.device, logits=state.logits[one] if uncertain else None)
    if counters.pruned:
        copy_sinks(state, stream)
    source = {"keys": state.keys, "values": state.values, **state.channels}
    source = {name: buffer[:, one] for name, buffer in source.items()}
    ring.load(
        source,
        live_slots(state, stream),
        base=counters.base,
        first_window=counters.first_window if counters.pruned else 0,
        pinned_keys=state.pinned_keys[:, one] if counters.pruned else None,
        pinned_positions=pinned_tokens(state, stream) if counters.pruned else None,
    )
    if cache.stream.observer is not None:
        _give_queries(state, stream, cache.stream.observer)


@torch.no_grad()
def take_from_cache(state: StreamState, stream: int, cache: PrefillCache, logits: torch.Tensor) -> None:
    """Put what a cache holds in the order of the static ring.

    Parameters
    ----------
    logits : Tensor, (vocab,)
        After the last token.
    """
    ring, counters, one = cache.stream.ring, state.counters[stream], slice(stream, stream + 1)
    assert ring is not None, "a cache that was fed holds a ring"
    state.schedules[stream] = cache.stream.schedule
    counters.events += cache.stats()["events"]
    counters.rebases += ring.rebases
    counters.pruned = ring.pinned > 0 or ring.first_window > 0
    counters.first_window = ring.first_window if counters.pruned else state.geometry.sink
    counters.seen, counters.base, counters.refreshed_at = ring.seen, ring.base, -1
    pinned, slots, stored = counters.pinned, live_slots(state, stream), ring.stored
    for name, target in {"keys": state.keys, "values": state.values, **state.channels}.items():
        for row, kept in zip(target[:, one], stored[name]):
            row.copy_(torch.zeros_like(row).index_copy_(2, slots, kept))
    if counters.pruned and pinned:
        state.pinned_keys[:, one] = ring.pinned_keys
        state.pinned_positions[:, one] = ring.pinned_positions[..., state.geometry.sink :]
        write_pinned(state, stream, slice(0, pinned))
    if cache.stream.observer is not None and state.queries is not None:
        for layer, queries in cache.stream.observer.queries.items():
            places = torch.arange(counters.seen - queries.shape[2], counters.seen, device=state.device)
            state.queries[layer, one].index_copy_(2, places % state.observed_queries, queries)
    state.logits[stream] = logits
    state.stale_logits.discard(stream)


def _give_queries(state: StreamState, stream: int, observer: AttentionObserver) -> None:
    observer.scaling = state.spec.head_dim**-0.5
    if state.queries is None:
        return
    latest, count = latest_queries(state, stream), min(state.counters[stream].seen, state.observed_queries)
    observer.queries = {layer: latest.latest(layer, count) for layer in range(state.spec.layers)}
