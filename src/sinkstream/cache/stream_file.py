"""The file of a stream: one safetensors file that caches and engines write and read.

What is cached lies in stream order: pinned entries first, the window behind them, oldest first. So a stream goes on in
a soft ring or in a static one, at any token. The header says which model, policy and positions the stream belongs to;
every tensor has a checksum there, and the header has one beside it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from safetensors import safe_open
from safetensors.torch import load as tensors_of_bytes

from sinkstream import __version__
from sinkstream.archive import RecallSettings
from sinkstream.cache.channels import UNCERTAINTY, kept_channels
from sinkstream.cache.families import ModelSpec
from sinkstream.cache.tensor_file import checksum, write_tensors
from sinkstream.policies import EvictionPolicy, PruneSchedule
from sinkstream.records.files import replaced_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = 2
HEADER_CHECKSUM = "checksum"  # in the metadata; files of before 2026-11-27, 15:00 UTC have none
PLACE_OF_ARCHIVE = ("bytes", "file", "file_bytes")  # settings of recall that a loaded stream has anew
NOT_SAID = {"behind": 0, "alarms": 0}  # settings of recall that files did not always say
OF_MACHINE = (*PLACE_OF_ARCHIVE, "step_bytes")  # settings of recall that a loaded stream may have otherwise
FRAMES = ("window", "fixed")  # where the pinned keys of a file lie: right before the window, or at positions 0, 1, …
ROW_AXIS = {"logits": 0, "log_probs": 0, "seen_ids": 0, "seen_hash": 0}  # of all other tensors: 1
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class StreamCounts:
    """How far a stream is.

    Attributes
    ----------
    rows : int
        Of the batch; 0 before the first token.
    seen, kept, pinned : int
        Tokens appended since the beginning; entries cached; those of them in the pinned frame.
    first_window : int
        Token index of the oldest window token; 0 before the first prune.
    base : int
        Token index of window position 0.
    start : int
        Slot of the oldest entry in the buffer of a cache, so that copies back come when they would have come.
    events, rebases : int
    """

    rows: int = 0
    seen: int = 0
    kept: int = 0
    pinned: int = 0
    first_window: int = 0
    base: int = 0
    start: int = 0
    events: int = 0
    rebases: int = 0

    @property
    def pruned(self) -> bool:
        """Whether a prune has happened."""
        return self.first_window > 0


@dataclass
class SavedStream:
    """What a file holds.

    Attributes
    ----------
    model : dict
        See `identity`.
    policy : dict
        `EvictionPolicy.record`.
    positions : {"cache", "original"}
    frame : {"window", "fixed"}
        Where the pinned entries of ``keys`` lie.
    scaling : float
        Of attention scores.
    counts : StreamCounts
    schedule : dict
        See `schedule_record`.
    recall : dict or None
        See `recall_file.recall_record`; None without recall.
    seen : dict or None
        ``hashed`` and ``complete`` of `SeenTokens`; None where the ids of the stream are not known.
    tensors : dict of Tensor
        keys, values : (layers, rows, kv_heads, kept, head_dim), dtype of the model; `layers` are those that stream.
        sliding_keys, sliding_values : (sliding layers, rows, kv_heads, at most window - 1, head_dim), likewise; of
            models with layers that slide.
        pinned_keys : (layers, rows, kv_heads, pinned, head_dim), float32, not rotated.
        pinned_positions : (layers or 1, rows or 1, kv_heads or 1, pinned), int64, token indices.
        channel_NAME : (layers or 1, rows, kv_heads or 1, kept), float32.
        queries : (layers, rows, query_heads, latest, head_dim), dtype of the model, at their window positions.
        logits or log_probs : (rows, vocab) or (rows, 1, vocab), float32, after the last token; optional.
        seen_ids, seen_hash : (rows, latest), int32, and (rows,), int64; where `seen` is given.
        archive_NAME, recall_NAME : of one row, where `recall` is given.
        Tensors without elements are left out.
    """

    model: dict[str, Any]
    policy: dict[str, Any]
    positions: str
    frame: str
    scaling: float
    counts: StreamCounts
    schedule: dict[str, Any]
    seen: dict[str, Any] | None = None
    recall: dict[str, Any] | None = None
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def tensor(self, name: str, *empty: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A tensor by name; where the file has none, one of the shape `empty`, which has no elements."""
        return self.tensors[name] if name in self.tensors else torch.zeros(empty, dtype=dtype)

    def row(self, index: int) -> SavedStream:
        """One row of a batch, as a stream of its own."""
        if self.recall is not None:  # which serves one row
            return self
        rows = {}
        for name, tensor in self.tensors.items():
            axis = ROW_AXIS.get(name, 1)
            rows[name] = tensor if tensor.shape[axis] == 1 else tensor.narrow(axis, index, 1)
        counts = StreamCounts(**asdict(self.counts) | {"rows": 1})
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("counts", "tensors")}
        return SavedStream(**own, counts=counts, tensors=rows)


# ---- which model and which policy ----


@torch.no_grad()
def fingerprint(model: PreTrainedModel) -> str:
    """Hash of a model's shape and weights: the same for the same weights in the same dtype, on any device.

    Every row of every parameter enters through the exact sum of its bit patterns, so that no weight can change unseen.
    """
    digest = hashlib.sha256(model.config.model_type.encode())
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        bits = parameter.detach().view(_INTEGERS[parameter.dtype.itemsize])
        digest.update(bits.sum(-1, dtype=torch.int64).cpu().numpy().tobytes())
    return digest.hexdigest()


def identity(spec: ModelSpec, weights: str) -> dict[str, Any]:
    """What identifies a model: family, shape, dtype, and `weights`, its fingerprint."""
    shape = {name: getattr(spec, name) for name in ("family", "layers", "query_heads", "kv_heads", "head_dim")}
    if spec.sliding is not None:
        shape |= {"sliding_window": spec.sliding.window, "sliding_layers": list(spec.sliding.layers)}
    return shape | {"dtype": str(spec.dtype).removeprefix("torch."), "weights": weights}


def saved_policy(saved: SavedStream, path: str | Path) -> EvictionPolicy:
    """The policy of a file. Raises ValueError if this release cannot build it."""
    options = {k: v for k, v in saved.policy.items() if k not in ("growth", "peak")}
    try:
        return EvictionPolicy.build(**options)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{str(path)!r} was saved under a policy that is not accepted here: {error}") from None


def check_fits(
    saved: SavedStream,
    path: str | Path,
    *,
    model: dict[str, Any],
    policy: EvictionPolicy,
    positions: str,
    recall: RecallSettings | None = None,
) -> None:
    """Raise ValueError, naming the first difference, unless a file is of this model, policy, positions and recall."""
    mine = json.loads(
        json.dumps(
            {
                "model": model,
                "policy": policy.record(),
                "positions": {"positions": positions},
                "recall": _compared(None if recall is None else recall.record()),
            }
        )
    )
    found = {"model": saved.model, "policy": saved.policy, "positions": {"positions": saved.positions}}
    found["recall"] = _compared(None if saved.recall is None else NOT_SAID | saved.recall.get("settings", {}))
    for what, known in mine.items():
        theirs = found[what]
        names = [*known, *sorted(theirs.keys() - known.keys())]
        name = next((n for n in names if known.get(n) != theirs.get(n)), None)
        if name is not None:
            kinds = {
                "model": "with another model",
                "policy": "under another policy",
                "positions": "with other positions",
                "recall": "with other recall",
            }
            raise ValueError(
                f"{str(path)!r} was saved {kinds[what]}: {name}={_short(theirs.get(name))};"
                f" accepted: {name}={_short(known.get(name))}"
            )


def _compared(recall: dict[str, Any] | None) -> dict[str, Any]:
    """What recall must have in common; what the machine says is the cache's own."""
    return {"recall": None} if recall is None else {n: v for n, v in recall.items() if n not in OF_MACHINE}


def check_tensors(
    saved: SavedStream,
    path: str | Path,
    spec: ModelSpec,
    policy: EvictionPolicy,
    more: Mapping[str, tuple[tuple[int, ...], torch.dtype]] | None = None,
) -> None:
    """Raise ValueError if a tensor is missing, or of another shape or dtype than the header says, and `more` wants."""
    c, dtype, f32 = saved.counts, spec.dtype, torch.float32
    heads, queries = (len(spec.full_layers), c.rows, spec.kv_heads), 0
    if policy.scorer is not None:
        queries = min(c.seen, policy.scorer.observed_queries)
    wanted: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "keys": ((*heads, c.kept, spec.head_dim), dtype),
        "values": ((*heads, c.kept, spec.head_dim), dtype),
        "pinned_keys": ((*heads, c.pinned, spec.head_dim), f32),
        "queries": ((heads[0], c.rows, spec.query_heads, queries, spec.head_dim), dtype),
    }
    if spec.sliding is not None:
        held = (len(spec.sliding.layers), *heads[1:], min(c.seen, spec.sliding.window - 1), spec.head_dim)
        wanted |= dict.fromkeys(("sliding_keys", "sliding_values"), (held, dtype))
    for channel in kept_channels(policy):
        lead = (heads[0], c.rows, heads[2]) if channel.per_head else (1, c.rows, 1)
        wanted[f"channel_{channel.name}"] = ((*lead, c.kept), f32)
    wanted |= more or {}
    if c.pinned:
        found = saved.tensors.get("pinned_positions", torch.zeros(0, dtype=torch.int64))
        axes = tuple(a if a == 1 else b for a, b in zip(found.shape, heads))
        wanted["pinned_positions"] = ((*axes, c.pinned), torch.int64)
    for name, (shape, kind) in wanted.items():
        tensor = saved.tensor(name, *shape, dtype=kind) if 0 in shape else saved.tensors.get(name)
        if tensor is None or tensor.shape != shape or tensor.dtype != kind:
            is_there = "missing" if tensor is None else f"{tuple(tensor.shape)} of {tensor.dtype}"
            raise ValueError(f"{str(path)!r} is damaged: {name} is {is_there}; accepted: {shape} of {kind}")
    known = wanted.keys() | {
        "logits",
        "log_probs",
        "pinned_positions",
        *(("seen_ids", "seen_hash") if saved.seen else ()),
    }
    unknown = sorted(saved.tensors.keys() - known)
    if unknown:
        raise ValueError(f"{str(path)!r} is damaged: it holds {unknown[0]}; accepted: {', '.join(sorted(known))}")
    if c.rows and UNCERTAINTY & policy.needs and not {"logits", "log_probs"} & saved.tensors.keys():
        raise ValueError(f"{str(path)!r} is damaged: logits are missing, which its policy reads")


# ---- writing and reading ----


def checked_path(path: str | Path) -> Path:
    """The path that a caller gave. Raises ValueError if it is none: swapped arguments are the usual reason."""
    named = os.fspath(path) if isinstance(path, str | os.PathLike) else None
    if isinstance(named, str) and named and "\0" not in named:
        return Path(named)
    shown = repr(path) if isinstance(path, str | bytes | int | None) else type(path).__name__
    raise ValueError(f"path={shown} is not accepted; accepted: a str or a Path of a file")


def write_stream(path: str | Path, saved: SavedStream) -> Path:
    """Write a file, atomically; an older one is replaced.

    Raises
    ------
    ValueError
        If `path` is no path.
    WriteError
        If the file cannot be written; the older one is as it was.
    """
    path = checked_path(path)
    size = sum(t.numel() * t.dtype.itemsize for t in saved.tensors.values())
    with replaced_file(path, size) as file:
        _write_stream(file, saved)
    return path


def stream_bytes(saved: SavedStream) -> bytes:
    """What the file of a stream holds."""
    file = io.BytesIO()
    _write_stream(file, saved)
    return file.getvalue()


def _write_stream(file: BinaryIO, saved: SavedStream) -> None:
    header = {f.name: getattr(saved, f.name) for f in fields(saved) if f.name != "tensors"}
    header |= {"format": FORMAT, "sinkstream": __version__, "counts": asdict(saved.counts)}

    tensors = {name: t for name, t in saved.tensors.items() if t.numel()}

    def metadata(checksums: Mapping[str, int]) -> dict[str, str]:
        text = json.dumps(header | {"checksums": checksums})
        return {"sinkstream": text, HEADER_CHECKSUM: _header_checksum(text, tensors)}

    write_tensors(file, tensors, metadata)


def _header_checksum(text: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """CRC-32 of what a file says about its stream and about the kinds of its tensors; 8 hexadecimal digits."""
    kinds = [(name, str(tensors[name].dtype), tuple(tensors[name].shape)) for name in sorted(tensors)]
    return f"{zlib.crc32((text + repr(kinds)).encode()):08x}"


def read_stream(path: str | Path) -> SavedStream:
    """Read a file that `write_stream` wrote.

    Raises
    ------
    ValueError
        If `path` is no path, there is no such file, or the file is no stream, of another format, truncated or damaged.
    """
    if not os.path.isfile(checked_path(path)):
        raise ValueError(f"there is no file {str(path)!r}")
    try:
        file = safe_open(str(path), "pt")
    except Exception as error:
        raise ValueError(f"{str(path)!r} is not a safetensors file, or is truncated: {error}") from None
    with file:
        metadata = file.metadata()
        return _saved_stream(metadata, lambda: {name: file.get_tensor(name) for name in file.keys()}, path)  # noqa: SIM118


def stream_of_bytes(data: bytes) -> SavedStream:
    """Read what `stream_bytes` gave. Raises ValueError as `read_stream`."""
    try:
        tensors = tensors_of_bytes(data)
        size = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + size]).get("__metadata__")
    except Exception as error:
        raise ValueError(f"these bytes are not a safetensors file, or are truncated: {error}") from None
    return _saved_stream(metadata, lambda: tensors, "in memory")


def _saved_stream(
    metadata: Mapping[str, str] | None, read_tensors: Callable[[], dict[str, torch.Tensor]], path: str | Path
) -> SavedStream:
    header, tensors = _header(metadata, path), read_tensors()
    assert metadata is not None, "it has a header"
    if metadata.get(HEADER_CHECKSUM, known := _header_checksum(metadata["sinkstream"], tensors)) != known:
        raise ValueError(f"{str(path)!r} is damaged: its header is not what was written")
    checksums = header["checksums"]
    for name in sorted(checksums.keys() | tensors.keys()):
        if name not in tensors or checksums.get(name) != checksum(tensors[name]):
            raise ValueError(f"{str(path)!r} is damaged: {name} is not what was written")
    names = [f.name for f in fields(SavedStream) if f.name not in ("tensors", "counts")]
    counts = StreamCounts(**header["counts"])
    return SavedStream(**{name: header[name] for name in names}, counts=counts, tensors=tensors)


def _header(metadata: Mapping[str, str] | None, path: str | Path) -> dict[str, Any]:
    if metadata is None or "sinkstream" not in metadata:
        raise ValueError(f"{str(path)!r} holds no stream; accepted: a file of cache.save() or engine.snapshot()")
    try:
        header = json.loads(metadata["sinkstream"])
    except ValueError:
        header = None
    if not isinstance(header, dict):
        raise ValueError(f"{str(path)!r} is damaged: its header cannot be read")
    if header.get("format") != FORMAT:
        raise ValueError(
            f"{str(path)!r} has format {header.get('format')} (written by sinkstream {header.get('sinkstream')});"
            f" accepted: format {FORMAT}"
        )
    kinds = {"model": dict, "policy": dict, "positions": str, "frame": str, "scaling": float, "counts": dict}
    kinds |= {"schedule": dict, "checksums": dict}
    wrong = [name for name, kind in kinds.items() if not isinstance(header.get(name), kind)]
    if not wrong and header["frame"] not in FRAMES:
        wrong = ["frame"]
    if not wrong and sorted(header["counts"]) != sorted(f.name for f in fields(StreamCounts)):
        wrong = ["counts"]
    if wrong or not all(isinstance(n, int) and n >= 0 for n in header["counts"].values()):
        raise ValueError(f"{str(path)!r} is damaged: its header lacks {(wrong or ['counts'])[0]!r}")
    return header | {name: header.get(name) for name in ("seen", "recall")}


def _short(value: Any) -> str:
    return f"{value[:12]}…" if isinstance(value, str) and len(value) > 40 else repr(value)


# ---- what the policy has counted and observed ----


def schedule_record(schedule: PruneSchedule) -> dict[str, Any]:
    """The counts of a schedule and the state of its triggers, JSON-able; floats survive exactly."""
    return _plain(vars(schedule))


def saved_schedule(saved: SavedStream, policy: EvictionPolicy, path: str | Path) -> PruneSchedule:
    """The schedule of a file. Raises ValueError if it is not one of this policy."""
    schedule = PruneSchedule(policy)
    try:
        _refill(schedule, saved.schedule)
        if not 0 <= saved.counts.kept <= schedule.cached <= saved.counts.seen:
            raise ValueError(f"{saved.counts.kept} entries of {schedule.cached}")
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is damaged: its schedule is not one of its policy ({error})") from None
    return schedule


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items() if k != "policy"}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if is_dataclass(value) or hasattr(value, "__dict__"):
        return _plain(vars(value))
    return value


def _refill(target: Any, saved: dict[str, Any]) -> None:
    """Set the attributes of a fresh object, and of the objects in it, to saved values."""
    for name, value in saved.items():
        current = getattr(target, name)
        if isinstance(current, list) and all(inner is None or isinstance(inner, dict) for inner in value):
            for inner, inner_saved in zip(current, value):
                if inner is not None:
                    _refill(inner, inner_saved)
        elif isinstance(value, dict):
            _refill(current, value)
        else:
            setattr(target, name, value)
