"""One endless reply: a million tokens, in which facts are planted and asked at random distances.

    … text [statement] text [statement] text … [question and answer] text … [question and answer] text

The text of the reply is given, not drawn (teacher forcing): it is fed as far as the next choice of recall in one
forward. In a few windows, near the beginning and at the end among them, it is decoded token by token and timed; memory
is read at regular distances. No statement, question or answer lies in a timed window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sinkstream.data import ShortTextError, TokenStream
from sinkstream.evaluation.decoders import Decoder
from sinkstream.measure.memory import held_mb, old_objects_aside
from sinkstream.measure.timing import TokenClock, distribution
from sinkstream.records.schema import check_keys, with_keys
from sinkstream.studies.facts.asking import Answer, Asking, Exam, Question, Report
from sinkstream.studies.facts.record import AnswersRecord
from sinkstream.studies.facts.run import ExamBatch
from sinkstream.studies.facts.statements import FactTokenizer, named_facts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FACTS = 64
# token where the first timed window begins, least tokens of a window, and its least share of the reply
FIRST_WINDOW, WINDOW, WINDOW_SHARE = 4_096, 512, 1 / 256
SAMPLES = 64  # readings of memory, evenly over the reply
ARCHIVE_COUNTS = ("archived", "archive_bytes", "archive_file_bytes", "archive_lost")
LISTED = {  # what each entry of a list in the summary of a record holds
    "windows": dict.fromkeys(("first", "tokens", "mean", "p50")),
    "samples": dict.fromkeys(("token", "device_mb", "cache_bytes", *ARCHIVE_COUNTS[:3])),
}


@dataclass(frozen=True)
class ReplyRecord(AnswersRecord):
    """What one policy answers in one endless reply; the summary has the timed windows and the readings of memory."""

    SCHEMA, KIND, OWN = "sinkstream.reply/1", "reply", {}
    REQUIRED = with_keys(AnswersRecord.REQUIRED, summary=tuple(LISTED))

    @classmethod
    def check_own(cls, content: Mapping[str, Any], where: str) -> None:
        super().check_own(content, where)
        for name, required in LISTED.items():
            for i, one in enumerate(content["summary"][name]):
                check_keys(one, required, where, f"summary.{name}.{i}.")

    @property
    def windows(self) -> list[dict[str, Any]]:
        """Timed windows, the earliest first: first token, tokens, mean, p50, p90 and p99 in milliseconds a token.

        Where they were counted, also ``frames``: how many recall set in the window; None without recall.
        """
        return self.summary["windows"]

    @property
    def samples(self) -> list[dict[str, Any]]:
        """Readings of memory, the earliest first: token, bytes of the cache and of the archive, MB on the device."""
        return self.summary["samples"]


@dataclass(frozen=True)
class ReplyDesign:
    """How a reply is laid out. Raises ValueError, naming the option, the value and what is accepted."""

    tokens: int
    cap: int  # the nearest questions are a cap after their statement
    facts: int = FACTS
    forms: tuple[str, ...] = ("cue", "open")
    seed: int = 0

    def __post_init__(self) -> None:
        least = 4 * (FIRST_WINDOW + WINDOW) + 256 * self.facts
        if self.facts < 1:
            raise ValueError(f"facts={self.facts} is not accepted; accepted: a whole number of at least 1")
        if self.tokens < max(least, 8 * self.cap):
            raise ValueError(
                f"reply_tokens={self.tokens} is not accepted; accepted: at least {max(least, 8 * self.cap)} with"
                f" {self.facts} facts and a cap of {self.cap}"
            )
        if not set(self.forms) <= {"cue", "open"} or not self.forms:
            raise ValueError(f"--forms {','.join(self.forms) or repr('')} is not accepted; accepted: cue, open")

    @property
    def windows(self) -> list[range]:
        """Tokens that are timed one by one: after the first 4,096, at a quarter, at a half, and at the end."""
        tokens = max(WINDOW, int(self.tokens * WINDOW_SHARE))
        starts = (FIRST_WINDOW, self.tokens // 4, self.tokens // 2, self.tokens - tokens)
        return [range(start, start + tokens) for start in starts]

    def places(self, size: int) -> list[tuple[int, int]]:
        """Where each statement and its question begin; every line has `size` tokens of room, distances are random.

        The logarithm of the distance is uniform, from one cap to nine tenths of the reply.
        """
        rng, free = np.random.default_rng(self.seed), np.ones(self.tokens - size, dtype=bool)
        free[: self.cap] = False
        for window in self.windows:
            free[max(0, window.start - 2 * size) : window.stop + size] = False
        places: list[tuple[int, int]] = []
        while len(places) < self.facts:
            distance = int(np.exp(rng.uniform(np.log(self.cap), np.log(0.9 * self.tokens))))
            first = int(rng.integers(self.cap, max(self.cap + 1, self.tokens - size - distance)))
            again = first + distance
            if again < len(free) and free[first] and free[again]:
                places.append((first, again))
                for at in (first, again):
                    free[max(0, at - size) : at + size] = False
        return places

    def write(self, text: TokenStream, tokenizer: PreTrainedTokenizerBase) -> ReplyStream:
        """Write the reply over a text, which begins anew where it is too short."""
        tokenize = FactTokenizer(tokenizer)
        forms = [self.forms[i % len(self.forms)] for i in range(self.facts)]
        facts = [tokenize.tokenize(fact, form) for fact, form in zip(islice(named_facts(self.seed), self.facts), forms)]
        newline = tokenize.ids("\n")
        size = max(max(len(fact.statement), len(fact.asked)) for fact in facts) + len(newline)
        ids = text.ids.repeat(-(-self.tokens // len(text)))[: self.tokens].clone()
        questions = []
        for (first, again), fact in zip(self.places(size), facts):
            for at, line in ((first, fact.statement), (again, fact.asked)):
                ids[at : at + len(newline) + len(line)] = torch.tensor(newline + line)
            said, asked = first + len(newline), again + len(newline)
            questions.append(Question(0, fact, said, asked, asked + len(fact.question)))
        questions.sort(key=lambda question: question.judged)
        numbered = [Question(n, q.fact, q.said, q.first, q.judged) for n, q in enumerate(questions)]
        source = f"{text.source}, {self.tokens / len(text):.1f} times, {self.facts} facts in it, seed {self.seed}"
        stream = TokenStream.of(ids, name=text.name, source=source, text_sha256=text.text_sha256)
        return ReplyStream(self, stream, numbered)


@dataclass(frozen=True, eq=False)
class ReplyStream:
    """A reply in tokens, as `facts.run.Paper` has it."""

    design: ReplyDesign
    stream: TokenStream
    questions: Sequence[Question]

    @property
    def exam(self) -> Exam:
        """The whole reply and all questions."""
        return Exam(self.stream.ids, self.questions)

    def protocol(self) -> dict[str, Any]:
        """What a record says of the design."""
        return asdict(self.design)

    def columns(self, answers: Sequence[Answer]) -> dict[str, list[Any]]:
        """The columns of a record that are this study's own: none."""
        return {}


class Replying(Asking):
    """One reply: as an exam, with timed windows and readings of memory."""

    def __init__(self, *args: Any, design: ReplyDesign):
        super().__init__(*args)
        self.design = design
        self.seconds: dict[int, list[float]] = {window.start: [] for window in design.windows}
        self.frames: dict[int, int | None] = dict.fromkeys(self.seconds)  # that were set in each timed window
        self.samples: list[dict[str, Any]] = []
        self._every = max(1, design.tokens // SAMPLES)

    def feed(self, decoder: Decoder, report: Report) -> None:
        ids = self.exam.ids.to(self.loaded.model.device)
        for _ in self._ask_apart(decoder, ids):
            if self.done // self._every >= len(self.samples) or self.done == len(ids):
                self.samples.append(self._sample(decoder))
            report(self.done)

    def _read(self, decoder: Decoder, ids: torch.Tensor, end: int) -> Iterator[None]:
        for window in self.design.windows:
            if self.done <= window.start < end:
                yield from super()._read(decoder, ids, window.start)
                self._decode(decoder, ids, window)
                yield
        yield from super()._read(decoder, ids, end)

    @old_objects_aside()
    def _decode(self, decoder: Decoder, ids: torch.Tensor, window: range) -> None:
        """Time the tokens of a window one by one, as the benchmark does: the host does not wait between them."""
        clock, before = TokenClock(ids.device), _frames(decoder)
        clock.start()
        for token in ids[window.start : window.stop].split(1):
            decoder.step(token)
            clock.tick()
        self.done = window.stop
        self.seconds[window.start] = clock.seconds().tolist()
        self.frames[window.start] = None if before is None else (_frames(decoder) or 0) - before

    def _sample(self, decoder: Decoder) -> dict[str, Any]:
        counts = decoder.counts()
        archive = {name: counts.get(name) for name in ARCHIVE_COUNTS}
        device_mb = round(held_mb(self.loaded.model.device), 2)
        return {"token": self.done, "device_mb": device_mb, "cache_bytes": counts.get("bytes"), **archive}

    def summary(self) -> dict[str, Any]:
        """As `Asking.summary`, with the timed windows and the readings of memory."""
        windows = [
            {
                "first": first,
                "tokens": len(seconds),
                "frames": self.frames[first],
                **distribution(1e3 * np.array(seconds)),
            }
            for first, seconds in self.seconds.items()
        ]
        return super().summary() | {"windows": windows, "samples": self.samples}


def _frames(decoder: Decoder) -> int | None:
    """How many frames recall has set so far, emptied ones included; None without recall."""
    return None if decoder.frames is None else len(decoder.frames.tokens)


@dataclass
class ReplyBatch(ExamBatch[ReplyRecord]):
    """Several policies over one reply."""

    def sit(self, exam: Exam, settings: Any) -> Asking:
        paper = self.paper
        assert isinstance(paper, ReplyStream), "a reply is what is recorded"
        return Replying(self.loaded, exam, settings, design=paper.design)


def reply_stream(
    design: ReplyDesign, tokens: Callable[[int | None], TokenStream], tokenizer: PreTrainedTokenizerBase
) -> ReplyStream:
    """Write a reply; `tokens` gives all tokens of a text, or the first so many, or raises ShortTextError."""
    try:
        text = tokens(design.tokens)
    except ShortTextError:
        text = tokens(None)
    return design.write(text, tokenizer)
