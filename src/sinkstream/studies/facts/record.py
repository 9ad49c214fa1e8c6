"""Records of answers: what is kept of every answer is the table `COLUMNS` here, and nowhere else."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import numpy as np

from sinkstream.records.base import StatusRecord
from sinkstream.records.cards import by_card, cards_text
from sinkstream.records.schema import STATUSES, STUDY_REQUIRED
from sinkstream.show.table import EMPTY
from sinkstream.statistics import Estimate, proportion
from sinkstream.studies.facts.asking import Answer
from sinkstream.studies.facts.statements import FORMS

DIGITS = 4  # decimals of a figure of one question

#: Field of `answers` -> dtype, and the value of an answer.
COLUMNS: dict[str, tuple[type[np.generic], Callable[[Answer], Any]]] = {
    "form": (np.str_, lambda answer: answer.question.fact.form),
    # tokens from the first of the statement to the first of the question
    "distance": (np.int64, lambda answer: answer.question.first - answer.question.said),
    "index": (np.int64, lambda answer: answer.question.judged),  # of the judged token
    "correct": (np.int64, lambda answer: int(answer.correct)),
    "exact": (np.int64, lambda answer: int(answer.exact)),
    "log_prob": (np.float64, lambda answer: round(answer.log_prob, DIGITS)),
    "held": (np.float64, lambda answer: None if answer.held is None else round(answer.held, DIGITS)),
}


def answer_columns(answers: Sequence[Answer], **more: Sequence[Any]) -> dict[str, list[Any]]:
    """The field `answers` of a record; `more` are columns of a study's own."""
    own = {name: [value(answer) for answer in answers] for name, (_, value) in COLUMNS.items()}
    return {**{name: list(column) for name, column in more.items()}, **own}


_REQUIRED = {
    **STUDY_REQUIRED,
    "protocol": dict.fromkeys(("device", "dtype", "cap", "forms", "seed")),
    "summary": dict.fromkeys(("tokens", "seconds", "peak_memory_mb", "peak_memory_kind")),
    "answers": None,
}


@dataclass(frozen=True)
class AnswersRecord(StatusRecord):
    """What one policy answers: the fields of its JSON file, the columns of `answers` as arrays (questions,).

    A kind adds `OWN`, the dtypes of the columns that are its own.
    """

    REQUIRED, STATUSES = _REQUIRED, STATUSES
    OWN: ClassVar[Mapping[str, type[np.generic]]]

    data: dict[str, Any]
    policy: dict[str, Any]
    summary: dict[str, Any]
    answers: dict[str, np.ndarray]

    @classmethod
    def check_own(cls, content: Mapping[str, Any], where: str) -> None:
        columns, names = content["answers"], (*cls.OWN, *COLUMNS)
        if set(columns) != set(names):
            raise ValueError(f"{where}: field 'answers' must hold {', '.join(names)}")
        if len({len(column) for column in columns.values()}) != 1:
            raise ValueError(f"{where}: the columns of field 'answers' are of unequal length")
        unknown = sorted(set(columns["form"]) - set(FORMS))
        if unknown:
            raise ValueError(f"{where}: field 'answers.form' holds {unknown[0]!r}; accepted: {', '.join(FORMS)}")

    @classmethod
    def values(cls, content: Mapping[str, Any]) -> dict[str, Any]:
        dtypes = {**cls.OWN, **{name: dtype for name, (dtype, _) in COLUMNS.items()}}
        arrays = {name: np.array(content["answers"][name], dtype=dtype) for name, dtype in dtypes.items()}
        return super().values(content) | {"answers": arrays}

    @property
    def label(self) -> str:
        """The policy's label, with the status if the record is not complete."""
        label = self.policy["label"]
        return label if self.status == "complete" else f"{label} ({self.status})"


A = TypeVar("A", bound=AnswersRecord)


def accuracy(answers: Mapping[str, np.ndarray], where: np.ndarray | None = None, column: str = "correct") -> Estimate:
    """Share of the answers that are right among those `where` (questions,) bool holds, with its 95 % interval."""
    chosen = answers[column] if where is None else answers[column][where]
    return proportion(int(chosen.sum()), len(chosen))


def forms_of(answers: Mapping[str, np.ndarray]) -> list[str]:
    """The forms that were asked, in the order of `FORMS`."""
    return [form for form in FORMS if (answers["form"] == form).any()]


def accuracy_text(share: Estimate) -> str:
    """A share with its interval, in percent: "77 % [66, 86]"; a dash without one."""
    if share.value is None or share.low is None or share.high is None:
        return EMPTY
    return f"{100 * share.value:.0f} % [{100 * share.low:.0f}, {100 * share.high:.0f}]"


def ttft_text(records: Sequence[AnswersRecord], table: Sequence[AnswersRecord]) -> str:
    """Median time from a question to the logits of its answer, in ms, the least and the most of some records.

    With the card where the records of the `table` are of several; a dash where it was not measured.
    """
    timed = by_card([record for record in records if record.summary.get("ttft_ms") is not None])
    named = len(by_card(table)) > 1
    said = [
        _range([record.summary["ttft_ms"] for record in some]) + (f" ({cards_text(some)})" if named else "")
        for some in timed.values()
    ]
    return "; ".join(said) or EMPTY


def _range(values: Sequence[float]) -> str:
    return " – ".join(dict.fromkeys(f"{value:,.1f}" for value in (min(values), max(values))))


TTFT_NOTE = (
    "TTFT: median time from a question to the logits of its answer; the choice, the fetch and the question computed"
    " over what came back are included."
)


def held_text(answers: Mapping[str, np.ndarray], where: np.ndarray) -> str:
    """Mean share of a statement that recall held while its question was answered; a dash without recall."""
    held = answers["held"][where]
    return f"{100 * np.nanmean(held):.0f} %" if np.isfinite(held).any() else EMPTY


def by_label(records: Sequence[A]) -> dict[str, list[A]]:
    """The records of each policy, by its label."""
    found: dict[str, list[A]] = {}
    for record in records:
        found.setdefault(record.label, []).append(record)
    return found


def pooled(records: Sequence[A]) -> list[A]:
    """One record a policy: the answers of its complete records on several texts together, which have no common time."""
    return [
        replace(its[-1], answers=_joined([one.answers for one in its]), summary=its[-1].summary | {"ttft_ms": None})
        if len(its) > 1
        else its[0]
        for its in by_label(records).values()
    ]


def _joined(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
