"""What happens to a stream between two steps: choosing pinned tokens at a prune, and rebasing positions.

The rules are those of `cache.pinned`; here is where a static ring keeps what they read and write.
"""

from functools import partial

import torch

from sinkstream.cache.pinned import (
    SLOT_AXIS,
    Held,
    Queries,
    frame_phases,
    refresh,
    turned_back,
    unrotated,
    write_rotated,
)
from sinkstream.kernels.received import received


def window_slots(state, stream: int, first: int, count: int) -> torch.Tensor:
    """Slots of `count` window tokens from token index `first` on, ``(count,)`` int64, oldest first."""
    g, sink = state.geometry, state.counters[stream].sink
    return g.pinned_slots + (torch.arange(first, first + count, device=state.device) - sink) % g.ring


def live_slots(state, stream: int) -> torch.Tensor:
    """Slots of everything cached, ``(kept,)`` int64: pinned first, then the window from its oldest token on."""
    counters = state.counters[stream]
    window = window_slots(state, stream, counters.first_window, counters.window)
    return torch.cat([torch.arange(counters.pinned, device=state.device), window])


def pinned_tokens(state, stream: int) -> torch.Tensor:
    """Token index in every pinned slot, ``(layers or 1, 1, kv_heads or 1, pinned_slots)``, int64."""
    chosen = state.pinned_positions[:, stream : stream + 1]
    sinks = torch.arange(state.geometry.sink, device=state.device)
    return torch.cat([sinks.expand(*chosen.shape[:SLOT_AXIS], -1), chosen], SLOT_AXIS)


def held(state, stream: int) -> Held:
    """What a stream holds now, for the choice of its pinned tokens."""
    g, counters, one = state.geometry, state.counters[stream], slice(stream, stream + 1)
    slots = live_slots(state, stream)
    return Held(
        rope=state.spec.rope,
        sink=g.sink,
        pinned=counters.pinned,
        window=counters.window,
        first_window=counters.first_window,
        base=counters.base,
        frame_shift=0 if g.original else counters.rebased() - counters.base,
        keys=state.keys[:, one],
        values=state.values[:, one],
        channels={name: channel[:, one] for name, channel in state.channels.items()},
        pinned_keys=state.pinned_keys[:, one],
        refreshed=state.pinned_positions[:, one, :, : counters.pinned - g.sink],
        read=lambda buffer, first, count: buffer.index_select(SLOT_AXIS, slots[first : first + count]),
    )


def latest_queries(state, stream: int) -> Queries:
    """The queries that a stream keeps, in the order of their tokens."""
    kept, seen = state.observed_queries, state.counters[stream].seen

    def latest(layer: int, count: int) -> torch.Tensor:
        places = torch.arange(seen - count, seen, device=state.device) % kept
        return state.queries[layer, stream : stream + 1].index_select(2, places)

    return Queries(kept, state.spec.head_dim**-0.5, latest)


def window_attention(state, stream: int, held: Held, leaving: int) -> torch.Tensor:
    """As `candidate_attention`, of all layers and heads at once: ``(layers, 1, kv_heads, candidates)`` float32."""
    g, counters = state.geometry, state.counters[stream]
    cos, sin = held.rope.angles(torch.full((), held.frame_shift, device=state.device))
    with torch.cuda.device_of(state.keys):
        found = received(
            state.queries[:, stream],
            state.keys[:, stream],
            torch.stack([cos, -sin]),
            seen=counters.seen,
            pinned_slots=g.pinned_slots,
            sink=g.sink,
            pinned=held.pinned,
            first=(counters.first_window - g.sink) % g.ring,
            window=held.window,
            leaving=leaving,
        )
    return found[:, None]


@torch.no_grad()
def rehearse_refresh(state) -> None:
    """Launch the kernel of a refresh once, so that no prune waits for its compilation; streams do not notice."""
    if "attention" not in state.policy.needs or state.device.type != "cuda":
        return
    g = state.geometry
    still = torch.zeros(2, len(state.spec.rope.inv_freq), device=state.device)
    sizes = {"sink": g.sink, "pinned": g.pinned_slots, "first": 0, "window": g.ring, "leaving": 1}
    with torch.cuda.device_of(state.keys):
        received(state.queries[:, 0], state.keys[:, 0], still, seen=g.slots, pinned_slots=g.pinned_slots, **sizes)


def refresh_if_due(state, stream: int) -> None:
    """Choose the pinned tokens of a prune that is due before the next token."""
    counters = state.counters[stream]
    if state.policy.scorer is None or counters.refreshed_at == counters.seen:
        return
    drop = state.schedules[stream].plan(1)[0].drop
    if drop:
        refresh_stream(state, stream, counters.leaving(drop))
        counters.refreshed_at = counters.seen


@torch.no_grad()
def refresh_stream(state, stream: int, leaving: int) -> None:
    """Let the `leaving` oldest window tokens compete with the pinned ones and move the best to the pinned slots."""
    g, policy, one = state.geometry, state.policy, slice(stream, stream + 1)
    attention = partial(window_attention, state, stream)
    chosen = refresh(held(state, stream), leaving, policy.scorer, policy.refresh, attention)
    refreshed = slice(g.sink, g.pinned_slots)
    state.pinned_keys[:, one, :, refreshed] = chosen.keys
    state.values[:, one, :, refreshed] = chosen.values
    for name, channel in state.channels.items():
        channel[:, one, :, refreshed] = chosen.channels[name]
    state.pinned_positions[:, one] = chosen.positions
    write_pinned(state, stream, refreshed)


@torch.no_grad()
def rebase_stream(state, stream: int) -> None:
    """Count window positions from a later token on, so that angles stay small: rare, and exact from float32."""
    counters, g, rope = state.counters[stream], state.geometry, state.spec.rope
    for told in state.between_steps:
        told.rebasing()
    base = counters.rebased()
    delta = base - counters.base
    for layer in state.keys[:, stream]:
        layer[:, g.pinned_slots :] = turned_back(rope, layer[:, g.pinned_slots :], delta)
    if state.queries is not None:
        state.queries[:, stream] = turned_back(rope, state.queries[:, stream], delta)
    if g.original:
        copy_sinks(state, stream)
    counters.base = base
    counters.rebases += 1
    if g.original:
        write_pinned(state, stream, slice(0, counters.pinned))


def copy_sinks(state, stream: int) -> None:
    """Fill the unrotated copies of the sinks, unless a rebase has moved them: then the copies are there already."""
    if state.geometry.original and state.counters[stream].base:
        return
    one, g = slice(stream, stream + 1), state.geometry
    keys = state.keys[:, one, :, g.framed : g.framed + g.sink]
    state.pinned_keys[:, one, :, : g.sink] = unrotated(state.spec.rope, keys, 0)


def write_pinned(state, stream: int, slots: slice) -> None:
    """Rotate the copies of pinned keys to where they lie and write them to their slots; window positions as of now."""
    g, rope, one = state.geometry, state.spec.rope, slice(stream, stream + 1)
    tokens = pinned_tokens(state, stream)[..., slots]
    phases = frame_phases(rope, tokens, base=state.counters[stream].base, first=None if g.original else slots.start)
    written = slice(g.framed + slots.start, g.framed + slots.stop)  # behind the frame of recalled tokens
    write_rotated(rope, state.keys[:, one, :, written], state.pinned_keys[:, one, :, slots], phases)
