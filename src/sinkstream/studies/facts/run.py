"""Several policies over one stream with questions: checked first, then run and recorded one after the other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

from rich.console import Console

from sinkstream.data import TokenStream
from sinkstream.evaluation.record import find_complete, provenance, run_identity, run_protocol
from sinkstream.evaluation.run import check_ids, check_run
from sinkstream.evaluation.runner import Job, Report, Request, Runner
from sinkstream.evaluation.settings import RunSettings
from sinkstream.measure.memory import PeakMemory
from sinkstream.measure.timing import timed
from sinkstream.models import LoadedModel
from sinkstream.records.plain import new_record_id
from sinkstream.studies.facts.asking import Answer, Asking, Exam, answer_all, told
from sinkstream.studies.facts.record import AnswersRecord, accuracy, answer_columns

R = TypeVar("R", bound=AnswersRecord)


class Paper(Protocol):
    """A stream with questions, as a study writes it."""

    @property
    def stream(self) -> TokenStream:
        """The tokens, and where they came from."""

    @property
    def exam(self) -> Exam:
        """All tokens and all questions."""

    def protocol(self) -> dict[str, Any]:
        """What a record says of the design."""

    def columns(self, answers: Sequence[Answer]) -> dict[str, list[Any]]:
        """The columns of a record that are the study's own."""


def check_answering(settings: RunSettings) -> None:
    """Raise ValueError if a method has no cache of its own to answer from."""
    if settings.method == "recompute":
        raise ValueError(
            "policy 'recompute' forwards its whole window for every token and keeps nothing else: it answers what"
            " the full cache of a window answers; accepted: full, or an eviction policy"
        )


@dataclass
class ExamBatch(Generic[R]):
    """Several policies over one model and one stream."""

    loaded: LoadedModel
    paper: Paper
    request: Request  # where the records go, and what they say of the command
    kind: type[R]  # of the records

    def run(self, settings: list[RunSettings], console: Console) -> list[R]:
        """Run all policies in order; an interrupted or failed one is recorded and ends the batch.

        Raises ValueError if a policy, the model and the stream do not fit together, or as `Runner.run`; nothing has run
        then. Raises WriteError as `Runner.run`.
        """
        exams = [self._exams(one) for one in settings]
        jobs = [
            Job(one.label(), partial(self._measure, one, its), partial(self._find, one))
            for one, its in zip(settings, exams)
        ]
        device = self.loaded.model.device
        runner = Runner(self.request, self.kind.write, self.kind.read, device, _figures)
        return runner.run(jobs, console)

    def _exams(self, settings: RunSettings) -> list[Exam]:
        check_answering(settings)
        exam, limit = self.paper.exam, self.loaded.trained_positions
        if settings.method == "full" and limit is not None and not settings.allow_untrained_positions:
            check_ids(self.loaded, exam.ids)
            return exam.stretches(limit)
        check_run(self.loaded, exam.ids, told(settings, exam.questions))
        return [exam]

    def sit(self, exam: Exam, settings: RunSettings) -> Asking:
        """What asks the questions of an exam."""
        return Asking(self.loaded, exam, settings)

    def _measure(self, settings: RunSettings, exams: list[Exam], report: Report) -> list[Callable]:
        sittings = [self.sit(exam, settings) for exam in exams]
        total = sum(len(exam.ids) for exam in exams)

        def report_all(before: int, now: int) -> None:
            report(before + now, total)

        def sit_all() -> tuple[str, str | None]:
            ended: tuple[str, str | None] = "complete", None
            for number, sitting in enumerate(sittings):
                before = sum(len(exam.ids) for exam in exams[:number])
                ended = answer_all(sitting, partial(report_all, before))
                if ended[0] != "complete":
                    break
            return ended

        with PeakMemory(self.loaded.model.device) as memory:
            (status, reason), seconds = timed(sit_all, device=self.loaded.model.device)
        summary = {
            "tokens": total if status == "complete" else None,
            "seconds": round(seconds, 3),
            "peak_memory_mb": memory.peak_mb,
            "peak_memory_kind": memory.kind,
            **sittings[-1].summary(),
        }
        answers = [answer for sitting in sittings for answer in sitting.answers]
        return [partial(self._record, settings, answers, summary, status, reason)]

    def _identity(self, settings: RunSettings) -> dict[str, Any]:
        return run_identity(self.loaded, self.paper.stream, settings)

    def _find(self, settings: RunSettings) -> list[R]:
        return find_complete(self.kind.below, self.request.out, self._identity(settings))

    def _record(
        self,
        settings: RunSettings,
        answers: list[Answer],
        summary: dict[str, Any],
        status: str,
        reason: str | None,
    ) -> dict[str, Any]:
        return {
            "id": new_record_id(self.kind.KIND, self.loaded.name, self.paper.stream.name, settings.label()),
            "status": status,
            "status_reason": reason,
            **provenance(self.loaded, settings, self.request, self._identity(settings)),
            "data": self.paper.stream.record(),
            "protocol": {
                **run_protocol(self.loaded, settings, self.request),
                "block_tokens": settings.block_tokens,
                **self.paper.protocol(),
            },
            "summary": summary,
            "answers": answer_columns(answers, **self.paper.columns(answers)),
        }


def _figures(records: Sequence[AnswersRecord]) -> list[str]:
    """The accuracy over all questions in words, nothing if none was answered."""
    shares = [accuracy(record.answers).value for record in records]
    return [f"{100 * share:.0f} % right" for share in shares if share is not None]
