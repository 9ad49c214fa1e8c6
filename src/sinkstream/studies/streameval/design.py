"""The benchmark's stream: lines of facts, and every few lines a question about one that lies a known way back.

    The code word of the quiet harbour in Lisbon is lemon.
    The owner of the windy mill in Oslo is Anna.
    …                                                      (as many lines as the distance)
    Question: What is the code word of the quiet harbour in Lisbon? Answer: The code word … in Lisbon is lemon.
    …

No fact is said or asked twice. The distances take turns: the next question is asked at the distance that has been asked
the fewest times, among those that the stream is long enough for. The stream ends when every distance has its questions.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sinkstream.data import TokenStream
from sinkstream.studies.facts.asking import Answer, Exam, Question
from sinkstream.studies.facts.statements import FORMS, FactTokenizer, TokenizedFact, named_facts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DISTANCES = (20, 200, 2_000, 20_000)
EVERY = 8
QUESTIONS = 150
FORMS_ASKED = ("cue", "open")


@dataclass(frozen=True)
class StreamEvalDesign:
    """How facts and questions follow each other. Raises ValueError, naming the option, the value and what is accepted.

    Attributes
    ----------
    distances : tuple of int
        Lines from a statement to its question.
    every : int
        Every so many lines a question.
    questions : int
        At each distance, at least.
    forms : tuple of str
        Forms of the questions, which take turns.
    seed : int
        Of facts, answers and order.
    """

    distances: tuple[int, ...] = DISTANCES
    every: int = EVERY
    questions: int = QUESTIONS
    forms: tuple[str, ...] = FORMS_ASKED
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("every", 2), ("questions", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"{name}={getattr(self, name)} is not accepted; accepted: a whole number of at least {least}"
                )
        if not self.distances:
            raise ValueError("--distances '' is not accepted; accepted: one or more numbers of lines")
        for distance in self.distances:
            if distance < 1:
                raise ValueError(
                    f"--distances {distance} is not accepted; accepted: a whole number of lines of at least 1"
                )
        if len(set(self.distances)) < len(self.distances):
            raise ValueError(f"--distances {','.join(map(str, self.distances))} names one twice; accepted: each once")
        accepted = [form for form in FORMS if form != "paraphrase"]  # there are too few of those for a long stream
        if not self.forms or not set(self.forms) <= set(accepted):
            given = ",".join(self.forms) or "''"
            raise ValueError(f"--forms {given} is not accepted; accepted: one or more of {', '.join(accepted)}")

    def plan(self) -> list[PlannedLine]:
        """All lines of the stream."""
        rng = np.random.default_rng(self.seed)
        asked = dict.fromkeys(sorted(self.distances), 0)
        said: list[int] = []  # the lines of statements, in order
        taken: set[int] = set()  # of those: asked already
        lines: list[PlannedLine] = []
        while min(asked.values()) < self.questions:
            number = len(lines)
            possible = [d for d in asked if d <= number] if number % self.every == 0 else []
            fewest = min((asked[d] for d in possible), default=0)
            distance = int(rng.choice([d for d in possible if asked[d] == fewest])) if possible else 0
            about = _latest(said, number - distance, taken) if possible else None
            if about is None:
                lines.append(PlannedLine(number))
                said.append(number)
            else:
                lines.append(PlannedLine(number, about, distance, self.forms[asked[distance] % len(self.forms)]))
                taken.add(about)
                asked[distance] += 1
        return lines


@dataclass(frozen=True)
class PlannedLine:
    """A line: a new fact, or a question about the fact of an earlier line."""

    number: int
    about: int | None = None  # the line of the statement that is asked about; None: this line is a statement
    distance: int | None = None  # in lines, as the design has it
    form: str | None = None


@dataclass(frozen=True, eq=False)
class FactStream:
    """The stream in the tokens of a model."""

    design: StreamEvalDesign
    stream: TokenStream
    questions: Sequence[Question]  # in their order
    distances: Sequence[int]  # in lines, of every question

    @classmethod
    def write(cls, design: StreamEvalDesign, tokenizer: PreTrainedTokenizerBase) -> FactStream:
        """Write the stream. Raises ValueError if the tokenizer does not tell the answers apart."""
        facts, tokenize = named_facts(design.seed), FactTokenizer(tokenizer)
        lines = design.plan()
        forms = {line.about: line.form for line in lines if line.about is not None}
        ids: list[int] = list(tokenizer("", verbose=False)["input_ids"])  # what the tokenizer begins every text with
        known: dict[int, tuple[TokenizedFact, int]] = {}
        questions: list[Question] = []
        distances: list[int] = []
        for line in lines:
            if line.about is None:
                fact = tokenize.tokenize(next(facts), forms.get(line.number) or design.forms[0])
                if line.number in forms:
                    known[line.number] = fact, len(ids)
                ids += fact.statement
            else:
                assert line.distance is not None, "a question has a distance"
                fact, said = known.pop(line.about)
                questions.append(Question(len(questions), fact, said, len(ids), len(ids) + len(fact.question)))
                distances.append(line.distance)
                ids += fact.asked
        source = f"{len(lines):,} lines of generated facts, {len(questions):,} questions, seed {design.seed}"
        stream = TokenStream.of(ids, name="streameval", source=source, text_sha256=None)
        return cls(design, stream, questions, distances)

    @property
    def exam(self) -> Exam:
        """The whole stream and all questions."""
        return Exam(self.stream.ids, self.questions)

    def protocol(self) -> dict[str, Any]:
        """What a record says of the design."""
        return asdict(self.design)

    def columns(self, answers: Sequence[Answer]) -> dict[str, list[Any]]:
        """The columns of a record that are this study's own."""
        return {"lines": [self.distances[answer.question.number] for answer in answers]}


def _latest(said: Sequence[int], line: int, taken: set[int]) -> int | None:
    """The latest of the lines `said` that is not after `line` and not `taken`; None without any."""
    at = bisect_right(said, line) - 1
    while at >= 0 and said[at] in taken:
        at -= 1
    return said[at] if at >= 0 else None
