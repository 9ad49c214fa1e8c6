"""Recall records: one JSON file a policy, with the provenance of a run record and one row a passage.

What is recorded of a passage is the table `COLUMNS` here, and nowhere else.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sinkstream.records.base import StatusRecord
from sinkstream.records.schema import STATUSES


@dataclass(frozen=True)
class Placement:
    """Where a passage occurs: indices in the text of its first token, and the distance over cap that was asked for."""

    ratio: float
    first: int
    second: int


@dataclass(frozen=True)
class ScoredPassage:
    """A passage, and its mean NLL (nats per token) at the second occurrence."""

    placement: Placement
    nll_again: float  # with the first occurrence in the text
    nll_unseen: float  # control: other text in place of the first occurrence


#: Field of `passages` -> dtype, and the value of a passage.
COLUMNS: dict[str, tuple[type[np.number], Callable[[ScoredPassage], float]]] = {
    "ratio": (np.float64, lambda passage: passage.placement.ratio),  # distance over cap
    "distance": (np.int64, lambda passage: passage.placement.second - passage.placement.first),  # tokens
    "first": (np.int64, lambda passage: passage.placement.first),
    "second": (np.int64, lambda passage: passage.placement.second),
    "nll_again": (np.float64, lambda passage: passage.nll_again),
    "nll_unseen": (np.float64, lambda passage: passage.nll_unseen),
}
_REQUIRED = {
    **dict.fromkeys(("schema", "id", "status", "status_reason", "created", "command", "arguments", "environment")),
    **dict.fromkeys(("model", "data", "policy", "protocol", "summary", "passages")),
}


def passage_columns(passages: Sequence[ScoredPassage]) -> dict[str, list[float]]:
    """The field `passages` of a record."""
    return {name: [value(passage) for passage in passages] for name, (_, value) in COLUMNS.items()}


@dataclass(frozen=True)
class RecallRecord(StatusRecord):
    """What one policy recalls: the fields of its JSON file, the columns of `passages` as arrays (passages,)."""

    SCHEMA, KIND, REQUIRED, STATUSES = "sinkstream.recall/1", "recall", _REQUIRED, STATUSES

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
        columns = {name: np.array(content["passages"][name], dtype=dtype) for name, (dtype, _) in COLUMNS.items()}
        return super().values(content) | {"passages": columns}
