"""The summary of a run: quality, speed, memory and cache behaviour, computed from its per-token arrays."""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import psutil
import torch

from sinkstream.measure.memory import PeakMemory
from sinkstream.measure.timing import WARMUP_TOKENS, distribution, latency_summary

NLL_ROWS = 128  # tokens whose logits are turned into float32 at once


def token_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """NLL of each target, (tokens,) float32, in nats, from logits (tokens, vocab); no device synchronisation."""
    if len(logits) > NLL_ROWS:
        slices = zip(logits.split(NLL_ROWS), targets.split(NLL_ROWS), strict=True)
        return torch.cat([token_nll(*one) for one in slices])
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")


def finite_or_none(value: float | None) -> float | None:
    """The value as a plain float, or None if it is missing, NaN or infinite (JSON has no such numbers)."""
    return float(value) if value is not None and np.isfinite(value) else None


def summarise(
    arrays: Mapping[str, np.ndarray],
    prefill_seconds: float | None,
    ttft_seconds: float | None,
    total_seconds: float | None,
    peak_memory: PeakMemory | None,
    *,
    warmup_tokens: int = WARMUP_TOKENS,
) -> dict[str, Any]:
    """The `summary` part of a record, of a complete run or of an interrupted one; missing figures are None.

    Parameters
    ----------
    arrays : mapping
        Per-token arrays of a record (see `records.schema.ARRAYS`), each (tokens,), may be empty.
    prefill_seconds, ttft_seconds, total_seconds : float or None
        Time of the prefill, from the start to the first token, and of the whole run.
    peak_memory : PeakMemory or None
        A measurement that has ended.
    warmup_tokens : int, default=64
        Tokens left out of the steady latency.

    `decode_sec` is the sum of the timed tokens. `process_sec` is the age of the process, so that the last record of a
    command tells how long the command took.
    """
    nll = np.asarray(arrays["nll"], dtype=np.float64)
    seconds = np.asarray(arrays["seconds"], dtype=np.float64)
    scored = nll[np.isfinite(nll)]
    timed_seconds = seconds[np.isfinite(seconds)]
    mean_nll = finite_or_none(scored.mean()) if scored.size else None
    drops = np.asarray(arrays["drop_size"])
    with np.errstate(over="ignore"):
        ppl = None if mean_nll is None else finite_or_none(np.exp(mean_nll))
    return {
        "decode_tokens": int(nll.size),
        "scored_tokens": int(scored.size),
        "timed_tokens": int(timed_seconds.size),
        "mean_nll": mean_nll,
        "ppl": ppl,
        **latency_summary(seconds, warmup_tokens),
        "ttft_ms": None if ttft_seconds is None else finite_or_none(1e3 * ttft_seconds),
        "prefill_sec": finite_or_none(prefill_seconds),
        "decode_sec": finite_or_none(timed_seconds.sum()) if timed_seconds.size else None,
        "total_sec": finite_or_none(total_seconds),
        "process_sec": round(time.time() - psutil.Process().create_time(), 3),
        "peak_memory_mb": finite_or_none(peak_memory.peak_mb) if peak_memory else None,
        "peak_memory_kind": peak_memory.kind if peak_memory else None,
        "kv_length": kv_length_range(np.asarray(arrays["kv_length"])),
        "events": int(np.count_nonzero(arrays["event"])),
        "drop_size": distribution(drops[drops > 0], with_max=True),
    }


def kv_length_range(lengths: np.ndarray) -> dict[str, float | int | None]:
    """Shortest, mean and longest of the visible lengths (tokens,) above 0, which were measured; None without any."""
    lengths = lengths[lengths > 0]
    if lengths.size == 0:
        return {"min": None, "mean": None, "max": None}
    return {"min": int(lengths.min()), "mean": float(lengths.mean()), "max": int(lengths.max())}
