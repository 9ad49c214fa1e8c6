"""Asking: a stream with planted facts goes through a decoder, and every question is answered where it stands.

The text is fed as it is, the right answers included (teacher forcing), so that all policies read the same tokens. With
recall, the decoder is told where a question begins and ends; without recall, a question is text like any other.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, NamedTuple

import torch

from sinkstream.evaluation.backends import open_decoder
from sinkstream.evaluation.decoders import Decoder, ModuleDecoder
from sinkstream.evaluation.settings import RunSettings
from sinkstream.measure.timing import timed
from sinkstream.models import LoadedModel
from sinkstream.studies.facts.statements import TokenizedFact

Report = Callable[[int], None]
TOLD = ("oracle", "late-oracle")  # choosers that must be told what is wanted


@dataclass(frozen=True)
class Question:
    """A question in a stream; the places are indices in the stream."""

    number: int  # among all questions of a study
    fact: TokenizedFact
    said: int  # first token of the statement
    first: int  # first token of the question
    judged: int  # the token that is predicted and judged

    @property
    def statement(self) -> range:
        """Tokens of the statement."""
        return range(self.said, self.said + len(self.fact.statement))

    def moved(self, tokens: int) -> "Question":
        """The same in a stream that begins `tokens` tokens later."""
        return replace(self, said=self.said - tokens, first=self.first - tokens, judged=self.judged - tokens)


@dataclass(frozen=True, eq=False)
class Exam:
    """Tokens of one run (tokens,) int64, and its questions in their order."""

    ids: torch.Tensor
    questions: Sequence[Question]

    def stretches(self, positions: int) -> list["Exam"]:
        """For a cache that forgets nothing: the stream in stretches of `positions` tokens, each half past the last.

        Each question is asked once, in the stretch whose first half has its statement, if that reaches so far. Raises
        ValueError if none does.
        """
        half, exams = max(1, positions // 2), []
        for start in range(0, len(self.ids), half):
            inside = [q for q in self.questions if q.said // half * half == start and q.judged < start + positions]
            if inside:
                end = min(start + positions, max(q.judged for q in inside) + 1)
                exams.append(Exam(self.ids[start:end], [q.moved(start) for q in inside]))
        if not exams:
            nearest = min(q.judged - q.said for q in self.questions)
            raise ValueError(
                f"the full cache of the nearest question ({nearest} tokens) goes past the {positions} trained"
                " positions; accepted: another --policy, or shorter --distances"
            )
        return exams


class Answer(NamedTuple):
    """What the model answers to a question."""

    question: Question
    correct: bool  # the right alternative is the likeliest alternative
    exact: bool  # and no token of the vocabulary is likelier
    log_prob: float  # of the right answer's first token, in nats
    held: float | None  # share of the statement that recall had brought back; None without recall


class NonFiniteAnswer(ArithmeticError):
    """The model's prediction is not a number."""


class Asking:
    """One exam under one run's settings; `answers` grow while it runs, so that an interrupt loses none.

    Raises ValueError if settings and model do not fit together.
    """

    def __init__(self, loaded: LoadedModel, exam: Exam, settings: RunSettings):
        self.loaded, self.exam = loaded, exam
        self.settings = told(settings, exam.questions)
        self.answers: list[Answer] = []
        self.ttft: list[float] = []  # seconds, of every question that is a feed of its own
        self.done = 0  # tokens that have been fed

    def summary(self) -> dict[str, Any]:
        """What a record says beyond the answers.

        ``ttft_ms`` is the median time from a question to the logits of its answer, None where questions stand in longer
        feeds. With recall it includes the choice, the fetch, and the question computed over the new frame.
        """
        return {"ttft_ms": round(1e3 * median(self.ttft), 3) if self.ttft else None}

    @torch.inference_mode()
    def run(self, report: Report = lambda done: None) -> None:
        """Feed all tokens and answer all questions; `report` is called with the number of tokens fed."""
        with closing(open_decoder(self.loaded, self.settings)) as decoder:
            self.feed(decoder, report)

    def feed(self, decoder: Decoder, report: Report) -> None:
        """Feed all tokens from `done` on."""
        ids = self.exam.ids.to(self.loaded.model.device)
        if isinstance(decoder, ModuleDecoder) and not self.settings.recall:
            asked = self._ask_in_chunks(decoder, ids)
        else:
            asked = self._ask_apart(decoder, ids)
        for _ in asked:
            report(self.done)

    def _ask_apart(self, decoder: Decoder, ids: torch.Tensor) -> Iterator[None]:
        """Every question is a feed of its own."""
        for question in (q for q in self.exam.questions if q.first >= self.done):
            yield from self._read(decoder, ids, question.first)
            logits, seconds = timed(decoder.ask, ids[question.first : question.judged], device=ids.device)
            self.ttft.append(seconds)
            self.done = question.judged
            self.answers.append(self._judge(question, logits[0], decoder))
            yield
        yield from self._read(decoder, ids, len(ids))

    def _read(self, decoder: Decoder, ids: torch.Tensor, end: int) -> Iterator[None]:
        if self.done < end:
            for taken in decoder.read(ids[self.done : end]):
                self.done += taken
                yield

    def _ask_in_chunks(self, decoder: ModuleDecoder, ids: torch.Tensor) -> Iterator[None]:
        """A question may stand in the middle of a feed."""
        waiting = deque(q for q in self.exam.questions if q.judged > self.done)
        for size in decoder.chunk_sizes(len(ids) - self.done):
            asked = bool(waiting) and waiting[0].judged <= self.done + size
            logits = decoder.feed(ids[self.done : self.done + size], last_only=not asked)
            before, self.done = self.done, self.done + decoder.taken
            while waiting and waiting[0].judged <= self.done:
                question = waiting.popleft()
                self.answers.append(self._judge(question, logits[question.judged - 1 - before], decoder))
            yield

    def _judge(self, question: Question, logits: torch.Tensor, decoder: Decoder) -> Answer:
        fact = question.fact
        log_probs = torch.log_softmax(logits.float(), -1)
        among, likeliest = log_probs[list(fact.choices)].tolist(), int(log_probs.argmax())
        right = among[fact.answer]
        if right != right:
            raise NonFiniteAnswer(f"the logits that predict token {question.judged} are not finite")
        held = None if decoder.frames is None else decoder.frames.held(question.judged - 1, question.statement)
        best = max(range(len(among)), key=among.__getitem__)
        return Answer(question, best == fact.answer, likeliest == fact.choices[fact.answer], right, held)


def told(settings: RunSettings, questions: Sequence[Question]) -> RunSettings:
    """The settings, with what an oracle must know: which statement is wanted while a question is read and answered."""
    wanted = [(q.first, q.judged + 1, q.statement.start, q.statement.stop) for q in questions]
    return with_told(settings, wanted)


def with_told(settings: RunSettings, wanted: Sequence[tuple[int, int, int, int]]) -> RunSettings:
    """The settings; an oracle among the choosers is told `wanted`: (begin, end, first, last) each.

    While tokens ``begin <= t < end`` come, the tokens ``first <= p < last`` are wanted.
    """
    if settings.recall.get("recall") not in TOLD:
        return settings
    return replace(settings, recall={**settings.recall, "recall_told": tuple(wanted)})


def answer_all(asking: Asking, report: Report = lambda done: None) -> tuple[str, str | None]:
    """Run one exam to its end; returns the status of a record and, unless complete, the reason."""
    try:
        asking.run(report)
    except KeyboardInterrupt:
        return "partial", f"interrupted after token {asking.done}"
    except NonFiniteAnswer as error:
        return "failed", str(error)
    except (torch.OutOfMemoryError, MemoryError) as error:
        first_line = next(iter(str(error).splitlines()), "")
        return "failed", f"out of memory after token {asking.done}: {first_line}".rstrip(": ")
    return "complete", None
