"""A cache's side of `stream_file`: what a stream holds, as a file holds it, and back."""

from pathlib import Path

import torch

from sinkstream.cache.channels import UNCERTAINTY
from sinkstream.cache.conversation import SeenTokens
from sinkstream.cache.recall_file import fill_recall, recall_record, recall_shapes
from sinkstream.cache.stream import Stream
from sinkstream.cache.stream_file import (
    SavedStream,
    StreamCounts,
    check_tensors,
    saved_schedule,
    schedule_record,
)


@torch.no_grad()
def stream_record(stream: Stream, model: dict) -> SavedStream:
    """What a stream holds; the tensors are views of it.

    Parameters
    ----------
    model : dict
        See `stream_file.identity`.
    """
    ring, observer = stream.ring, stream.observer
    saved = SavedStream(
        model=model,
        policy=stream.policy.record(),
        positions=stream.positions,
        frame="window",
        scaling=observer.scaling if observer else 1.0,
        counts=StreamCounts(),
        schedule=schedule_record(stream.schedule),
    )
    more = dict[str, torch.Tensor]()
    if stream.recall is not None:
        begun = ring is not None and ring.seen > 0
        shift = 0 if ring is None else ring.recall_shift
        saved.recall, more = recall_record(stream.recall, begun=begun, shift=shift)
    if ring is None or not ring.seen:
        return saved
    saved.counts = StreamCounts(
        rows=ring.keys.shape[1],
        seen=ring.seen,
        kept=ring.live,
        pinned=ring.pinned,
        first_window=ring.first_window,
        base=ring.base,
        start=ring.start,
        events=stream.events,
        rebases=ring.rebases,
    )
    own = ("keys", "values")
    saved.tensors = {n if n in own else f"channel_{n}": t for n, t in ring.stored.items()}
    saved.tensors |= {"pinned_keys": ring.pinned_keys, "pinned_positions": ring.pinned_positions}
    if stream.sliding is not None:
        saved.tensors |= {f"sliding_{name}": t for name, t in stream.sliding.needed.items()}
    if observer is not None and observer.queries:
        saved.tensors["queries"] = torch.stack([observer.queries[i] for i in range(len(stream.spec.full_layers))])
    saved.tensors |= more
    if stream.log_probs is not None:
        saved.tensors["log_probs"] = stream.log_probs
    if stream.seen_ids is not None:
        saved.seen, tensors = stream.seen_ids.saved()
        saved.tensors |= tensors
    return saved


@torch.no_grad()
def fill_stream(stream: Stream, saved: SavedStream, path: str | Path, device: torch.device) -> None:
    """Let a stream go on where a saved one was; of the same model, policy and positions (`stream_file.check_fits`).

    Raises
    ------
    ValueError
        If what is saved does not fit together; the stream is as it was then.
    """
    check_tensors(saved, path, stream.spec, stream.policy, recall_shapes(saved, path, stream.spec))
    c, schedule = saved.counts, saved_schedule(saved, stream.policy, path)
    seen_ids = _seen_ids(saved, path, device) if stream.remembers_ids else None
    stream.clear()
    if not c.rows:
        return
    logits = saved.tensors.get("logits") if UNCERTAINTY & stream.policy.needs else None
    ring = stream.resume(schedule, device, batch=c.rows, logits=None if logits is None else logits.to(device))
    lead = len(stream.spec.full_layers), c.rows, stream.spec.kv_heads
    pinned_keys = saved.tensor("pinned_keys", *lead, 0, stream.spec.head_dim)
    pinned_positions = saved.tensor("pinned_positions", 1, 1, 1, 0, dtype=torch.int64)
    with torch.inference_mode(False):  # as the buffers
        ring.load(
            {name.removeprefix("channel_"): t.to(device) for name, t in saved.tensors.items()},
            torch.arange(c.kept, device=device),
            base=c.base,
            first_window=c.first_window,
            pinned_keys=pinned_keys.to(device) if c.pruned else None,
            pinned_positions=pinned_positions.to(device) if c.pruned else None,
            start=c.start if c.start + c.kept <= ring.capacity else 0,
        )
        if stream.sliding is not None:
            none = len(stream.sliding.keys), c.rows, stream.spec.kv_heads, 0, stream.spec.head_dim
            keys, values = (saved.tensor(f"sliding_{name}", *none) for name in ("keys", "values"))
            stream.sliding.load(keys, values, c.base)
    if stream.recall is not None:
        shift = fill_recall(stream.recall, saved, path, stream.spec, device)
        ring.hold_recalled(len(stream.recall.frame), shift)
    ring.rebases, stream.events, stream.seen_ids = c.rebases, c.events, seen_ids
    if stream.observer is not None:
        stream.observer.scaling = saved.scaling
        stream.observer.queries = dict(enumerate(saved.tensor("queries", 0).to(device)))
    if "log_probs" in saved.tensors:
        stream.log_probs = saved.tensors["log_probs"].to(device)


def _seen_ids(saved: SavedStream, path: str | Path, device: torch.device) -> SeenTokens | None:
    """The ids of a saved stream; None where they are not known. Raises ValueError if they are damaged."""
    if saved.seen is None:
        return None
    rows = saved.counts.rows
    ids = SeenTokens(rows, device)
    try:
        ids.load(saved.seen, saved.tensor("seen_ids", rows, 0, dtype=torch.int32), saved.tensor("seen_hash", 0))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is damaged: the tokens seen do not fit ({error})") from None
    return ids
