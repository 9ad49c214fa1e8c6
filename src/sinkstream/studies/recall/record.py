"""Recall records: one JSON file a policy, with the provenance of a run record and one row a passage.

What is recorded of a passage is the table `COLUMNS` here, and nowhere else.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sinkstream.records.base import StatusRecord
from sinkstream.records.schema import STATUSES, STUDY_REQUIRED, check_keys

DIGITS = 4  # decimals of a gain in nats


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
    # gain of every token but the first, (tokens - 1,), in nats: what it costs in the control, less what it costs again
    gains: np.ndarray
    held: float | None  # share of its tokens whose first occurrence recall held at that moment; None without recall


#: Field of `passages` -> dtype, and the value of a passage.
COLUMNS: dict[str, tuple[type[np.number], Callable[[ScoredPassage], float]]] = {
    "ratio": (np.float64, lambda passage: passage.placement.ratio),  # distance over cap
    "distance": (np.int64, lambda passage: passage.placement.second - passage.placement.first),  # tokens
    "first": (np.int64, lambda passage: passage.placement.first),
    "second": (np.int64, lambda passage: passage.placement.second),
    "nll_again": (np.float64, lambda passage: passage.nll_again),
    "nll_unseen": (np.float64, lambda passage: passage.nll_unseen),
}
#: The same of fields that older records lack.
LATER_COLUMNS: dict[str, tuple[type[np.number], Callable[[ScoredPassage], Any]]] = {
    "held": (np.float64, lambda passage: passage.held),
}
EDGES = (1, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256)  # token indices in a passage between which the curve has means
_REQUIRED = {
    **STUDY_REQUIRED,
    "protocol": dict.fromkeys(("device", "dtype", "cap", "seed", "passages", "passage_tokens", "ratios")),
    "summary": dict.fromkeys(("ppl",)),
    "passages": None,
}
_CURVE = dict.fromkeys(("edges", "gains"))


def passage_columns(passages: Sequence[ScoredPassage]) -> dict[str, list[float]]:
    """The field `passages` of a record."""
    return {name: [value(one) for one in passages] for name, (_, value) in (COLUMNS | LATER_COLUMNS).items()}


def token_curve(passages: Sequence[ScoredPassage], passage_tokens: int) -> dict[str, Any]:
    """The field `curve` of a record: mean gain of every passage between any two neighbours of `edges`."""
    edges = [edge for edge in EDGES if edge < passage_tokens] + [passage_tokens]
    parts = [[one.gains[a - 1 : b - 1] for a, b in itertools.pairwise(edges)] for one in passages]
    return {"edges": edges, "gains": [[round(float(part.mean()), DIGITS) for part in row] for row in parts]}


def check_passages(content: Mapping[str, Any], where: str) -> None:
    """Raise ValueError if the field `passages` of a record lacks a column, or has columns of unequal length."""
    if not set(COLUMNS) <= set(content["passages"]) <= {*COLUMNS, *LATER_COLUMNS}:
        raise ValueError(f"{where}: field 'passages' must hold {', '.join(COLUMNS)}")
    if len({len(column) for column in content["passages"].values()}) != 1:
        raise ValueError(f"{where}: the columns of field 'passages' are of unequal length")


def read_passages(content: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The columns of `passages` of a record as arrays (passages,)."""
    given, known = content["passages"], COLUMNS | LATER_COLUMNS
    return {name: np.array(given[name], dtype=dtype) for name, (dtype, _) in known.items() if name in given}


@dataclass(frozen=True)
class RecallRecord(StatusRecord):
    """What one policy recalls: the fields of its JSON file, the columns of `passages` as arrays (passages,)."""

    SCHEMA, KIND, REQUIRED, STATUSES = "sinkstream.recall/1", "recall", _REQUIRED, STATUSES

    data: dict[str, Any]
    policy: dict[str, Any]
    summary: dict[str, Any]
    passages: dict[str, np.ndarray]
    curve: dict[str, Any] | None = None  # gain by token index in the passage, see `token_curve`; older records: None

    @property
    def label(self) -> str:
        """The policy with its options, for tables."""
        return str(self.policy["label"])

    @classmethod
    def check_own(cls, content: Mapping[str, Any], where: str) -> None:
        check_passages(content, where)
        if content.get("curve") is not None:
            check_keys(content["curve"], _CURVE, where, "curve.")

    @classmethod
    def values(cls, content: Mapping[str, Any]) -> dict[str, Any]:
        return super().values(content) | {"passages": read_passages(content), "curve": content.get("curve")}
