"""Snapshots: one stream in one safetensors file, to go on with later, bit for bit, on any backend."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load as tensors_of_bytes
from safetensors.torch import save as safetensors_bytes
from transformers import PreTrainedModel

from sinkstream import __version__
from sinkstream.engine.geometry import Counters
from sinkstream.engine.state import StreamState
from sinkstream.policies import PruneSchedule
from sinkstream.records.files import write_atomically

FORMAT = 1
COUNTED = [f.name for f in fields(Counters) if f.name != "geometry"]
HEADER = ("format", "sinkstream", "model", "policy", "positions", "counters", "schedule")


@torch.no_grad()
def fingerprint(model: PreTrainedModel) -> str:
    """Hash of a model's shape and weights: the same for the same weights in the same dtype, on any device.

    Every row of every parameter enters through the exact sum of its bit patterns, so that no weight can change unseen.
    """
    digest = hashlib.sha256(model.config.model_type.encode())
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        bits = parameter.detach().view(torch.int16 if parameter.dtype.itemsize == 2 else torch.int32)
        digest.update(bits.sum(-1, dtype=torch.int64).cpu().numpy().tobytes())
    return digest.hexdigest()


def save(path: str | Path, state: StreamState, stream: int, *, model_hash: str) -> None:
    """Write one stream to a file.

    Parameters
    ----------
    path : str or Path
        An existing file is replaced, in one piece.

    Raises
    ------
    WriteError
        If the file cannot be written; an older one stays as it was.
    """
    write_atomically(path, dump(state, stream, model_hash=model_hash))


def dump(state: StreamState, stream: int, *, model_hash: str) -> bytes:
    """One stream as the bytes of its snapshot."""
    state.settle()
    counters = {name: getattr(state.counters[stream], name) for name in COUNTED}
    header = {
        "format": FORMAT,
        "sinkstream": __version__,
        "model": model_hash,
        "policy": state.policy.record(),
        "positions": "original" if state.geometry.original else "cache",
        "counters": counters,
        "schedule": _plain(vars(state.schedules[stream])),
        "rewound": stream in state.rewound,
    }
    tensors = {name: t.cpu().contiguous().clone() for name, t in state.stream_buffers(stream).items() if t.numel()}
    return safetensors_bytes(tensors, metadata={"sinkstream": json.dumps(header)})


def load(path: str | Path, state: StreamState, stream: int, *, model_hash: str) -> None:
    """Read a file that `save` wrote into one stream.

    Raises
    ------
    ValueError
        If the file is no snapshot, or one of another format, model, policy or kind of positions; the stream is left as
        it was.
    """
    if not Path(path).is_file():
        raise ValueError(f"there is no snapshot {str(path)!r}")
    try:
        file = safe_open(str(path), "pt")
    except Exception as error:
        raise ValueError(f"{str(path)!r} is not a safetensors file: {error}") from None
    with file:
        header = _header(file.metadata(), path)
        _check_header(header, state, model_hash, path)
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    _take(state, stream, header, tensors, path)


def undump(data: bytes, state: StreamState, stream: int, *, model_hash: str) -> None:
    """Read the bytes that `dump` gave into one stream. Raises ValueError as `load`."""
    try:
        tensors = tensors_of_bytes(data)
        size = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + size]).get("__metadata__")
    except Exception as error:
        raise ValueError(f"these bytes are not a safetensors file: {error}") from None
    header = _header(metadata, "in memory")
    _check_header(header, state, model_hash, "in memory")
    _take(state, stream, header, tensors, "in memory")


def _take(
    state: StreamState, stream: int, header: dict[str, Any], tensors: dict[str, torch.Tensor], path: str | Path
) -> None:
    """Fill a stream with what a snapshot holds, once all of it is known to fit."""
    buffers = {name: b for name, b in state.stream_buffers(stream).items() if b.numel()}
    for name, buffer in buffers.items():
        if name not in tensors or tensors[name].shape != buffer.shape or tensors[name].dtype != buffer.dtype:
            raise ValueError(f"snapshot {str(path)!r} does not fit: {name} is missing or of another shape or dtype")
    state.clear(stream)
    for name, buffer in buffers.items():
        buffer.copy_(tensors[name])
    for name, value in header["counters"].items():
        setattr(state.counters[stream], name, value)
    state.schedules[stream] = _schedule(state, header["schedule"])
    if header.get("rewound"):
        state.rewound.add(stream)


def _header(metadata: Mapping[str, str] | None, path) -> dict[str, Any]:
    if metadata is None or "sinkstream" not in metadata:
        raise ValueError(f"{str(path)!r} is not a snapshot of a sinkstream engine")
    try:
        header = json.loads(metadata["sinkstream"])
    except ValueError:
        header = None
    absent = [name for name in HEADER if not isinstance(header, dict) or name not in header]
    if absent and (not isinstance(header, dict) or header.get("format") == FORMAT):
        raise ValueError(f"snapshot {str(path)!r} is damaged: its header lacks {absent[0]!r}")
    return header


def _check_header(header: dict[str, Any], state: StreamState, model_hash: str, path) -> None:
    if header.get("format") != FORMAT:
        raise ValueError(
            f"snapshot {str(path)!r} has format {header.get('format')} (written by sinkstream"
            f" {header.get('sinkstream')});"
            f" accepted: format {FORMAT}"
        )
    if header["model"] != model_hash:
        raise ValueError(
            f"snapshot {str(path)!r} was taken with another model ({header['model'][:12]}…); accepted: one taken with"
            f" this model and dtype ({model_hash[:12]}…)"
        )
    mine = json.loads(json.dumps(state.policy.record()))
    different = sorted(k for k in mine.keys() | header["policy"].keys() if mine.get(k) != header["policy"].get(k))
    if different:
        k = different[0]
        raise ValueError(
            f"snapshot {str(path)!r} was taken under another policy: {k}={header['policy'].get(k)!r};"
            f" accepted: {k}={mine.get(k)!r}"
        )
    if sorted(header["counters"]) != sorted(COUNTED):
        raise ValueError(f"snapshot {str(path)!r} is damaged: it counts {', '.join(sorted(header['counters']))}")
    positions = "original" if state.geometry.original else "cache"
    if header["positions"] != positions:
        raise ValueError(
            f"snapshot {str(path)!r} has positions={header['positions']!r}; accepted: positions={positions!r}"
        )


def _plain(value: Any) -> Any:
    """Plain JSON of a schedule's counts and of the state of its triggers; floats survive exactly."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items() if k != "policy"}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if is_dataclass(value) or hasattr(value, "__dict__"):
        return _plain(vars(value))
    return value


def _schedule(state: StreamState, saved: dict[str, Any]) -> PruneSchedule:
    schedule = PruneSchedule(state.policy)
    _refill(schedule, saved)
    return schedule


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
