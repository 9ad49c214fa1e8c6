"""Finding records by what they contain: model, text, policy, backend. Never by file name."""

import re
from collections.abc import Iterable
from datetime import datetime
from typing import Any

from sinkstream.measure.environment import hardware
from sinkstream.records.base import BaseRecord
from sinkstream.records.pairing import same_text_and_model
from sinkstream.records.records import Record

#: Models that documents have a section of -> the short name in the names of its tables; and texts, longest first.
DIAGNOSED_MODELS = {"SmolLM2-135M": "smollm2", "neox-27m-sink": "neox-sink", "neox-27m-nosink": "neox-nosink"}
DIAGNOSED_TEXTS = ("PG19", "WikiText")

#: Options that make a policy a variant of itself, with the value that switches each off.
VARIANT_OPTIONS = {"overlap": 0, "max_drop": None, "slack": None, "refresh": 0, "positions": "cache", "recall": None}


def normalised(name: str) -> str:
    """Lower case, and runs of anything but letters, digits and dots as one hyphen."""
    return re.sub(r"[^a-z0-9.]+", "-", str(name).lower()).strip("-")


def is_plain(record: Record) -> bool:
    """Whether no option turns the policy into a variant: none of `VARIANT_OPTIONS` is on."""
    options = record.policy["options"]
    return all(options.get(name) in (off, None, 0, False) for name, off in VARIANT_OPTIONS.items())


def has_model(record: BaseRecord, name: str) -> bool:
    """Whether the record's model name or source contains `name`, both in normal form."""
    return any(normalised(name) in normalised(record.model[field]) for field in ("name", "source"))


def has_text(record: Any, name: str) -> bool:
    """Whether the name of the record's text contains `name`, both in normal form without hyphens ("PG-19", "pg19")."""
    return normalised(name).replace("-", "") in normalised(record.data["name"]).replace("-", "")


def select(
    records: Iterable[Record],
    *,
    model: str | None = None,
    text: str | None = None,
    policy: str | None = None,
    plain: bool = False,
    backend: str | None = None,
    device: str | None = None,
) -> list[Record]:
    """The complete records that match everything given, in their order.

    `model` and `text` match as `has_model` and `has_text` do, `policy` and `backend` exactly,
    `device` by its type ("cuda" matches "cuda:0"). `plain` leaves out variants of a policy.
    """
    return [
        record
        for record in records
        if record.status == "complete"
        and (model is None or has_model(record, model))
        and (text is None or has_text(record, text))
        and (policy is None or record.policy["name"] == policy)
        and (not plain or is_plain(record))
        and (backend is None or record.protocol["backend"] == backend)
        and (device is None or str(record.protocol["device"]).partition(":")[0] == device)
    ]


def evaluated(record: Record) -> str:
    """How a run went through its text: "steps" or "blocks"."""
    return record.protocol.get("evaluate", "steps")


def conditions(record: Record) -> tuple[Any, ...]:
    """What two latencies that are compared must share, text and model left out: precision, hardware, switches."""
    protocol = {"interleaved": 1, "cudnn_attention": None, **record.protocol}
    keys = ("backend", "dtype", "device", "tf32", "interleaved", "cudnn_attention")
    return (hardware(record.environment), *(protocol[key] for key in keys))


def nearest_in_time(record: Record, controls: Iterable[Record]) -> Record | None:
    """Of the controls that a latency can be compared with, the one made nearest to it: of the same session."""
    written = datetime.fromisoformat(record.created)
    alike = (control for control in controls if same_conditions(record, control))
    return min(alike, key=lambda one: abs(datetime.fromisoformat(one.created) - written), default=None)


def same_conditions(record: Record, control: Record) -> bool:
    """Whether two latencies can be compared: tokens, model, backend, precision, device and hardware are the same."""
    return (
        same_text_and_model(record, control)
        and record.protocol["decode_tokens"] == control.protocol["decode_tokens"]
        and conditions(record) == conditions(control)
    )
