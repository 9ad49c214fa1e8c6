"""Recall past the window: what a passage costs when it occurs again, by how far back it occurred before.

Perplexity hides what eviction forgets, because ordinary text seldom repeats itself word for word. In this study real
passages occur twice in a stream of other real text, a known distance apart, and the model streams over it.

    … text [passage] text of the distance [passage] text …        the passage is repeated
    … text  text     text of the distance [passage] text …        the control: the passage is new

The recall gain of a passage is its mean NLL in the control minus its mean NLL when repeated, on the same tokens at the
same index; the first token, which no context predicts, is left out. A gain of 0 means that the passage is forgotten.
One stream holds all passages at all distances, each passage once, so that two runs give the whole curve of a policy.

That stream is longer than the trained positions, which the full cache must not exceed. For the full cache an excerpt of
every passage is run: the first tokens of the stream (attention sinks), up to cap tokens of context, and all tokens from
the first occurrence to the end of the second, where that fits the trained positions.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.console import Console

from sinkstream.data import ShortTextError, TokenStream
from sinkstream.evaluation.decoders import Frames
from sinkstream.evaluation.record import find_complete, provenance, run_identity, run_protocol
from sinkstream.evaluation.run import RunResult, check_ids, check_run, run
from sinkstream.evaluation.runner import Job, Report, Request, Runner
from sinkstream.evaluation.settings import RunSettings
from sinkstream.models import LoadedModel
from sinkstream.records.plain import new_record_id
from sinkstream.studies.facts.asking import with_told
from sinkstream.studies.recall.record import Placement, RecallRecord, ScoredPassage, passage_columns, token_curve

RATIOS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0, 8.0, 16.0)
PASSAGES, PASSAGE_TOKENS = 16, 64
GAP = 32  # tokens of text between a passage and the next one
SPREAD = 96  # free indices that a passage is placed at random among, so that placements do not align with prunes
FIRST_TOKENS = 4  # of the stream, at the start of every excerpt
SMALLEST_PASSAGE = 8


@dataclass(frozen=True)
class RecallDesign:
    """How passages are laid out. Raises ValueError, naming the option, the value and what is accepted."""

    cap: int  # unit of the distances, and tokens before the first passage; at least `FIRST_TOKENS`
    ratios: tuple[float, ...] = RATIOS  # distances from the first occurrence to the second, over cap
    passages: int = PASSAGES  # at each distance
    passage_tokens: int = PASSAGE_TOKENS
    seed: int = 0  # of the placements, and of the order of the passages

    def __post_init__(self) -> None:
        for name, least in (("cap", FIRST_TOKENS), ("passages", 1), ("passage_tokens", SMALLEST_PASSAGE), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"{name}={getattr(self, name)} is not accepted; accepted: a whole number of at least {least}"
                )
        if not self.ratios:
            raise ValueError("--distances '' is not accepted; accepted: one or more multiples of the cap")
        for ratio in self.ratios:
            if not (np.isfinite(ratio) and self.distance(ratio) >= self.passage_tokens):
                raise ValueError(
                    f"--distances {ratio:g}: {ratio:g} × cap {self.cap} is less than a passage of"
                    f" {self.passage_tokens} tokens, whose two occurrences would overlap; accepted: at least"
                    f" {self.passage_tokens / self.cap:.3g}"
                )
        if len(set(self.ratios)) < len(self.ratios):
            raise ValueError(
                f"--distances {','.join(f'{r:g}' for r in self.ratios)} names one twice; accepted: each once"
            )

    def distance(self, ratio: float) -> int:
        """Tokens from the first occurrence to the second."""
        return round(ratio * self.cap)

    def placements(self) -> list[Placement]:
        """All passages, the longest distances first; no two passages touch, none is in the first cap tokens."""
        rng, near = np.random.default_rng(self.seed), self.passage_tokens + GAP
        room = self.cap + self.distance(max(self.ratios)) + 8 * near * self.passages * len(self.ratios) + SPREAD
        free, placed = np.ones(room, dtype=bool), []
        free[: self.cap] = False
        for ratio in sorted(self.ratios, reverse=True):
            distance = self.distance(ratio)
            for _ in range(self.passages):
                first = int(rng.choice(np.flatnonzero(free[: room - distance] & free[distance:])[:SPREAD]))
                placed.append(Placement(ratio, first, first + distance))
                for start in (first, first + distance):
                    free[max(0, start - near + 1) : start + near] = False
        return placed

    def streams(self, tokens: Callable[[int], TokenStream]) -> "RecallStreams":
        """Write the passages into a text.

        `tokens` gives the first so many tokens of the text, or raises ValueError if it is too short. The text of the
        stream comes first, then that of the passages.
        """
        places, size = self.placements(), self.passage_tokens
        length = max(place.second for place in places) + size
        try:
            text = tokens(length + len(places) * size)
        except ShortTextError as error:
            raise ValueError(
                f"{error.reason} (a stream of {length} and {len(places)} passages of {size}); accepted: a longer text,"
                " or fewer --passages, smaller --distances, --passage-tokens or --cap"
            ) from error
        control = text.ids[:length].clone()
        passages = text.ids[length:].view(-1, size)
        order = np.random.default_rng(self.seed + 1).permutation(len(places))
        for place, passage in zip(places, order, strict=True):
            control[place.second : place.second + size] = passages[passage]
        repeated = control.clone()
        for place in places:
            repeated[place.first : place.first + size] = control[place.second : place.second + size]
        source = f"{text.source}, {len(places)} passages of {size} tokens repeated"
        origin = partial(TokenStream.of, name=text.name, source=source, text_sha256=text.text_sha256)
        return RecallStreams(self, places, origin(repeated), origin(control))


@dataclass(frozen=True)
class Trial:
    """Tokens of one run and of its control, and the passages that are scored."""

    # repeated, control: (tokens,), int64
    repeated: torch.Tensor
    control: torch.Tensor
    prefill: int
    # number of the passage among the placements, and the index in these tokens of its second occurrence
    scored: list[tuple[int, int]]


@dataclass(frozen=True)
class RecallStreams:
    """The stream with every passage twice, and its control with the second occurrences only."""

    design: RecallDesign
    placements: list[Placement]
    repeated: TokenStream
    control: TokenStream

    def whole(self) -> list[Trial]:
        """One trial: the whole stream, with all passages scored."""
        scored = [(number, place.second) for number, place in enumerate(self.placements)]
        return [Trial(self.repeated.ids, self.control.ids, self.design.cap, scored)]

    def excerpts(self, positions: int | None) -> list[Trial]:
        """One trial a passage: an excerpt of at most `positions` tokens (None: no limit).

        Raises ValueError if not even the shortest distance fits.
        """
        trials = []
        for number, place in enumerate(self.placements):
            end = place.second + self.design.passage_tokens
            start = max(FIRST_TOKENS, place.first - self.design.cap)
            start = start if positions is None else max(start, end + FIRST_TOKENS - positions)
            if start <= place.first:
                both = (stream.ids for stream in (self.repeated, self.control))
                repeated, control = (torch.cat([ids[:FIRST_TOKENS], ids[start:end]]) for ids in both)
                second = place.second - start + FIRST_TOKENS
                trials.append(Trial(repeated, control, second, [(number, second)]))
        if not trials:
            assert positions is not None, "without a limit every passage fits: all lie after the first cap tokens"
            shortest = self.design.distance(min(self.design.ratios))
            raise ValueError(
                f"the full cache of a passage seen {shortest} tokens before goes past the {positions} trained"
                f" positions; accepted: another --policy, or a distance of at most"
                f" {positions - self.design.passage_tokens - FIRST_TOKENS} tokens"
            )
        return trials


def check_recalling(settings: RunSettings) -> None:
    """Raise ValueError if a method has no cache of its own to recall from."""
    if settings.method == "recompute":
        raise ValueError(
            "policy 'recompute' forwards its whole window for every token and keeps nothing else: inside the"
            " window it recalls what the full cache does; accepted: full, or an eviction policy"
        )


@dataclass
class RecallBatch:
    """Several policies over one model and one pair of streams."""

    loaded: LoadedModel
    streams: RecallStreams
    request: Request  # where the records go, and what they say of the command

    def run(self, settings: list[RunSettings], console: Console) -> list[RecallRecord]:
        """Run all policies in order; an interrupted or failed one is recorded and ends the batch.

        Raises ValueError if a policy, the model and the streams do not fit together, or as `Runner.run`; nothing has
        run then. Raises WriteError as `Runner.run`.
        """
        check_ids(self.loaded, self.streams.control.ids)
        trials = [self._trials(one) for one in settings]
        jobs = [
            Job(one.label(), partial(self._measure, one, paired), partial(self._find, one))
            for one, paired in zip(settings, trials)
        ]
        runner = Runner(self.request, RecallRecord.write, RecallRecord.read, self.loaded.model.device)
        return runner.run(jobs, console)

    def _trials(self, settings: RunSettings) -> list[Trial]:
        check_recalling(settings)
        if settings.method == "full":
            limit = None if settings.allow_untrained_positions else self.loaded.trained_positions
            return self.streams.excerpts(limit)
        check_run(self.loaded, self.streams.repeated.ids, with_told(settings, []))
        return self.streams.whole()

    def _measure(self, settings: RunSettings, trials: list[Trial], report: Report) -> list[Callable]:
        shape = (len(self.streams.placements), self.streams.design.passage_tokens - 1)
        nll = {name: np.full(shape, np.nan) for name in ("repeated", "control")}
        held: list[float | None] = [None] * len(self.streams.placements)
        done, total = 0, 2 * sum(len(trial.control) - 1 - trial.prefill for trial in trials)

        def report_all(before: int, now: int, _: int) -> None:
            report(before + now, total)

        for trial, name in ((trial, name) for trial in trials for name in nll):
            one = with_told(replace(settings, prefill=trial.prefill), self._wanted(trial))
            result = run(self.loaded, getattr(trial, name), one, partial(report_all, done))
            done += len(trial.control) - 1 - trial.prefill
            for number, start in trial.scored:
                nll[name][number] = self._passage_nll(result, start)
                if name == "repeated" and result.frames is not None:
                    held[number] = self._held(result.frames, self.streams.placements[number])
            if result.status != "complete":
                break
        return [partial(self._record, settings, result, nll, held)]

    def _wanted(self, trial: Trial) -> list[tuple[int, int, int, int]]:
        """What an oracle is told: while a passage occurs again, its first occurrence is wanted."""
        size = self.streams.design.passage_tokens
        firsts = (self.streams.placements[number].first for number, _ in trial.scored)
        wanted = [(again, again + size, first, first + size) for (_, again), first in zip(trial.scored, firsts)]
        return sorted(wanted)

    def _held(self, frames: Frames, place: Placement) -> float:
        """Share of a passage's tokens, but for the first, that recall held when they were predicted."""
        ahead = range(1, self.streams.design.passage_tokens)
        found = [frames.held(place.second + i - 1, range(place.first + i, place.first + i + 1)) for i in ahead]
        return float(np.mean(found))

    def _passage_nll(self, result: RunResult, start: int) -> np.ndarray:
        """NLL of the tokens of a passage without its first, (tokens - 1,); NaN if the run ended before."""
        index, size = result.arrays["index"], self.streams.design.passage_tokens
        scored = result.arrays["nll"][(index > start) & (index < start + size)]
        return scored if len(scored) == size - 1 else np.full(size - 1, np.nan)

    def _identity(self, settings: RunSettings) -> dict[str, Any]:
        design = self.streams.design
        layout = {"ratios": list(design.ratios), "passages": design.passages, "passage_tokens": design.passage_tokens}
        return {
            **run_identity(self.loaded, self.streams.repeated, settings),
            "recall": {**layout, "seed": design.seed, "control_sha256": self.streams.control.sha256},
        }

    def _find(self, settings: RunSettings) -> list[RecallRecord]:
        return find_complete(RecallRecord.below, self.request.out, self._identity(settings))

    def _record(
        self, settings: RunSettings, result: RunResult, nll: dict[str, np.ndarray], held: list[float | None]
    ) -> dict[str, Any]:
        """The record of a policy; the last run, `result`, gives its status and the PPL of the control."""
        streams, identity = self.streams, self._identity(settings)
        again, unseen = nll["repeated"], nll["control"]
        passages = [
            ScoredPassage(
                streams.placements[i],
                float(again[i].mean()),
                float(unseen[i].mean()),
                gains=unseen[i] - again[i],
                held=held[i],
            )
            for i in np.flatnonzero(np.isfinite(again + unseen).all(axis=1))
        ]
        covers_stream = settings.method != "full"
        return {
            "id": new_record_id("recall", self.loaded.name, streams.repeated.name, settings.label()),
            "status": result.status,
            "status_reason": result.reason,
            **provenance(self.loaded, settings, self.request, identity),
            "data": streams.repeated.record(),
            "protocol": {
                **run_protocol(self.loaded, settings, self.request),
                "cap": streams.design.cap,
                "block_tokens": settings.block_tokens,
                **identity["recall"],
            },
            "summary": {"ppl": result.summary["ppl"] if covers_stream and result.status == "complete" else None},
            "passages": passage_columns(passages),
            "curve": token_curve(passages, streams.design.passage_tokens),
        }
