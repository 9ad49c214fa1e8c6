"""Facts in a real text: what is said once, and asked again a known distance later.

    … text [statement] text of the distance [question and answer] text …

The layout is that of the passages: a statement at the first place, its question at the second. Every distance has as
many questions of each form; the answers are chosen among ten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sinkstream.data import ShortTextError, TokenStream
from sinkstream.records.schema import with_keys
from sinkstream.studies.facts.asking import Answer, Exam, Question
from sinkstream.studies.facts.record import AnswersRecord
from sinkstream.studies.facts.statements import FORMS, SOURCES, Fact, FactTokenizer, TokenizedFact
from sinkstream.studies.recall.record import Placement
from sinkstream.studies.recall.run import SMALLEST_PASSAGE, RecallDesign

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class FactsRecord(AnswersRecord):
    """What one policy answers of facts in a text; `ratio`: distance over cap."""

    SCHEMA, KIND, OWN = "sinkstream.facts/1", "facts", {"ratio": np.float64}
    REQUIRED = with_keys(AnswersRecord.REQUIRED, protocol=("facts",))


@dataclass(frozen=True)
class FactsDesign:
    """How facts are laid out. Raises ValueError, naming the option, the value and what is accepted."""

    cap: int  # unit of the distances, and tokens before the first statement
    ratios: tuple[float, ...]  # distances from statement to question, over cap
    facts: int  # at each distance, in each form
    forms: tuple[str, ...] = ("cue", "open", "paraphrase")
    seed: int = 0

    def __post_init__(self) -> None:
        if self.facts < 1:
            raise ValueError(f"facts={self.facts} is not accepted; accepted: a whole number of at least 1")
        unknown = [form for form in self.forms if form not in FORMS]
        if unknown or not self.forms:
            raise ValueError(
                f"--forms {','.join(self.forms) or repr('')} is not accepted; accepted: {', '.join(FORMS)}"
            )
        self._layout(SMALLEST_PASSAGE)

    def _layout(self, size: int) -> RecallDesign:
        return RecallDesign(self.cap, self.ratios, self.facts * len(self.forms), size, self.seed)

    def facts_of(self, tokenizer: PreTrainedTokenizerBase) -> list[TokenizedFact]:
        """As many facts as the streams need, the forms in turn.

        Raises ValueError if there are not so many, or if the tokenizer does not tell the answers apart.
        """
        wanted, tokenize = self.facts * len(self.ratios), FactTokenizer(tokenizer)
        sources: dict[Callable[[int], Iterator[Fact]], Iterator[Fact]] = {}
        columns = []
        for form in self.forms:
            facts = sources.setdefault(SOURCES[form], SOURCES[form](self.seed))
            column = [tokenize.tokenize(fact, form) for fact in islice(facts, wanted)]
            if len(column) < wanted:
                raise ValueError(
                    f"{wanted} facts in form {form!r} are asked for ({self.facts} at each of {len(self.ratios)}"
                    f" distances), and there are {len(column)}; accepted: fewer --facts or --distances, or another"
                    " --seed in a further run"
                )
            columns.append(column)
        return [fact for row in zip(*columns) for fact in row]

    def streams(self, tokens: Callable[[int], TokenStream], tokenizer: PreTrainedTokenizerBase) -> FactsStream:
        """Write the facts into a text, of which `tokens` gives the first so many tokens.

        Raises ValueError as `facts_of`, and if the text is too short.
        """
        facts, newline = self.facts_of(tokenizer), FactTokenizer(tokenizer).ids("\n")
        size = max(max(len(fact.statement), len(fact.asked)) for fact in facts) + len(newline)
        places = self._layout(size).placements()
        length = max(place.second for place in places) + size
        try:
            text = tokens(length)
        except ShortTextError as error:
            raise ValueError(
                f"{error.reason} (facts at {len(places)} places); accepted: a longer text, or fewer --facts or smaller"
                " --distances"
            ) from error
        ids, asked = text.ids.clone(), []
        for place, fact in zip(places, facts, strict=True):
            said, first = (at + len(newline) for at in (place.first, place.second))
            for at, line in ((place.first, fact.statement), (place.second, fact.asked)):
                ids[at : at + len(newline) + len(line)] = torch.tensor(newline + line)
            asked.append((place, Question(0, fact, said, first, first + len(fact.question))))
        asked.sort(key=lambda pair: pair[1].judged)
        questions = [Question(n, q.fact, q.said, q.first, q.judged) for n, (_, q) in enumerate(asked)]
        stream = TokenStream.of(
            ids,
            name=text.name,
            source=f"{text.source}, {len(facts)} facts of {', '.join(self.forms)} in it, seed {self.seed}",
            text_sha256=text.text_sha256,
        )
        return FactsStream(self, stream, questions, [place for place, _ in asked])


@dataclass(frozen=True, eq=False)
class FactsStream:
    """A text with facts, as `facts.run.Paper` has it."""

    design: FactsDesign
    stream: TokenStream
    questions: Sequence[Question]  # in their order
    placements: Sequence[Placement]  # of every question

    @property
    def exam(self) -> Exam:
        """The whole stream and all questions."""
        return Exam(self.stream.ids, self.questions)

    def protocol(self) -> dict[str, Any]:
        """What a record says of the design."""
        return asdict(self.design)

    def columns(self, answers: Sequence[Answer]) -> dict[str, list[Any]]:
        """The columns of a record that are this study's own."""
        return {"ratio": [self.placements[answer.question.number].ratio for answer in answers]}
