"""What happens to a stream between two steps: choosing pinned tokens at a prune, and rebasing positions.

Keys that move to another position are rotated from float32 copies that were never rotated in half precision twice.
"""

import torch

from sinkstream.policies import Candidates, select


def window_slots(state, stream: int, first: int, count: int) -> torch.Tensor:
    """Slots of `count` window tokens from token index `first` on, ``(count,)`` int64, oldest first."""
    g = state.geometry
    return g.pinned_slots + (torch.arange(first, first + count, device=state.device) - g.sink) % g.ring


def pinned_angles(state, stream: int, *, base: int, refreshed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Angles of the pinned frame, ``(layers or 1, 1, kv_heads or 1, pinned, rotary_dim / 2)``.

    Parameters
    ----------
    base : int
        Token index of window position 0; only original positions depend on it.
    refreshed : bool
        Whether the refreshed slots are in use; without them only the sinks are meant.
    """
    g = state.geometry
    sinks = torch.arange(g.sink, device=state.device).view(1, 1, 1, -1)
    if not g.original:
        return state.spec.rope.angles(torch.arange(g.pinned_slots if refreshed else g.sink, device=state.device))
    if not refreshed:
        return state.spec.rope.angles(sinks - base)
    chosen = state.pinned_positions[:, stream : stream + 1]
    lead = chosen.shape[:-1]
    return state.spec.rope.angles(torch.cat([sinks.expand(*lead, g.sink), chosen], -1) - base)


@torch.no_grad()
def refresh_stream(state, stream: int, leaving: int) -> None:
    """Let the `leaving` oldest window tokens compete with the pinned ones and move the best to the pinned slots."""
    g, counters, policy = state.geometry, state.counters[stream], state.policy
    one = slice(stream, stream + 1)
    slots = torch.arange(g.sink, counters.pinned, device=state.device)
    slots = torch.cat([slots, window_slots(state, stream, counters.first_window, leaving)])
    known = {name: channel[:, one].index_select(3, slots) for name, channel in state.channels.items()}
    known["position"] = _candidate_positions(state, stream, leaving)
    keys = _candidate_keys(state, stream, leaving)
    if "key_norm" in policy.needs:
        known["key_norm"] = keys.norm(dim=-1)
    if "attention" in policy.needs:
        known["attention"] = candidate_attention(state, stream, leaving)
    index = select(policy.scorer.score(Candidates(**known)), policy.refresh)

    refreshed = slice(g.sink, g.pinned_slots)
    lead = keys.shape[:3]
    index = index.expand(index.shape[0], 1, index.shape[2], policy.refresh)
    wide = index.expand(*lead, policy.refresh)[..., None].expand(*lead, policy.refresh, keys.shape[-1])
    state.pinned_keys[:, one, :, refreshed] = keys.gather(3, wide)
    state.values[:, one, :, refreshed] = state.values[:, one].index_select(3, slots).gather(3, wide)
    for channel in state.channels.values():
        moved = channel[:, one].index_select(3, slots)
        channel[:, one, :, refreshed] = moved.gather(3, index.expand(*moved.shape[:3], policy.refresh))
    state.pinned_positions[:, one] = known["position"].gather(3, index)
    _rotate_refreshed(state, stream, counters.base)


@torch.no_grad()
def rebase_stream(state, stream: int) -> None:
    """Count window positions from a later token on, so that angles stay small: rare, and exact from float32."""
    counters, g, rope = state.counters[stream], state.geometry, state.spec.rope
    base = counters.rebased()
    cos, sin = rope.angles(torch.tensor(base - counters.base, device=state.device))
    for layer in state.keys[:, stream]:
        layer[:, g.pinned_slots :] = rope.unrotate(layer[:, g.pinned_slots :], cos, sin)
    if state.queries is not None:
        state.queries[:, stream] = rope.unrotate(state.queries[:, stream], cos, sin)
    if g.original:
        copy_sinks(state, stream)
        angles = pinned_angles(state, stream, base=base, refreshed=counters.pruned)
        count = angles[0].shape[-2]
        copies = state.pinned_keys[:, stream : stream + 1, :, :count]
        state.keys[:, stream : stream + 1, :, :count] = rope.rotate(copies, *angles).to(state.keys.dtype)
    counters.base = base
    counters.rebases += 1


def copy_sinks(state, stream: int) -> None:
    """Fill the unrotated copies of the sinks, unless a rebase has moved them: then the copies are there already."""
    if state.geometry.original and state.counters[stream].base:
        return
    sink = state.geometry.sink
    angles = state.spec.rope.angles(torch.arange(sink, device=state.device))
    state.pinned_keys[:, stream, :, :sink] = state.spec.rope.unrotate(state.keys[:, stream, :, :sink], *angles)


@torch.no_grad()
def candidate_attention(state, stream: int, leaving: int) -> torch.Tensor:
    """Attention that the kept queries give to the candidates, at their present places in the cache.

    Queries whose tokens have left the window are passed over: they have no position any more.

    Returns
    -------
    Tensor, (layers, 1, kv_heads, candidates), float32
        Summed over the queries, mean over the query heads of a kv head.
    """
    g, counters, rope = state.geometry, state.counters[stream], state.spec.rope
    count = min(counters.window, state.observed_queries)
    asked = torch.arange(counters.seen - count, counters.seen, device=state.device)
    shift = 0 if g.original else counters.rebased() - counters.base
    frame = rope.angles(torch.tensor(shift, device=state.device))
    slots = window_slots(state, stream, counters.first_window, counters.window)
    later = torch.arange(counters.first_window, counters.seen, device=state.device) > asked[:, None]
    scale = state.spec.head_dim**-0.5
    rows = []
    for layer in range(state.spec.layers):
        query = state.queries[layer, stream].index_select(1, asked % state.observed_queries).float()
        query = query.view(state.spec.kv_heads, -1, count, state.spec.head_dim)
        keys = state.keys[layer, stream].float()
        pinned = torch.einsum("hgqd,hkd->hgqk", rope.unrotate(query, *frame), keys[:, : counters.pinned])
        window = torch.einsum("hgqd,hkd->hgqk", query, keys.index_select(1, slots)).masked_fill(later, float("-inf"))
        weights = (torch.cat([pinned, window], -1) * scale).softmax(-1)
        rows.append(weights.sum(2).mean(1))
    return torch.stack(rows)[:, None, :, g.sink : counters.pinned + leaving]


def _candidate_positions(state, stream: int, leaving: int) -> torch.Tensor:
    """Token indices of pinned (sinks left out) and leaving tokens, ``(layers or 1, 1, kv_heads or 1, candidates)``."""
    counters = state.counters[stream]
    first = counters.first_window
    pinned = state.pinned_positions[:, stream : stream + 1, :, : counters.pinned - state.geometry.sink]
    leave = torch.arange(first, first + leaving, device=state.device)
    return torch.cat([pinned, leave.expand(*pinned.shape[:-1], leaving)], -1)


def _candidate_keys(state, stream: int, leaving: int) -> torch.Tensor:
    """Unrotated float32 keys of the candidates, ``(layers, 1, kv_heads, candidates, head_dim)``."""
    counters, rope, one = state.counters[stream], state.spec.rope, slice(stream, stream + 1)
    first = counters.first_window
    slots = window_slots(state, stream, first, leaving)
    positions = torch.arange(first, first + leaving, device=state.device) - counters.base
    leave = rope.unrotate(state.keys[:, one].index_select(3, slots), *rope.angles(positions))
    return torch.cat([state.pinned_keys[:, one, :, state.geometry.sink : counters.pinned], leave], 3)


def _rotate_refreshed(state, stream: int, base: int) -> None:
    g, one = state.geometry, slice(stream, stream + 1)
    refreshed = slice(g.sink, g.pinned_slots)
    cos, sin = (a[..., refreshed, :] for a in pinned_angles(state, stream, base=base, refreshed=True))
    keys = state.spec.rope.rotate(state.pinned_keys[:, one, :, refreshed], cos, sin)
    state.keys[:, one, :, refreshed] = keys.to(state.keys.dtype)
