"""Recall records on disk: one JSON file a policy, with the provenance of a run record and one row a passage."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sinkstream.records.json_files import check_schema, load_family, read_json, write_json
from sinkstream.records.records import plain_json, scrub_paths
from sinkstream.records.schema import STATUSES, check_environment

SCHEMA = "sinkstream.recall/1"

#: One entry a passage in each: where it stands, how far apart its two places are, and what it cost.
COLUMNS = {
    "ratio": np.float64,  # distance over cap
    "distance": np.int64,  # tokens from the start of its first place to the start of its second
    "first": np.int64,  # index of its first token at its first place
    "second": np.int64,  # and at its second
    "nll_again": np.float64,  # mean NLL (nats per token) at the second place, seen before at the first
    "nll_unseen": np.float64,  # the same tokens at the same place, the first place holding other text
}
_FIELDS = (
    *("schema", "id", "status", "status_reason", "created", "command", "arguments", "environment"),
    *("model", "data", "policy", "protocol", "summary", "passages"),
)


@dataclass(frozen=True)
class RecallRecord:
    """What one policy recalls: the fields of its JSON file, the columns of `passages` as arrays (passages,)."""

    path: Path
    id: str
    status: str
    status_reason: str | None
    created: str
    command: list[str]
    arguments: dict[str, Any]
    environment: dict[str, Any]
    model: dict[str, Any]
    data: dict[str, Any]
    policy: dict[str, Any]
    protocol: dict[str, Any]
    summary: dict[str, Any]
    passages: dict[str, np.ndarray]


def write_recall(record: Mapping[str, Any], directory: Path | str) -> Path:
    """Write a recall record atomically; returns its path.

    Raises
    ------
    ValueError
        A field is missing or malformed, or the file is there already.
    WriteError
        It could not be written; nothing is left behind.
    """
    content = {"schema": SCHEMA, **scrub_paths(plain_json(record))}
    _check(content, f"record {record.get('id')!r}")
    path = Path(directory) / f"{content['id']}.json"
    if path.exists():
        raise ValueError(f"{path} exists already; records are never overwritten")
    return write_json(path, content)


def load_recall(path: Path | str) -> RecallRecord:
    """Read and check one recall record.

    Raises
    ------
    ValueError
        Naming the file and the field: no recall record, one of another version, or an incomplete one.
    """
    path = Path(path)
    content = read_json(path)
    _check(content, str(path))
    fields = {name: content[name] for name in _FIELDS if name not in ("schema", "passages")}
    columns = {name: np.array(content["passages"][name], dtype=dtype) for name, dtype in COLUMNS.items()}
    return RecallRecord(path=path, **fields, passages=columns)


def load_recalls(directory: Path | str) -> list[RecallRecord]:
    """Every recall record below a folder, oldest first; files that do not call themselves one are left alone.

    Raises
    ------
    ValueError
        As `load_recall`.
    """
    return load_family(directory, SCHEMA, load_recall)


def _check(content: Any, where: str) -> None:
    check_schema(content, SCHEMA, "recall", where)
    for name in _FIELDS:
        if name not in content:
            raise ValueError(f"{where}: required field {name!r} is missing")
    if content["status"] not in STATUSES:
        raise ValueError(f"{where}: field 'status' is {content['status']!r}; accepted: {', '.join(STATUSES)}")
    if set(content["passages"]) != set(COLUMNS):
        raise ValueError(f"{where}: field 'passages' must hold {', '.join(COLUMNS)}")
    if len({len(column) for column in content["passages"].values()}) != 1:
        raise ValueError(f"{where}: the columns of field 'passages' are of unequal length")
    check_environment(content["environment"], str(content["protocol"]["device"]), where)
