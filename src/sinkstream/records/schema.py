"""What a run record must contain: the keys, those that may not be null, and the per-token arrays."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

SCHEMA = "sinkstream.run/1"
STATUSES = ("complete", "partial", "failed")

_DISTRIBUTION = dict.fromkeys(("mean", "p50", "p90", "p99"))

#: Required keys; a nested dict lists the required keys of that part, None accepts any value.
REQUIRED: dict[str, Any] = {
    **dict.fromkeys(("schema", "id", "status", "status_reason", "created", "command", "arguments")),
    "environment": {
        **dict.fromkeys(("timestamp", "device", "memory_mb", "platform")),
        "git": dict.fromkeys(("commit", "dirty", "reason")),
        "versions": dict.fromkeys(
            ("python", "sinkstream", "torch", "transformers", "triton", "numpy", "tokenizers", "datasets")
        ),
        "gpu": dict.fromkeys(("name", "memory_mb", "driver", "cuda_runtime")),
        "cpu": dict.fromkeys(("model", "cores_logical", "cores_usable", "torch_threads")),
        "tf32": dict.fromkeys(("matmul", "cudnn")),
    },
    "model": dict.fromkeys(("name", "source", "hash", "n_params", "family", "trained_positions")),
    "data": dict.fromkeys(("name", "sha256", "source", "tokens")),
    "policy": dict.fromkeys(("name", "options")),
    "protocol": dict.fromkeys(
        (
            *("backend", "dtype", "device", "tf32", "seed", "cap", "prefill_tokens", "decode_tokens"),
            *("warmup_tokens", "sample_every", "repeats"),
        )
    ),
    "summary": {
        **dict.fromkeys(("decode_tokens", "scored_tokens", "timed_tokens", "mean_nll", "ppl", "tpot_ms", "ttft_ms")),
        "steady_tpot_ms": _DISTRIBUTION,
        **dict.fromkeys(("prefill_sec", "decode_sec", "total_sec", "process_sec")),
        **dict.fromkeys(("peak_memory_mb", "peak_memory_kind", "events")),
        "kv_length": dict.fromkeys(("min", "mean", "max")),
        "drop_size": {**_DISTRIBUTION, "max": None},
    },
    "tokens_file": dict.fromkeys(("name", "sha256")),
}

#: Required keys of records of studies: what their tables read, whatever the study.
STUDY_REQUIRED: dict[str, Any] = {
    **dict.fromkeys(("schema", "id", "status", "status_reason", "created", "command", "arguments")),
    "environment": REQUIRED["environment"],
    "model": REQUIRED["model"],
    "data": dict.fromkeys(("name", "sha256", "source", "tokens")),
    "policy": dict.fromkeys(("name", "label", "options")),
}

#: Fields that may not be null: without them a figure has no origin.
NOT_NULL = (
    *("schema", "id", "status", "created", "command", "arguments", "policy.name", "policy.options"),
    *("environment.timestamp", "environment.platform", "environment.versions.python"),
    *("environment.versions.sinkstream", "environment.versions.torch", "environment.versions.transformers"),
    *("environment.cpu.model", "environment.tf32.matmul"),
    *("model.name", "model.source", "model.hash", "model.family", "data.name", "data.sha256", "data.tokens"),
    *("protocol.backend", "protocol.dtype", "protocol.device", "protocol.tf32", "protocol.seed"),
    *("tokens_file.name", "tokens_file.sha256"),
)

#: Per-token arrays of every record, each (tokens,).
ARRAYS = {
    "index": np.int32,  # position of the scored token in the text, strictly increasing
    "nll": np.float32,  # negative log-likelihood in nats; NaN = not scored
    "seconds": np.float32,  # decode seconds; NaN = not timed
    "kv_length": np.int32,  # visible length, the token itself included; 0 = not measured
    "event": np.bool_,  # a prune event began at this token
    "drop_size": np.int32,  # entries dropped at this token
}
OPTIONAL_ARRAYS = {
    "entropy": np.float32,
    "risk": np.float32,
    "token_id": np.int32,
    "top1": np.int32,  # the token that was likeliest in place of the scored one; -1 = not known
}


def check_environment(environment: Mapping[str, Any], device: str, where: str) -> None:
    """Raise ValueError if a run on `device` could not be recorded with this environment; call it before a long run."""
    check_keys(environment, REQUIRED["environment"], where, "environment.")
    git, gpu = environment["git"], environment["gpu"]
    if git["commit"] is None and not git["reason"]:
        raise ValueError(f"{where}: field 'environment.git.commit' is null without a reason")
    missing = [name for name, value in gpu.items() if value is None]
    if device.startswith("cuda") and missing:
        raise ValueError(f"{where}: field 'environment.gpu.{missing[0]}' is null although the device is {device!r}")


def field_value(content: Mapping[str, Any], field: str) -> Any:
    """The value at a dotted field name such as "summary.kv_length.max"."""
    for key in field.split("."):
        content = content[key]
    return content


def check_arrays(arrays: Mapping[str, Any], where: str) -> dict[str, np.ndarray]:
    """The per-token arrays in their fixed types; ValueError naming `where` and the array if something is wrong."""
    accepted = ARRAYS | OPTIONAL_ARRAYS
    for name in ARRAYS:
        if name not in arrays:
            raise ValueError(f"{where}: per-token array {name!r} is missing")
    for name in arrays:
        if name not in accepted:
            raise ValueError(f"{where}: unknown per-token array {name!r}; accepted: {', '.join(accepted)}")
    typed = {name: np.asarray(arrays[name]).astype(accepted[name]) for name in accepted if name in arrays}
    shape = typed["index"].shape
    for name, array in typed.items():
        if array.ndim != 1 or array.shape != shape:
            raise ValueError(
                f"{where}: per-token array {name!r} has shape {array.shape}, expected {shape}: one a token"
            )
    if np.any(np.diff(typed["index"]) <= 0):
        raise ValueError(f"{where}: per-token array 'index' must increase strictly")
    return typed


def with_keys(required: Mapping[str, Any], **more: Iterable[str]) -> dict[str, Any]:
    """Required keys, and `more` of them in parts that are objects, by name of the part."""
    return {**required, **{part: {**required[part], **dict.fromkeys(keys)} for part, keys in more.items()}}


def check_keys(content: Any, required: Mapping[str, Any], where: str, prefix: str = "") -> None:
    """Raise ValueError, naming `where` and the field, if a required key (see `REQUIRED`) is missing."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{where}: field {prefix.rstrip('.')!r} must be an object, got {type(content).__name__}")
    for key, nested in required.items():
        if key not in content:
            raise ValueError(f"{where}: required field {prefix + key!r} is missing")
        if nested is not None:
            check_keys(content[key], nested, where, f"{prefix}{key}.")
