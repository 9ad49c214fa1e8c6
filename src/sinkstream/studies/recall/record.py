"""Recall records on disk: one JSON file a policy, with the provenance of a run record and one row a passage."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sinkstream.records.base import BaseRecord
from sinkstream.records.schema import STATUSES

#: One entry a passage in each: where it stands, how far apart its two places are, and what it cost.
COLUMNS = {
    "ratio": np.float64,  # distance over cap
    "distance": np.int64,  # tokens from the start of its first place to the start of its second
    "first": np.int64,  # index of its first token at its first place
    "second": np.int64,  # and at its second
    "nll_again": np.float64,  # mean NLL (nats per token) at the second place, seen before at the first
    "nll_unseen": np.float64,  # the same tokens at the same place, the first place holding other text
}
_REQUIRED = {
    **dict.fromkeys(("schema", "id", "status", "status_reason", "created", "command", "arguments", "environment")),
    **dict.fromkeys(("model", "data", "policy", "protocol", "summary", "passages")),
}


@dataclass(frozen=True)
class RecallRecord(BaseRecord):
    """What one policy recalls: the fields of its JSON file, the columns of `passages` as arrays (passages,)."""

    SCHEMA, KIND, REQUIRED, STATUSES = "sinkstream.recall/1", "recall", _REQUIRED, STATUSES

    status: str
    status_reason: str | None
    data: dict[str, Any]
    policy: dict[str, Any]
    summary: dict[str, Any]
    passages: dict[str, np.ndarray]

    @classmethod
    def check_own(cls, content: Mapping[str, Any], where: str) -> None:
        if set(content["passages"]) != set(COLUMNS):
            raise ValueError(f"{where}: field 'passages' must hold {', '.join(COLUMNS)}")
        if len({len(column) for column in content["passages"].values()}) != 1:
            raise ValueError(f"{where}: the columns of field 'passages' are of unequal length")

    @classmethod
    def values(cls, content: Mapping[str, Any]) -> dict[str, Any]:
        columns = {name: np.array(content["passages"][name], dtype=dtype) for name, dtype in COLUMNS.items()}
        return super().values(content) | {"passages": columns}
