"""Snapshots: an engine's side of `cache.stream_file`. A file goes on bit for bit in another engine, and in a cache."""

from pathlib import Path

import torch

from sinkstream.cache.pinned import SLOT_AXIS, unrotated
from sinkstream.cache.recall_file import fill_recall, recall_record, recall_shapes
from sinkstream.cache.stream_file import (
    SavedStream,
    StreamCounts,
    check_fits,
    check_tensors,
    identity,
    read_stream,
    saved_schedule,
    schedule_record,
    stream_bytes,
    stream_of_bytes,
    write_stream,
)
from sinkstream.engine.geometry import Counters
from sinkstream.engine.recalling import StreamRecall, watching
from sinkstream.engine.refresh import copy_sinks, latest_queries, pinned_tokens, window_slots, write_pinned
from sinkstream.engine.state import StreamState
from sinkstream.policies import EvictionPolicy


def save(
    path: str | Path, state: StreamState, stream: int, *, model_hash: str, recall: StreamRecall | None = None
) -> None:
    """Write one stream to a file.

    Parameters
    ----------
    path : str or Path
        An existing file is replaced, in one piece.
    model_hash : str
        `cache.stream_file.fingerprint` of the model.
    recall : StreamRecall or None
        Of the stream.

    Raises
    ------
    ValueError
        If the file of the archive is damaged.
    WriteError
        If the file cannot be written; an older one stays as it was.
    """
    write_stream(path, stream_record(state, stream, model_hash=model_hash, recall=recall))


def load(
    path: str | Path,
    state: StreamState,
    stream: int,
    *,
    model_hash: str,
    row: int | None = None,
    recall: StreamRecall | None = None,
) -> None:
    """Read a file of an engine or a cache into one stream.

    Parameters
    ----------
    row : int or None
        Which row, where the file holds a batch.
    recall : StreamRecall or None
        Of the stream.

    Raises
    ------
    ValueError
        If the file is no snapshot, or one of another format, model, policy, kind of positions or recall, or the archive
        does not fit; the stream is left as it was.
    WriteError
        If the file of the archive cannot be made; likewise.
    """
    _take(read_stream(path), path, state, stream, model_hash=model_hash, row=row, recall=recall)


def dump(state: StreamState, stream: int, *, model_hash: str, recall: StreamRecall | None = None) -> bytes:
    """One stream as the bytes of its file."""
    return stream_bytes(stream_record(state, stream, model_hash=model_hash, recall=recall))


def undump(
    data: bytes, state: StreamState, stream: int, *, model_hash: str, recall: StreamRecall | None = None
) -> None:
    """Read the bytes that `dump` gave into one stream. Raises as `load`."""
    _take(stream_of_bytes(data), "in memory", state, stream, model_hash=model_hash, row=None, recall=recall)


def _take(
    saved: SavedStream,
    path: str | Path,
    state: StreamState,
    stream: int,
    *,
    model_hash: str,
    row: int | None,
    recall: StreamRecall | None,
) -> None:
    """Fill a stream with what was saved, once all of it is known to fit."""
    positions = "original" if state.geometry.original else "cache"
    policy = _policy_for(saved, state)
    settings = None if recall is None else recall.memory.settings
    model = identity(state.spec, model_hash)
    check_fits(saved, path, model=model, policy=policy, positions=positions, recall=settings)
    rows = saved.counts.rows
    if rows > 1 and row is None:
        raise ValueError(f"{str(path)!r} holds {rows} rows; accepted for one stream: row=0 to row={rows - 1}")
    if row is not None and not 0 <= row < max(1, rows):
        raise ValueError(f"row={row} is not accepted; accepted: 0 to {max(1, rows) - 1}, the rows of {str(path)!r}")
    check_tensors(saved, path, state.spec, policy, recall_shapes(saved, path, state.spec))
    fill_stream(state, stream, saved if row is None or not rows else saved.row(row), path, recall)


def _policy_for(saved: SavedStream, state: StreamState) -> EvictionPolicy:
    """The policy of a stream with as many sinks as a saved one has; the state's own where it has no such stream."""
    try:
        return state.policy_of(saved.policy.get("sink"))
    except ValueError:
        return state.policy


@torch.no_grad()
def stream_record(
    state: StreamState, stream: int, *, model_hash: str, recall: StreamRecall | None = None
) -> SavedStream:
    """What a stream holds, as a file holds it; copies, but for the blocks of an archive."""
    state.settle()
    counters, g, one = state.counters[stream], state.geometry, slice(stream, stream + 1)
    saved = SavedStream(
        model=identity(state.spec, model_hash),
        policy=state.schedules[stream].policy.record(),
        positions="original" if g.original else "cache",
        frame="fixed",
        scaling=state.spec.head_dim**-0.5,
        counts=StreamCounts(),
        schedule=schedule_record(state.schedules[stream]),
    )
    more = dict[str, torch.Tensor]()
    if recall is not None:
        saved.recall, more = recall_record(recall.catch_up(), begun=counters.seen > 0, shift=recall.slots.shift)
    if not counters.seen:
        return saved
    counters = _as_pruned(state, stream)
    pinned = counters.pinned if counters.pruned else 0
    saved.counts = StreamCounts(
        rows=1,
        seen=counters.seen,
        kept=counters.kept,
        pinned=pinned,
        first_window=counters.first_window if counters.pruned else 0,
        base=counters.base,
        events=counters.events,
        rebases=counters.rebases,
    )
    window = window_slots(state, stream, counters.first_window, counters.window)
    slots = torch.cat([_pinned_slots(state, counters), window])
    channels = {f"channel_{name}": c for name, c in state.channels.items()}
    source = {"keys": state.keys, "values": state.values, **channels}
    saved.tensors = {name: buffer[:, one].index_select(3, slots) for name, buffer in source.items()}
    saved.tensors |= more
    if pinned:
        copy_sinks(state, stream)
        keys, positions = state.pinned_keys[:, one, :, :pinned].clone(), pinned_tokens(state, stream)[..., :pinned]
        if recall is not None and counters.recalled:
            keys, positions = _with_recalled(recall, keys, positions)
        saved.tensors |= {"pinned_keys": keys, "pinned_positions": positions}
    if state.policy.scorer is not None and state.observed_queries:
        latest, count = latest_queries(state, stream), min(counters.seen, state.observed_queries)
        saved.tensors["queries"] = torch.stack([latest.latest(layer, count) for layer in range(state.spec.layers)])
    if stream not in state.stale_logits:
        saved.tensors["logits"] = state.logits[one].clone()
    return saved


@torch.no_grad()
def fill_stream(
    state: StreamState, stream: int, saved: SavedStream, path: str | Path, recall: StreamRecall | None = None
) -> None:
    """Let a stream go on where a saved one of one row was; what is saved has been checked but for its schedule.

    Raises as `load`; the stream is as it was then.
    """
    policy = _policy_for(saved, state)
    c, schedule = saved.counts, saved_schedule(saved, policy, path)
    memory, shift = None, 0
    if recall is not None and c.rows:
        memory = recall.memory.beside() if recall.memory.archive is not None else recall.memory.empty()
        memory = watching(memory, state)
        shift = fill_recall(memory, saved, path, state.spec, state.device)
        schedule.hold(c.kept)  # what a prune that is due has dropped already is in the archive
    state.clear(stream, sink=policy.sink)
    if not c.rows:
        return
    one, counters, tensors = slice(stream, stream + 1), state.counters[stream], saved.tensors
    gone = schedule.cached - c.kept  # a prune that is due before the next token is done already
    counters.seen, counters.base, counters.pruned = c.seen, c.base, c.pruned
    counters.events, counters.rebases = c.events, c.rebases
    counters.first_window = c.first_window - gone if c.pruned else counters.sink
    counters.refreshed_at = c.seen if gone else -1
    state.schedules[stream] = schedule
    recalled = 0 if memory is None else len(memory.frame)
    pinned = counters.pinned
    window = window_slots(state, stream, counters.first_window + gone, c.kept - pinned - recalled)
    slots = torch.cat([_pinned_slots(state, counters), window])
    for name, buffer in {"keys": state.keys, "values": state.values}.items():
        buffer[:, one].index_copy_(3, slots, _without_recalled(tensors[name], pinned, recalled).to(state.device))
    for name, buffer in state.channels.items():
        buffer[:, one].index_copy_(3, slots, tensors[f"channel_{name}"].to(state.device))
    if c.pruned and pinned:
        state.pinned_keys[:, one, :, :pinned] = tensors["pinned_keys"][..., :pinned, :].to(state.device)
        state.pinned_positions[:, one] = tensors["pinned_positions"][..., counters.sink : pinned].to(state.device)
        if saved.frame != "fixed":
            write_pinned(state, stream, slice(0, pinned))
    if recall is not None and memory is not None:
        recall.go_on(memory)
        if recalled:
            _set_frame(recall, saved, slice(pinned, pinned + recalled), shift)
    if state.queries is not None and "queries" in tensors:
        queries = tensors["queries"].to(state.device)
        places = torch.arange(c.seen - queries.shape[3], c.seen, device=state.device) % state.observed_queries
        state.queries[:, one].index_copy_(3, places, queries)
    logits = tensors.get("logits", tensors.get("log_probs"))  # the same distribution
    if logits is None:
        state.stale_logits.add(stream)
    else:
        state.logits[stream] = logits.flatten().to(state.device)


def _pinned_slots(state: StreamState, counters: Counters) -> torch.Tensor:
    """Slots ``(pinned,)``, int64, of the pinned entries: behind the frame of recalled tokens while that is empty."""
    first = 0 if counters.recalled else state.geometry.framed
    return torch.arange(first, first + counters.pinned, device=state.device)


def _without_recalled(entries: torch.Tensor, pinned: int, recalled: int) -> torch.Tensor:
    """Entries ``(layers, 1, kv_heads, kept, head_dim)`` but for the recalled ones, which come behind the pinned."""
    if not recalled:
        return entries
    return torch.cat([entries[..., :pinned, :], entries[..., pinned + recalled :, :]], SLOT_AXIS)


def _with_recalled(
    recall: StreamRecall, keys: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Unrotated keys and positions of the sinks, and of the recalled tokens behind them."""
    sink, frame = keys.shape[SLOT_AXIS], recall.memory.frame
    rotated = recall.state.keys[..., sink : sink + len(frame), :]
    keys = torch.cat([keys, unrotated(recall.state.spec.rope, rotated, sink + recall.slots.shift)], SLOT_AXIS)
    tokens = torch.tensor(frame, dtype=torch.int64, device=positions.device).view(1, 1, 1, -1)
    return keys, torch.cat([positions, tokens], SLOT_AXIS)


def _set_frame(recall: StreamRecall, saved: SavedStream, recalled: slice, shift: int) -> None:
    """Put the recalled tokens of a file, which are those entries of it, into the frame."""
    device = recall.keys.device
    keys, values = (saved.tensors[name][..., recalled, :].to(device) for name in ("pinned_keys", "values"))
    recall.recall(lambda: (keys, values), saved.tensors["pinned_positions"][..., recalled], shift=shift)
    recall.slots.write()
    if saved.frame == "fixed":  # rotated already: bit for bit
        recall.keys[..., recalled, :] = saved.tensors["keys"][..., recalled, :].to(device)


def _as_pruned(state: StreamState, stream: int) -> Counters:
    """The counters of a stream, for its file.

    Where the pinned tokens were chosen for a step that then failed, the counters are those after that prune.
    """
    counters = Counters(**vars(state.counters[stream]))
    if counters.refreshed_at == counters.seen:
        drop = state.schedules[stream].plan(1)[0].drop
        counters.first_window += counters.leaving(drop)
        counters.pruned = True
    return counters
