"""From a run to a run record: figures, protocol and provenance."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sinkstream.compat import attention_implementation
from sinkstream.data import TokenStream
from sinkstream.evaluation.run import RunResult
from sinkstream.evaluation.runner import R, Request
from sinkstream.evaluation.settings import RunSettings
from sinkstream.measure.environment import environment, package_versions, utc_now
from sinkstream.measure.numerics import numerics
from sinkstream.models import LoadedModel
from sinkstream.records.plain import new_record_id


def numeric_protocol(loaded: LoadedModel) -> dict[str, Any]:
    """What changes the figures of a model: precision, kind of device, numeric switches."""
    dtype, device = str(loaded.model.dtype).removeprefix("torch."), loaded.model.device.type
    return {"dtype": dtype, "device": device, **numerics()}


def work_identity(loaded: LoadedModel, stream: TokenStream, *packages: str, **more: Any) -> dict[str, Any]:
    """What makes two pieces of work the same: model, precision, hardware, releases of `packages`, text, and `more`."""
    versions, device = package_versions(), loaded.model.device
    return {
        "versions": {name: versions[name] for name in ("sinkstream", "torch", "transformers", *packages)},
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "model_hash": loaded.hash,
        "data_sha256": stream.sha256,
        **numeric_protocol(loaded),
        **more,
    }


def run_identity(loaded: LoadedModel, stream: TokenStream, settings: RunSettings) -> dict[str, Any]:
    """The identity of a run, which also has its settings and the attention of transformers."""
    attention = attention_implementation(loaded.model.config)
    return work_identity(loaded, stream, attention=attention, settings=settings.record())


def provenance(
    loaded: LoadedModel, settings: RunSettings, request: Request, identity: dict[str, Any]
) -> dict[str, Any]:
    """The fields that every kind of record shares: what ran, where, when and with which arguments.

    `identity` is kept among the arguments, for resuming.
    """
    policy = settings.policy()
    more = {"positions": settings.positions, **settings.recall}
    return {
        "created": utc_now(),
        "command": request.command,
        "arguments": {**request.arguments, "identity": identity},
        "environment": environment(loaded.model.device),
        "model": loaded.record(),
        "policy": {
            "name": settings.method,
            "label": settings.label(),
            "options": {} if policy is None else {**policy.record(), **more},
        },
    }


def run_protocol(loaded: LoadedModel, settings: RunSettings, request: Request) -> dict[str, Any]:
    """The `protocol` of everything that runs as `settings` say."""
    return {
        "backend": settings.backend,
        "evaluate": settings.evaluate,
        **numeric_protocol(loaded),
        "device": str(loaded.model.device),
        "seed": request.seed,
        "cap": settings.cap,
        "cap_accounting": settings.cap_accounting,
    }


def build_record(
    result: RunResult, loaded: LoadedModel, stream: TokenStream, settings: RunSettings, request: Request
) -> dict[str, Any]:
    """Assemble the record of a run."""
    return {
        "id": new_record_id(loaded.name, stream.name, settings.label(), settings.evaluate),
        "status": result.status,
        "status_reason": result.reason,
        **provenance(loaded, settings, request, run_identity(loaded, stream, settings)),
        "data": stream.record(),
        "protocol": {
            **run_protocol(loaded, settings, request),
            "prefill_tokens": result.prefill_tokens,
            "decode_tokens": result.summary["decode_tokens"],
            "warmup_tokens": settings.warmup_tokens,
            "sample_every": settings.sample_every,
            "repeats": settings.repeats,
            "interleaved": settings.interleaved,
        },
        "summary": result.summary,
    }


def find_complete(load: Callable[[Path], list[R]], directory: Path, identity: dict[str, Any]) -> list[R]:
    """The newest complete record of the very same work in `directory`, for resuming; an empty list without one.

    `load` reads all records of one kind below a folder, oldest first.
    """
    found = load(directory)
    return [r for r in found if r.status == "complete" and r.arguments.get("identity") == identity][-1:]
