"""Teacher forcing: one text through one decoder, per-token arrays out."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from math import nan
from typing import Any, NamedTuple

import numpy as np
import torch

from sinkstream.cache.vocabulary import check_vocabulary, vocabulary_size
from sinkstream.evaluation.backends import BACKENDS, check_positions, open_decoder
from sinkstream.evaluation.decoders import Decoder, Frames, ModuleDecoder, RecomputeDecoder
from sinkstream.evaluation.settings import RunSettings
from sinkstream.measure.memory import PeakMemory
from sinkstream.measure.metrics import summarise, token_nll
from sinkstream.measure.timing import timed
from sinkstream.models import LoadedModel
from sinkstream.policies import Step
from sinkstream.policies.schedule import NonFiniteRisk

Progress = Callable[[int, int], None]
TIMES = ("prefill", "ttft", "total")
UNKNOWN = -1  # in place of a token id


class Row(NamedTuple):
    """Figures of one decode step, which appends the token before `token` and predicts that one."""

    token: int  # index in the text of the token that is scored
    nll: float  # nats; NaN: not scored
    seconds: float  # of the step; NaN: not timed
    step: Step  # what the step did to the cache
    top1: int = UNKNOWN  # the token with the largest logit


def row_arrays(rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """The rows as the arrays (tokens,) of a run record."""
    index, nll, seconds, steps, top1 = zip(*rows) if rows else ((), (), (), (), ())
    return {
        "index": np.array(index, dtype=np.int32),
        "nll": np.array(nll, dtype=np.float32),
        "seconds": np.array(seconds, dtype=np.float32),
        "kv_length": np.array([s.visible for s in steps], dtype=np.int32),
        "event": np.array([s.event for s in steps], dtype=bool),
        "drop_size": np.array([s.drop for s in steps], dtype=np.int32),
        "top1": np.array(top1, dtype=np.int32),
    }


@dataclass
class RunResult:
    """The outcome of a run, complete or interrupted."""

    arrays: dict[str, np.ndarray]  # as `row_arrays` gives them
    summary: dict[str, Any]  # as `measure.metrics.summarise`
    status: str  # {"complete", "partial", "failed"}
    reason: str | None  # why the run is not complete
    prefill_tokens: int
    frames: Frames | None = None  # what recall had brought back, and when; None without recall


class NonFiniteLogits(ArithmeticError):
    """The model's prediction is not a number."""


def run(loaded: LoadedModel, ids: torch.Tensor, settings: RunSettings, progress: Progress | None = None) -> RunResult:
    """Run the protocol once (or `settings.repeats` times) over token ids (tokens,) int64.

    Ctrl-C, non-finite logits and exhausted GPU memory end the run but keep what was measured: see `RunResult.status`.
    With repeats, quality is that of the first run and every time is the median over the complete runs.

    `progress` is called with the number of decoded tokens and their total. Raises ValueError, before anything runs, if
    settings, model and text do not fit together.
    """
    _check_text(loaded, settings, ids)
    device = loaded.model.device
    ids = ids.to(device)
    attempts = [Attempt(loaded, ids, settings) for _ in range(settings.repeats)]
    to_decode = attempts[0].last - attempts[0].first

    def decode_all() -> None:
        for repeat, attempt in enumerate(attempts):
            if progress:
                attempt.report = _shifted(progress, repeat * to_decode, settings.repeats * to_decode)
            _, attempt.times["total"] = timed(attempt.decode, device=device)

    with PeakMemory(device) as memory:
        status, reason = _status_of(decode_all, lambda: _last_token(attempts))
    arrays = row_arrays(attempts[0].rows)
    complete = [row_arrays(attempt.rows)["seconds"] for attempt in attempts if "total" in attempt.times]
    if len(complete) > 1:
        arrays["seconds"] = np.median(complete, axis=0).astype(np.float32)
    times = {name: [attempt.times[name] for attempt in attempts if name in attempt.times] for name in TIMES}
    prefill, ttft, total = (float(np.median(seconds)) if seconds else None for seconds in times.values())
    summary = summarise(arrays, prefill, ttft, total, memory, warmup_tokens=settings.warmup_tokens)
    return RunResult(arrays, summary, status, reason, attempts[0].first, attempts[0].frames)


@torch.inference_mode()
def run_interleaved(
    loaded: LoadedModel, ids: torch.Tensor, settings: list[RunSettings], progress: Progress | None = None
) -> list[RunResult]:
    """Run several settings in turn at every token, so that clock drift affects all of them alike.

    The order rotates from token to token. Every token is decoded and timed by itself. Peak memory, which is that of all
    runs together, is left out of the summaries. Ends as `run` does, all runs at the same token.

    Raises ValueError if the settings cannot take turns (see `common_prefill`), or do not fit model and text.
    """
    first = common_prefill(settings, len(ids))
    for one in settings:
        _check_text(loaded, one, ids)
    ids = ids.to(loaded.model.device)
    attempts = [Attempt(loaded, ids, one) for one in settings]

    def decode_in_turn() -> None:
        for attempt, decoder in zip(attempts, decoders):
            attempt.prefill(decoder)
        for t in range(first, len(ids) - 1):
            for turn in range(len(settings)):
                i = (turn + t) % len(settings)
                attempts[i].decode_steps(decoders[i], range(t, t + 1))
            if progress:
                progress(t + 1 - first, len(ids) - 1 - first)

    with ExitStack() as stack:
        decoders = [stack.enter_context(closing(open_decoder(loaded, one))) for one in settings]
        status, reason = _status_of(decode_in_turn, lambda: _last_token([_slowest(attempts)]))
    shortest = len(_slowest(attempts).rows)
    results = []
    for attempt in attempts:
        arrays = {name: array[:shortest] for name, array in row_arrays(attempt.rows).items()}
        prefill, ttft = (attempt.times.get(name) for name in ("prefill", "ttft"))
        summary = summarise(arrays, prefill, ttft, None, None, warmup_tokens=attempt.settings.warmup_tokens)
        results.append(RunResult(arrays, summary, status, reason, first))
    return results


def common_prefill(settings: list[RunSettings], tokens: int) -> int:
    """The prefill length that interleaved runs share; ValueError if these settings cannot take turns."""
    lengths = {one.prefill_tokens(tokens) for one in settings}
    check_turns(settings, len(lengths))
    return lengths.pop()


def check_turns(settings: list[RunSettings], prefill_lengths: int = 1) -> None:
    """Raise ValueError if settings, with so many prefill lengths, cannot take turns token by token."""
    unfit = [one for one in settings if one.evaluate != "steps" or one.repeats > 1 or one.timed_tokens is not None]
    if prefill_lengths > 1 or unfit:
        raise ValueError(
            "interleaved runs are timed token by token to the end and have one prefill length; accepted: evaluate=steps"
            " without repeats and timed_tokens, and the same prefill"
        )


def check_run(loaded: LoadedModel, ids: torch.Tensor, settings: RunSettings) -> None:
    """Raise ValueError, as `run` would, if settings, model and a text (tokens,) do not fit together."""
    _check_text(loaded, settings, ids)
    BACKENDS[settings.backend](loaded, settings).check()


class Attempt:
    """One pass over token ids (tokens,) int64 on the device, teacher-forced: what it measured so far."""

    def __init__(self, loaded: LoadedModel, ids: torch.Tensor, settings: RunSettings):
        self.loaded, self.ids, self.settings = loaded, ids, settings
        self.first = settings.prefill_tokens(len(ids))  # the first token that is decoded
        self.last = len(ids) - 1  # the last token of the text, which is predicted and not decoded
        self.rows: list[Row] = []  # appended whole: Ctrl-C may come at any time
        self.times: dict[str, float] = {}  # seconds of those of `TIMES` that have ended
        self.report: Callable[[int], None] = lambda done: None  # called with the number of decoded tokens
        self.frames: Frames | None = None  # of the pass, where there is recall

    @torch.inference_mode()
    def decode(self) -> None:
        """Prefill, then all tokens: those that are timed one by one, the others in blocks if the decoder has blocks."""
        to_decode, bad_block = self.last - self.first, None
        timed_tokens = min(to_decode, self.settings.timed_tokens or to_decode)
        timed_end = self.first + (timed_tokens if self.settings.evaluate == "steps" else 0)
        with closing(open_decoder(self.loaded, self.settings)) as decoder:
            self.frames = decoder.frames
            self.prefill(decoder)
            self.decode_steps(decoder, range(self.first, timed_end))
            if isinstance(decoder, ModuleDecoder):
                bad_block = self._decode_blocks(decoder, timed_end)
            else:
                self.decode_steps(decoder, range(timed_end, self.last), keep_times=False)
        if bad_block:
            self._decode_bad_block(bad_block)

    def prefill(self, decoder: Decoder) -> None:
        """Feed the prompt and choose a token."""
        device = self.ids.device
        with _told(f"after the prefill of {self.first} tokens"):
            logits, seconds = timed(decoder.prefill, self.ids[: self.first], device=device)
        _, choice_seconds = timed(lambda: logits.argmax(-1).item(), device=device)
        self.times |= {"prefill": seconds, "ttft": seconds + choice_seconds}
        if not torch.isfinite(logits).all():
            raise NonFiniteLogits(f"the logits after the prefill of {self.first} tokens are not finite")

    def decode_steps(self, decoder: Decoder, tokens: range, *, keep_times: bool = True) -> None:
        """Teacher forcing, token by token: each step is timed by itself, without scoring."""
        for t in tokens:
            token = self.ids[t : t + 1]
            if self.settings.sample_every > 1 and (t - self.first) % self.settings.sample_every:
                assert isinstance(decoder, RecomputeDecoder), "only recompute leaves tokens out"
                decoder.skip(token)
                self.rows.append(Row(t + 1, nan, nan, decoder.last_step()))
            else:
                with _told(f"that predict token {t + 1}"):
                    logits, seconds = timed(decoder.step, token, device=token.device)
                nll = token_nll(logits, self.ids[t + 1 : t + 2]).item()
                if not np.isfinite(nll):
                    raise NonFiniteLogits(f"the logits that predict token {t + 1} are not finite")
                top1 = int(logits.argmax(-1))
                self.rows.append(Row(t + 1, nll, seconds if keep_times else nan, decoder.last_step(), top1))
            self.report(t + 1 - self.first)

    def _decode_blocks(self, decoder: ModuleDecoder, start: int) -> range | None:
        """Teacher forcing in blocks, from `start` on: one forward up to the policy's next decision; nothing is timed.

        Stops at the first block with a non-finite prediction and returns the tokens of that block, which have no rows.
        """
        t = start
        decoder.announce(self.ids[start : self.last])
        for size in decoder.chunk_sizes(self.last - start):
            try:
                nll = decoder.score(self.ids[t : t + size], self.ids[t + 1 : t + size + 1]).tolist()
            except NonFiniteRisk:
                return range(t, t + size)
            scored = [value for i, value in enumerate(nll, t - self.first) if i % self.settings.sample_every == 0]
            if not np.isfinite(scored).all():
                return range(t, t + size)
            top1 = [UNKNOWN] * len(nll) if decoder.top1 is None else decoder.top1.tolist()
            for i, (value, step, token) in enumerate(zip(nll, decoder.steps(), top1, strict=True)):
                self.rows.append(Row(t + i + 1, value, nan, step, token))
            t += len(nll)
            self.report(t - self.first)
        return None

    def _decode_bad_block(self, block: range) -> None:
        """Decode a block again, token by token, to find the token that is not finite.

        In one forward a NaN also spoils earlier tokens: a masked token has weight 0, and 0 times NaN is NaN.
        """
        with closing(open_decoder(self.loaded, self.settings)) as decoder:
            decoder.prefill(self.ids[: block.start])
            self.decode_steps(decoder, block, keep_times=False)
        raise NonFiniteLogits(
            f"the logits that predict tokens {block.start + 1} to {block.stop} in one forward are not finite,"
            " although one by one they are"
        )


@contextmanager
def _told(which: str):
    """A policy's refusal of the logits inside, as the run's own."""
    try:
        yield
    except NonFiniteRisk:
        raise NonFiniteLogits(f"the logits {which} are not finite") from None


def _status_of(decode: Callable[[], None], place: Callable[[], str]) -> tuple[str, str | None]:
    """Decode; returns the status of the run and, unless it is complete, the reason; `place` says where it ended."""
    try:
        decode()
    except KeyboardInterrupt:
        return "partial", f"interrupted {place()}"
    except NonFiniteLogits as error:
        return "failed", str(error)
    except (torch.OutOfMemoryError, MemoryError) as error:
        first_line = next(iter(str(error).splitlines()), "")
        return "failed", f"out of memory {place()}: {first_line}".rstrip(": ")
    return "complete", None


def _slowest(attempts: list[Attempt]) -> Attempt:
    """Of attempts that take turns, the one with the fewest tokens."""
    return min(attempts, key=lambda attempt: len(attempt.rows))


def _last_token(attempts: list[Attempt]) -> str:
    """The last token that was decoded, in words."""
    number, latest = [(i, one) for i, one in enumerate(attempts, 1) if i == 1 or one.rows or one.times][-1]
    repeat = f" of repeat {number}" if len(attempts) > 1 else ""
    return f"after token {latest.rows[-1].token if latest.rows else latest.first}{repeat}"


def _shifted(progress: Progress, offset: int, total: int) -> Callable[[int], None]:
    return lambda done: progress(offset + done, total)


def check_ids(loaded: LoadedModel, ids: torch.Tensor) -> None:
    """Raise ValueError if a text (tokens,) has a token that the model does not know."""
    check_vocabulary(ids, vocabulary_size(loaded.model), "the text")


def _check_text(loaded: LoadedModel, settings: RunSettings, ids: torch.Tensor) -> None:
    """Raise ValueError if a text is too short to decode, positions lie past the trained ones, or as `check_ids`."""
    settings.prefill_tokens(len(ids))
    check_positions(settings, loaded.trained_positions, loaded.name, len(ids))
    check_ids(loaded, ids)
