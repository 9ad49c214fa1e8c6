"""The decode loop of the evaluation: one text, one decoder, per-token arrays out."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from sinkstream.evaluation.backends import BACKENDS, open_decoder
from sinkstream.evaluation.decoders import Decoder
from sinkstream.evaluation.settings import RunSettings
from sinkstream.measure.memory import PeakMemory
from sinkstream.measure.metrics import summarise, token_nll
from sinkstream.measure.timing import timed
from sinkstream.models import LoadedModel
from sinkstream.policies import Step

Progress = Callable[[int, int], None]
TIMES = ("prefill", "ttft", "total")
UNKNOWN = -1  # in place of a token id


@dataclass
class TokenRows:
    """Per-token figures of one run, one row a decode step.

    The row of step t holds the NLL of token t + 1 (its index in the text), the seconds of the step that predicted it,
    what the cache did at that step, and the token that it found likeliest (-1: not known).
    """

    rows: list[tuple[int, float, float, Step, int]] = field(default_factory=list)

    def add(self, index: int, nll: float, seconds: float, step: Step, top1: int = UNKNOWN) -> None:
        """Append one row, whole or not at all: Ctrl-C may come anywhere."""
        self.rows.append((index, nll, seconds, step, top1))

    def arrays(self) -> dict[str, np.ndarray]:
        """The rows as the arrays of a run record."""
        index, nll, seconds, steps, top1 = zip(*self.rows) if self.rows else ((), (), (), (), ())
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
    """What a run gave, whole or cut short.

    Attributes
    ----------
    arrays : dict of ndarray
        As `TokenRows.arrays`.
    summary : dict
        As `measure.metrics.summarise`.
    status : {"complete", "partial", "failed"}
    reason : str or None
        Why the run is not complete.
    prefill_tokens : int
    """

    arrays: dict[str, np.ndarray]
    summary: dict[str, Any]
    status: str
    reason: str | None
    prefill_tokens: int


class NonFiniteLogits(ArithmeticError):
    """The model's prediction is not a number."""


def run(loaded: LoadedModel, ids: torch.Tensor, settings: RunSettings, progress: Progress | None = None) -> RunResult:
    """Run the protocol once (or `settings.repeats` times) over a token stream.

    Ctrl-C, non-finite logits and exhausted GPU memory end the run but keep what was measured: see `RunResult.status`.
    With repeats, quality is that of the first run and every time the median over the runs that came to their end.

    Parameters
    ----------
    ids : Tensor, (tokens,), int64
    progress : callable or None
        Called with (decoded tokens, of how many).

    Raises
    ------
    ValueError
        If settings, model and text do not fit together; nothing has run then.
    """
    prefill_tokens = settings.prefill_tokens(len(ids))
    _check_full_fits(loaded, settings, len(ids))
    device = loaded.model.device
    ids = ids.to(device)
    attempts = [(TokenRows(), {}) for _ in range(settings.repeats)]
    to_decode = len(ids) - prefill_tokens - 1

    def all_attempts() -> None:
        for repeat, (rows, times) in enumerate(attempts):
            report = _shifted(progress, repeat * to_decode, settings.repeats * to_decode)
            times["total"] = timed(_attempt, loaded, ids, settings, rows, report, times, device=device)[1]

    with PeakMemory(device) as memory:
        status, reason = _ended(all_attempts, lambda: _place(attempts, prefill_tokens))
    arrays = attempts[0][0].arrays()
    whole = [rows.arrays()["seconds"] for rows, times in attempts if "total" in times]
    if len(whole) > 1:
        arrays["seconds"] = np.median(whole, axis=0).astype(np.float32)
    medians = {name: _median([times[name] for _, times in attempts if name in times]) for name in TIMES}
    summary = summarise(arrays, *(medians[name] for name in TIMES), memory, warmup_tokens=settings.warmup_tokens)
    return RunResult(arrays, summary, status, reason, prefill_tokens)


@torch.inference_mode()
def run_interleaved(
    loaded: LoadedModel, ids: torch.Tensor, settings: list[RunSettings], progress: Progress | None = None
) -> list[RunResult]:
    """Run several settings in turn at every token, so that a drift of the machine hits all of them alike.

    The order rotates from token to token. Every token is decoded and timed by itself; peak memory, which is that of all
    runs together, is left out of the summaries. Ends as `run` does, all runs at the same token.

    Parameters
    ----------
    settings : list of RunSettings
        With ``evaluate="steps"``, no repeats and one prefill length.

    Raises
    ------
    ValueError
        If the settings cannot take turns, or do not fit model and text.
    """
    prefill_tokens = common_prefill(settings, len(ids))
    for one in settings:
        _check_full_fits(loaded, one, len(ids))
    ids = ids.to(loaded.model.device)
    rows, times = [TokenRows() for _ in settings], [{} for _ in settings]
    decoders = [open_decoder(loaded, one) for one in settings]

    def all_in_turn() -> None:
        for decoder, mine in zip(decoders, times):
            _prefill(decoder, ids[:prefill_tokens], mine)
        for t in range(prefill_tokens, len(ids) - 1):
            for turn in range(len(settings)):
                i = (turn + t) % len(settings)
                _decode_steps(
                    decoders[i], ids, prefill_tokens, range(t, t + 1), rows[i], settings[i], lambda done: None
                )
            if progress:
                progress(t + 1 - prefill_tokens, len(ids) - 1 - prefill_tokens)

    try:
        status, reason = _ended(all_in_turn, lambda: _place([(rows[0], times[0])], prefill_tokens))
    finally:
        for decoder in decoders:
            decoder.close()
    shortest = min(len(r.rows) for r in rows)
    results = []
    for one, mine, its in zip(settings, rows, times):
        arrays = {name: array[:shortest] for name, array in mine.arrays().items()}
        summary = summarise(arrays, its.get("prefill"), its.get("ttft"), None, None, warmup_tokens=one.warmup_tokens)
        results.append(RunResult(arrays, summary, status, reason, prefill_tokens))
    return results


def common_prefill(settings: list[RunSettings], tokens: int) -> int:
    """The prefill length that interleaved runs share; ValueError if these settings cannot take turns."""
    lengths = {one.prefill_tokens(tokens) for one in settings}
    unfit = [one for one in settings if one.evaluate != "steps" or one.repeats > 1 or one.timed_tokens is not None]
    if len(lengths) > 1 or unfit:
        raise ValueError(
            "interleaved runs are timed token by token to the end and have one prefill length; accepted: evaluate=steps"
            " without repeats and timed_tokens, and the same prefill"
        )
    return lengths.pop()


def _ended(work: Callable[[], None], place: Callable[[], str]) -> tuple[str, str | None]:
    """Do the work of a run; returns its status and, unless it is complete, why it ended."""
    try:
        work()
    except KeyboardInterrupt:
        return "partial", f"interrupted {place()}"
    except NonFiniteLogits as error:
        return "failed", str(error)
    except (torch.OutOfMemoryError, MemoryError) as error:
        told = next(iter(str(error).splitlines()), "")
        return "failed", f"out of memory {place()}: {told}".rstrip(": ")
    return "complete", None


def check_run(loaded: LoadedModel, tokens: int, settings: RunSettings) -> None:
    """Raise ValueError, as `run` would, if settings, model and a text of that many tokens do not fit together."""
    settings.prefill_tokens(tokens)
    _check_full_fits(loaded, settings, tokens)
    BACKENDS[settings.backend](loaded, settings).check()


@torch.inference_mode()
def _attempt(loaded, ids, settings, rows, progress, times: dict[str, float]) -> None:
    with closing(open_decoder(loaded, settings)) as decoder:
        prefill = settings.prefill_tokens(len(ids))
        _prefill(decoder, ids[:prefill], times)
        to_decode = len(ids) - 1 - prefill
        one_by_one = min(to_decode, settings.timed_tokens or to_decode) if settings.evaluate == "steps" else 0
        _decode_steps(decoder, ids, prefill, range(prefill, prefill + one_by_one), rows, settings, progress)
        bad_block = _decode_blocks(decoder, ids, prefill, prefill + one_by_one, rows, settings, progress)
    if bad_block:
        _decode_bad_block(loaded, ids, prefill, bad_block, rows, settings, progress)


def _prefill(decoder: Decoder, ids: torch.Tensor, times: dict[str, float]) -> None:
    logits, seconds = timed(decoder.prefill, ids, device=ids.device)
    _, pick_seconds = timed(lambda: logits.argmax(-1).item(), device=ids.device)
    times["prefill"], times["ttft"] = seconds, seconds + pick_seconds
    if not torch.isfinite(logits).all():
        raise NonFiniteLogits(f"the logits after the prefill of {len(ids)} tokens are not finite")


def _decode_steps(
    decoder: Decoder, ids, first: int, tokens: range, rows: TokenRows, settings, progress, *, keep_times: bool = True
) -> None:
    """Tokens one by one, each step timed by itself; scoring is left out of the time."""
    for t in tokens:
        token = ids[t : t + 1]
        if settings.sample_every > 1 and (t - first) % settings.sample_every:
            decoder.skip(token)
            rows.add(t + 1, float("nan"), float("nan"), decoder.steps()[-1])
        else:
            logits, seconds = timed(decoder.feed, token, last_only=True, device=ids.device)
            nll = token_nll(logits, ids[t + 1 : t + 2]).item()
            if not np.isfinite(nll):
                raise NonFiniteLogits(f"the logits that predict token {t + 1} are not finite")
            top1 = int(logits.argmax(-1))
            rows.add(t + 1, nll, seconds if keep_times else float("nan"), decoder.steps()[-1], top1)
        progress(t + 1 - first)


def _decode_blocks(decoder: Decoder, ids, first: int, start: int, rows: TokenRows, settings, progress) -> range | None:
    """From `start` on: all tokens up to where the policy must decide in one forward; no times are taken.

    Ends at the first block with a non-finite prediction and returns that block's tokens, none of which got a row.
    """
    last, t = len(ids) - 1, start
    for size in decoder.chunk_sizes(last - start):
        nll = decoder.score(ids[t : t + size], ids[t + 1 : t + size + 1]).tolist()
        scored = [value for i, value in enumerate(nll, t - first) if i % settings.sample_every == 0]
        if not np.isfinite(scored).all():
            return range(t, t + size)
        top1 = [UNKNOWN] * len(nll) if decoder.top1 is None else decoder.top1.tolist()
        for i, (value, step, token) in enumerate(zip(nll, decoder.steps(), top1, strict=True)):
            rows.add(t + i + 1, value, float("nan"), step, token)
        t += len(nll)
        progress(t - first)
    return None


def _decode_bad_block(loaded, ids, first: int, block: range, rows: TokenRows, settings, progress) -> None:
    """Decode a block again one by one up to its bad token: in one forward a NaN spoils the tokens before it as well.

    (A masked token has weight 0, and 0 times NaN is NaN.)
    """
    with closing(open_decoder(loaded, settings)) as decoder:
        decoder.prefill(ids[: block.start])
        _decode_steps(decoder, ids, first, block, rows, settings, progress, keep_times=False)
    raise NonFiniteLogits(
        f"the logits that predict tokens {block.start + 1} to {block.stop} in one forward are not finite,"
        " although one by one they are"
    )


def _place(attempts: list[tuple[TokenRows, dict]], prefill_tokens: int) -> str:
    """Where the runs stopped, in words."""
    begun = [i for i, (rows, times) in enumerate(attempts) if rows.rows or times] or [0]
    rows = attempts[begun[-1]][0].rows
    repeat = f" of repeat {begun[-1] + 1}" if len(attempts) > 1 else ""
    return f"after token {rows[-1][0] if rows else prefill_tokens}{repeat}"


def _median(values: list[float]) -> float | None:
    return float(np.median(values)) if values else None


def _shifted(progress: Progress | None, offset: int, total: int) -> Callable[[int], None]:
    return lambda done: progress(offset + done, total) if progress else None


def _check_full_fits(loaded: LoadedModel, settings: RunSettings, tokens: int) -> None:
    trained = loaded.trained_positions
    if (
        settings.method == "full"
        and trained is not None
        and tokens > trained
        and not settings.allow_untrained_positions
    ):
        raise ValueError(
            f"the full cache of {tokens} tokens goes past the {trained} positions that {loaded.name} was trained on;"
            f" accepted: --tokens of at most {trained}, or --allow-untrained-positions"
        )
