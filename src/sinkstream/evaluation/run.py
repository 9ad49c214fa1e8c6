"""The decode loop of the project: one text, one session, per-token arrays out."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from sinkstream.evaluation.sessions import BACKENDS, Session, token_nll
from sinkstream.evaluation.settings import RunSettings
from sinkstream.measure.memory import PeakMemory
from sinkstream.measure.metrics import summarise
from sinkstream.measure.timing import timed
from sinkstream.models import LoadedModel
from sinkstream.policies import Step

Progress = Callable[[int, int], None]


@dataclass
class TokenRows:
    """Per-token figures of one run, one row a decode step.

    The row of step t holds the NLL of token t + 1 (its index in the text), the seconds of the step that predicted it,
    and what the cache did at that step.
    """

    index: list[int] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    def add(self, index: int, nll: float, seconds: float, step: Step) -> None:
        """Append one row."""
        self.index.append(index)
        self.nll.append(nll)
        self.seconds.append(seconds)
        self.steps.append(step)

    def arrays(self) -> dict[str, np.ndarray]:
        """The rows as the arrays of a run record."""
        return {
            "index": np.array(self.index, dtype=np.int32),
            "nll": np.array(self.nll, dtype=np.float32),
            "seconds": np.array(self.seconds, dtype=np.float32),
            "kv_length": np.array([s.visible for s in self.steps], dtype=np.int32),
            "event": np.array([s.event for s in self.steps], dtype=bool),
            "drop_size": np.array([s.drop for s in self.steps], dtype=np.int32),
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

    Ctrl-C and non-finite logits end the run but keep what was measured: see `RunResult.status`.

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
    rows, times, status, reason = TokenRows(), {}, "complete", None
    all_seconds: list[list[float]] = []
    total = (len(ids) - prefill_tokens - 1) * settings.repeats
    with PeakMemory(device) as memory:
        try:
            for repeat in range(settings.repeats):
                attempt = TokenRows()
                rows = attempt if repeat == 0 else rows
                report = _shifted(progress, repeat * total // settings.repeats, total)
                seconds = timed(_attempt, loaded, ids, settings, attempt, report, times, device=device)[1]
                times.setdefault("total", seconds)
                all_seconds.append(attempt.seconds)
        except KeyboardInterrupt:
            status, reason = "partial", f"interrupted after token {rows.index[-1] if rows.index else prefill_tokens}"
        except NonFiniteLogits as error:
            status, reason = "failed", str(error)
    if len(all_seconds) > 1:
        rows.seconds = np.median(np.array(all_seconds), axis=0).tolist()
    arrays = rows.arrays()
    summary = summarise(
        arrays,
        times.get("prefill"),
        times.get("ttft"),
        times.get("total"),
        memory,
        warmup_tokens=settings.warmup_tokens,
    )
    return RunResult(arrays, summary, status, reason, prefill_tokens)


@torch.inference_mode()
def _attempt(loaded, ids, settings, rows, progress, times: dict[str, float]) -> None:
    session = BACKENDS[settings.backend](loaded, settings)
    try:
        prefill = settings.prefill_tokens(len(ids))
        logits, seconds = timed(session.prefill, ids[:prefill], device=ids.device)
        _, pick_seconds = timed(lambda: logits.argmax(-1).item(), device=ids.device)
        times.setdefault("prefill", seconds)
        times.setdefault("ttft", seconds + pick_seconds)
        if not torch.isfinite(logits).all():
            raise NonFiniteLogits(f"the logits after the prefill of {prefill} tokens are not finite")
        to_decode = len(ids) - 1 - prefill
        one_by_one = min(to_decode, settings.timed_tokens or to_decode) if settings.evaluate == "steps" else 0
        _decode_steps(session, ids, prefill, prefill + one_by_one, rows, settings, progress)
        _decode_blocks(session, ids, prefill, prefill + one_by_one, rows, settings, progress)
    finally:
        session.close()


def _decode_steps(session: Session, ids, first: int, last: int, rows: TokenRows, settings, progress) -> None:
    """Tokens `first` to `last` one by one, each step timed by itself; scoring is left out of the time."""
    for t in range(first, last):
        token = ids[t : t + 1]
        if settings.sample_every > 1 and (t - first) % settings.sample_every:
            session.skip(token)
            rows.add(t + 1, float("nan"), float("nan"), session.steps()[-1])
        else:
            logits, seconds = timed(session.feed, token, last_only=True, device=ids.device)
            nll = token_nll(logits, ids[t + 1 : t + 2]).item()
            if not np.isfinite(nll):
                raise NonFiniteLogits(f"the logits that predict token {t + 1} are not finite")
            rows.add(t + 1, nll, seconds, session.steps()[-1])
        progress(t + 1 - first)


def _decode_blocks(session: Session, ids, first: int, start: int, rows: TokenRows, settings, progress) -> None:
    """From `start` on: all tokens up to where the policy must decide in one forward; no times are taken."""
    last, t = len(ids) - 1, start
    for size in session.chunk_sizes(last - start):
        nll = session.score(ids[t : t + size], ids[t + 1 : t + size + 1]).tolist()
        for i, (value, step) in enumerate(zip(nll, session.steps(), strict=True)):
            if not np.isfinite(value) and settings.sample_every == 1:
                raise NonFiniteLogits(f"the logits that predict token {t + i + 1} are not finite")
            rows.add(t + i + 1, value, float("nan"), step)
        t += size
        progress(t - first)


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
