"""What recall adds to the file of a stream: archive, frame and events, and what a chooser reads.

The index of a chooser is not written: it is made again of the archived ids, and of the keys of its heads if it has any.
"""

import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from sinkstream.archive import CHOOSERS, PREFIX, Archive, Evicted, RecallSettings, Span
from sinkstream.archive.kv import BLOCK
from sinkstream.cache.families import ModelSpec
from sinkstream.cache.recall import EVENTS, Recall
from sinkstream.cache.recall_times import Coming, RecallEvent
from sinkstream.cache.stream_file import NOT_SAID, PLACE_OF_ARCHIVE, SavedStream

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


def recall_options(saved: SavedStream, path: str | Path, options: dict[str, Any]) -> dict[str, Any]:
    """Options of a cache, and where they have no ``recall`` those of the file. Raises ValueError if nobody knows it."""
    if saved.recall is None or "recall" in options:
        return options
    found = NOT_SAID | saved.recall.get("settings", {})
    if found.get("recall") not in CHOOSERS:
        raise ValueError(
            f"{str(path)!r} was saved with a chooser of its user's own, {found.get('recall')}; give recall=CHOOSER"
        )
    named = {PREFIX + name: v for name, v in found.items() if name not in ("recall", *PLACE_OF_ARCHIVE)}
    accepted = {f.name for f in (*fields(RecallSettings), *fields(CHOOSERS[found["recall"]]))}
    named = {name: v for name, v in named.items() if name.removeprefix(PREFIX) in accepted}
    return {"recall": found["recall"]} | named | options


def recall_record(recall: Recall, *, begun: bool, shift: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What the header of a file says of recall, and tensors; those of the archive are views of it.

    Parameters
    ----------
    begun : bool
        Whether the stream holds a token.
    shift : int
        How far in front of their place behind the sinks the recalled tokens stand.

    Raises
    ------
    ValueError
        If the index of a chooser does not give back the keys that it was given.
    """
    archive, chooser, log = recall.archive, recall.settings.chooser, recall.log
    record: dict[str, Any] = {"settings": recall.settings.record(), "archive": None, "borders": _borders(recall)}
    if not begun:
        return record, {}
    ids = log.read(log.first, log.end)
    tensors = {"recall_log": torch.tensor(ids, dtype=torch.int32)}
    if archive is not None:
        record["archive"] = {"first": archive.first, "tokens": len(archive), "lost": archive.lost}
        tensors["archive_ids"] = torch.tensor(archive.ids, dtype=torch.int32)
        tensors |= {f"archive_{number:06d}": block for number, block in enumerate(archive.blocks())}
        keys = recall.index.head_keys(archive.first)
        if set(keys) != set(chooser.heads):
            raise ValueError(
                f"the index of {type(chooser).__name__} does not give back the keys of its heads, so that recall cannot"
                " be saved; accepted: an index with head_keys(first), or a chooser without heads"
            )
        if keys:
            tensors["recall_keys"] = torch.stack([keys[head] for head in chooser.heads])
    if recall.queries is not None:
        record["queries"], kept = recall.queries.saved()
        tensors["recall_queries"] = kept
    if recall.question is not None:
        record["question"] = recall.question[0]
        if recall.question[1]:
            tensors["recall_question"] = torch.stack([recall.question[1][head] for head in chooser.heads])
    if recall.coming is not None:
        coming = recall.coming
        record["coming"] = {"tokens": coming.tokens, "behind": coming.behind, "event": asdict(coming.event)}
        if archive is not None and coming.tokens and coming.tokens[0] < archive.first:  # the archive has lost some
            tensors["recall_coming_keys"], tensors["recall_coming_values"] = coming.fetched()
            record["coming"]["kept"] = True
    record |= {
        "log": log.first,
        "frame": recall.frame,
        "shift": shift,
        "turns": recall.turns,
        "events": [asdict(event) for event in recall.events],
        "counts": recall.counts(),
    }
    return record, tensors


def recall_shapes(saved: SavedStream, path: str | Path, spec: ModelSpec) -> Shapes:
    """Shape and dtype of every tensor that recall adds, for `stream_file.check_tensors`."""

    def shapes() -> Shapes:
        record, found = saved.recall, Shapes()
        if record is None or not saved.counts.rows:
            return found
        found["recall_log"] = (saved.counts.seen - record["log"],), torch.int32
        heads = len(record["settings"]["heads"])
        if record["archive"] is not None:
            tokens = record["archive"]["tokens"]
            found["archive_ids"] = (tokens,), torch.int32
            lead = (2, len(spec.full_layers), spec.kv_heads)
            for number in range(-(-tokens // BLOCK) if record["settings"]["archive"] == "kv" else 0):
                size = min(BLOCK, tokens - number * BLOCK)
                found[f"archive_{number:06d}"] = (*lead, size, spec.head_dim), spec.dtype
            if heads:
                found["recall_keys"] = (heads, tokens, spec.head_dim), torch.float32
        if "queries" in record:
            layers, kept = record["queries"]["layers"], record["queries"]["kept"]
            found["recall_queries"] = (layers, spec.query_heads, kept, spec.head_dim), torch.float32
        if record.get("question") is not None and heads:
            kept = min(len(record["question"]), record["queries"]["kept"])
            groups = spec.query_heads // spec.kv_heads
            found["recall_question"] = (heads, kept, groups, spec.head_dim), torch.float32
        if (record.get("coming") or {}).get("kept"):
            size = len(spec.full_layers), 1, spec.kv_heads, len(record["coming"]["tokens"]), spec.head_dim
            found["recall_coming_keys"], found["recall_coming_values"] = (size, torch.float32), (size, spec.dtype)
        return found

    return _undamaged(shapes, path)


def fill_recall(recall: Recall, saved: SavedStream, path: str | Path, spec: ModelSpec, device: torch.device) -> int:
    """Let an empty recall go on where a saved one with the same settings was; the frame is the caller's to set.

    Parameters
    ----------
    device : torch.device
        Of the stream.

    Returns
    -------
    int
        How far in front of their place behind the sinks the recalled tokens stand.

    Raises
    ------
    ValueError
        If the archive does not fit its budget here, what is saved does not fit together, or the tokenizer, whose
        sentence borders cut what comes back, is another one.
    WriteError
        If the file of the archive cannot be made. In either case it has been deleted.
    """
    record = saved.recall
    assert record is not None, "compared by check_fits"
    theirs = record.get("borders", mine := _borders(recall))  # files did not always say them
    if theirs != mine:
        words = "another tokenizer" if theirs and mine else "a tokenizer" if theirs else "no tokenizer"
        raise ValueError(
            f"{str(path)!r} was saved with {words}, whose sentence borders cut what comes back; accepted: tokenizer="
            f"{'TOKENIZER, the same one' if theirs else 'None'}"
        )
    try:
        _fill(recall, saved, path, spec, device)
        return _undamaged(lambda: int(record["shift"]), path)
    except BaseException:
        recall.close()
        raise


def _fill(recall: Recall, saved: SavedStream, path: str | Path, spec: ModelSpec, device: torch.device) -> None:
    record = saved.recall
    assert record is not None, "compared by check_fits"
    chooser = recall.settings.chooser
    heads = {head: i for i, head in enumerate(chooser.heads)}

    def fill() -> None:
        counts, frame = saved.counts, record["frame"]
        pinned = recall.sink + len(frame) if counts.pruned else len(frame)
        if len(frame) > recall.settings.slots or counts.pinned != pinned:
            raise ValueError(f"{len(frame)} recalled tokens of {counts.pinned} pinned ones")
        recall.log.load(record["log"], saved.tensor("recall_log", 0, dtype=torch.int32).tolist())
        recall.frame, recall.turns = list(record["frame"]), list(record["turns"])
        recall.events = deque(map(_event, record["events"]), maxlen=EVENTS)
        recall.set_counts(record["counts"])
        if recall.queries is not None:
            recall.queries.load(record["queries"], saved.tensor("recall_queries", 0).to(device))
        if record.get("question") is not None:
            queries = saved.tensor("recall_question", 0).to(device)
            recall.question = record["question"], {head: queries[i] for head, i in heads.items()}

    _undamaged(fill, path)
    if record["archive"] is None:
        return
    first, end = record["archive"]["first"], record["archive"]["first"] + record["archive"]["tokens"]
    ids = saved.tensor("archive_ids", 0, dtype=torch.int32).tolist()
    blocks = [saved.tensors[name] for name in sorted(saved.tensors) if name.startswith("archive_") and name[-1:] != "s"]
    archive = recall.open_archive(first, (len(spec.full_layers), 1, spec.kv_heads, 0, spec.head_dim), spec.dtype)
    archive.refill(ids, blocks, device)
    archive.lost = record["archive"]["lost"]
    keys = saved.tensor("recall_keys", len(heads), 0, spec.head_dim).to(device)
    ids += recall.log.read(end, max(end, recall.indexed))
    recall.index.add(Evicted(first, ids, {head: keys[i] for head, i in heads.items()}))
    if record.get("coming") is not None:
        recall.coming = _undamaged(lambda: _coming(archive, saved, record["coming"], device), path)


def _coming(archive: Archive, saved: SavedStream, coming: dict[str, Any], device: torch.device) -> Coming:
    tokens, behind, event = list(coming["tokens"]), list(coming["behind"]), _event(coming["event"])
    if not coming.get("kept"):
        return Coming.of(archive, tokens, behind, event, device)
    keys, values = (saved.tensors[f"recall_coming_{name}"].to(device) for name in ("keys", "values"))
    return Coming(event.token, tokens, behind, event, lambda: (keys, values))


def _borders(recall: Recall) -> int | None:
    """A checksum of the ids behind which a sentence begins; None without a tokenizer."""
    return None if recall.borders is None else zlib.crc32(bytes(recall.borders))


def _event(saved: dict[str, Any]) -> RecallEvent:
    return RecallEvent(**saved | {"spans": tuple(Span(**span) for span in saved["spans"])})


def _undamaged(read: Callable[[], Any], path: str | Path) -> Any:
    try:
        return read()
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is damaged: its recall does not fit together ({error!r})") from None
