"""The one timing function of the project, and the latency figures derived from per-token seconds."""

import itertools
import time
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch

Result = TypeVar("Result")

WARMUP_TOKENS = 64
PERCENTILES = (50, 90, 99)


def synchronise(device: torch.device | str) -> None:
    """Wait until all work queued on `device` has finished; a no-op on the CPU, which never queues."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(fn: Callable[..., Result], *args: Any, device: torch.device | str, **kwargs: Any) -> tuple[Result, float]:
    """Call `fn(*args, **kwargs)` between two synchronised clock reads; returns its result and wall-clock seconds.

    `device` is the one that `fn` works on. It is synchronised before both clock reads, so that work queued earlier is
    not charged to `fn` and work queued by `fn` is.
    """
    synchronise(device)
    start = time.perf_counter()
    result = fn(*args, **kwargs)
    synchronise(device)
    return result, time.perf_counter() - start


class TokenClock:
    """Times consecutive pieces of work without waiting for the device between them.

    On a GPU every mark is a CUDA event in the current stream, so that a piece lasts from the end of the piece before it
    to its own end, idle time of the GPU included; on a CPU it is a clock reading.
    """

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)
        self._marks: list[Any] = []
        self._used = 0

    def start(self) -> None:
        """Forget the marks so far; the first piece begins here."""
        self._used = 0
        self.tick()

    def tick(self) -> None:
        """A piece ends here and the next one begins."""
        if self.device.type != "cuda":
            self._marks[self._used :] = [time.perf_counter()]
        else:
            if self._used == len(self._marks):
                self._marks.append(torch.cuda.Event(enable_timing=True))
            self._marks[self._used].record()
        self._used += 1

    def seconds(self) -> np.ndarray:
        """Seconds of every piece since `start`, (pieces,) float64; waits for the device."""
        synchronise(self.device)
        marks = self._marks[: self._used]
        if self.device.type != "cuda":
            return np.diff(marks)
        return np.array([1e-3 * a.elapsed_time(b) for a, b in itertools.pairwise(marks)])


def distribution(values: np.ndarray, *, with_max: bool = False) -> dict[str, float | None]:
    """Mean, P50, P90 and P99 (and the maximum) of the finite values; every figure is None when there is none.

    Percentiles are numpy's, with linear interpolation.
    """
    values = np.asarray(values, dtype=np.float64).ravel()
    values = values[np.isfinite(values)]
    names = ["mean", *(f"p{p}" for p in PERCENTILES), *(["max"] if with_max else [])]
    if values.size == 0:
        return dict.fromkeys(names)
    figures = [values.mean(), *np.percentile(values, PERCENTILES), *([values.max()] if with_max else [])]
    return {name: float(figure) for name, figure in zip(names, figures)}


def latency_summary(seconds: np.ndarray, warmup_tokens: int = WARMUP_TOKENS) -> dict[str, Any]:
    """`tpot_ms`, milliseconds per timed token or None, and `steady_tpot_ms`, the distribution after the warm-up.

    `seconds` (tokens,) are the decode seconds of each token, in order; NaN: not timed. The first `warmup_tokens`, timed
    or not, are left out of the steady part. Raises ValueError if `warmup_tokens` is negative.
    """
    if warmup_tokens < 0:
        raise ValueError(f"warmup_tokens = {warmup_tokens}: must be 0 or more")
    milliseconds = 1e3 * np.asarray(seconds, dtype=np.float64).ravel()
    return {
        "tpot_ms": distribution(milliseconds)["mean"],
        "steady_tpot_ms": distribution(milliseconds[warmup_tokens:]),
    }
