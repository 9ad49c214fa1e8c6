"""Speed records: one JSON file for each configuration that was timed, with the same origin as run records.

A speed record says how fast one rung decodes one shape; it has no text to be right or wrong about. A record that is
not complete (interrupted) may be replaced by its own continuation, a complete one never.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sinkstream.bench.decoding import Samples, TimedRun
from sinkstream.bench.settings import DEFINITIONS, Floor
from sinkstream.measure.bandwidth import Bandwidth
from sinkstream.measure.metrics import finite_or_none
from sinkstream.measure.timing import distribution
from sinkstream.records.base import StatusRecord
from sinkstream.records.schema import REQUIRED

_LATENCY = dict.fromkeys(("tokens", "mean", "p50", "p90", "p99", "max"))

#: Required keys, as in `schema.REQUIRED`. Milliseconds, GB of 1e9 bytes, MB of 2**20 bytes.
BENCH_REQUIRED: dict[str, Any] = {
    **dict.fromkeys(("schema", "id", "status", "status_reason", "created", "session", "command", "arguments")),
    "environment": REQUIRED["environment"],
    "model": REQUIRED["model"],
    "rung": dict.fromkeys(("name", "summary", "attention")),
    "policy": dict.fromkeys(("name", "label", "options")),
    "protocol": dict.fromkeys(
        (
            *("dtype", "device", "tf32", "seed", "cap", "streams", "prefill_tokens", "warmup_tokens", "tokens"),
            *("chunk_tokens", "in_turn", "turn", "feed", "text", "text_sha256", "tpot", "latency", "floor"),
        )
    ),
    "ceiling": dict.fromkeys(("kind", "copy_gbs", "read_gbs", "copy_bytes")),
    "floor": dict.fromkeys(("weight_bytes", "kv_token_bytes", "visible_mean", "kv_bytes", "bytes", "ms")),
    "setup": dict.fromkeys(("load_sec", "prepare_sec", "capture_sec", "prefill_sec", "warmup_sec")),
    "steady": dict.fromkeys(("tokens", "wall_sec", "tpot_ms", "tokens_per_sec", "gbs", "over_floor", "share_of_floor")),
    "latency_ms": {"all": _LATENCY, "event": _LATENCY, "other": _LATENCY},
    "chunks": dict.fromkeys(("tokens", "seconds")),
    "blocks": None,
    "memory": dict.fromkeys(("peak_mb", "kind")),
    "profile": None,
}


@dataclass(frozen=True)
class BenchRecord(StatusRecord):
    """One timed configuration: the fields of its JSON file (see `BENCH_REQUIRED`)."""

    SCHEMA, KIND, REQUIRED, STATUSES = "sinkstream.bench/1", "speed", BENCH_REQUIRED, ("complete", "partial")

    session: str
    rung: dict[str, Any]
    policy: dict[str, Any]
    ceiling: dict[str, Any]
    floor: dict[str, Any]
    setup: dict[str, Any]
    steady: dict[str, Any]
    latency_ms: dict[str, Any]
    chunks: dict[str, list]
    blocks: list[dict[str, Any]]
    memory: dict[str, Any]
    profile: list[dict[str, Any]] | None
    recall: dict[str, Any] | None = None  # what recall did in the steady tokens; None without recall

    @property
    def hardware(self) -> str:
        """The GPU, or "CPU" and which."""
        gpu = self.environment["gpu"]["name"]
        return gpu if self.protocol["device"] == "cuda" else f"CPU ({self.environment['cpu']['model']})"

    @classmethod
    def check_own(cls, content: Mapping[str, Any], where: str) -> None:
        if len(content["chunks"]["tokens"]) != len(content["chunks"]["seconds"]):
            raise ValueError(f"{where}: field 'chunks' has tokens and seconds of different lengths")


def run_figures(run: TimedRun, kv_token_bytes: int, ceiling: Bandwidth) -> dict[str, Any]:
    """The parts of a record that a run states or that are computed from it."""
    samples = run.samples
    floor = Floor(run.weight_bytes, kv_token_bytes, sum(samples.visible) / samples.tokens, run.config.streams)
    return {
        "ceiling": ceiling.record(),
        **speed(samples, floor, ceiling),
        "latency_ms": _latencies(samples),
        "chunks": {"tokens": samples.chunk_tokens, "seconds": [round(s, 7) for s in samples.chunk_seconds]},
        "blocks": _blocks(samples),
        "profile": run.profile,
        "recall": run.recall,
    }


def turn_protocol(run: TimedRun) -> dict[str, Any]:
    """What a run adds to the `protocol` part of its record."""
    protocol = run.protocol
    return {
        "cap": run.config.run.cap,
        "streams": run.config.streams,
        "warmup_tokens": protocol.warmup,
        "tokens": protocol.tokens,
        "chunk_tokens": protocol.chunk_tokens,
        "in_turn": run.in_turn,
        "turn": run.turn,
        "feed": "text" if protocol.teacher_forced else "greedy",
        **DEFINITIONS,
    }


def speed(samples: Samples, floor: Floor, ceiling: Bandwidth) -> dict[str, dict[str, Any]]:
    """The parts `floor` and `steady`: what a step must read, how long that takes, and how long it took."""
    tpot, floor_ms = 1e3 * samples.seconds / samples.tokens, ceiling.milliseconds(floor.bytes)
    return {
        "floor": floor.record() | {"ms": floor_ms},
        "steady": {
            "tokens": samples.tokens,
            "wall_sec": samples.seconds,
            "tpot_ms": tpot,
            "tokens_per_sec": 1e3 * floor.streams / tpot,
            "gbs": floor.bytes / tpot / 1e6,
            "over_floor": tpot / floor_ms,
            "share_of_floor": floor_ms / tpot,
        },
    }


def _latencies(samples: Samples) -> dict[str, dict[str, Any]]:
    milliseconds = 1e3 * np.concatenate(samples.latency).astype(np.float64)
    event = np.asarray(samples.event, dtype=bool)
    return {
        name: {"tokens": int(np.isfinite(some).sum()), **distribution(some, with_max=True)}
        for name, some in (
            ("all", milliseconds),
            ("event", milliseconds[event]),
            ("other", milliseconds[~event]),
        )
    }


def _blocks(samples: Samples) -> list[dict[str, Any]]:
    """One entry for each block of tokens after which the memory was noted."""
    ends = np.cumsum(samples.chunk_tokens)
    seconds = np.concatenate([[0.0], np.cumsum(samples.chunk_seconds)])
    nll = np.concatenate(samples.nll) if samples.nll else None
    starts = [0, *(tokens for tokens, _ in samples.memory)]
    blocks = []
    for (first, last), (_, memory) in zip(itertools.pairwise(starts), samples.memory):
        before, after = (int(np.searchsorted(ends, t, side="right")) for t in (first, last))
        spent = seconds[after] - seconds[before]
        block_nll = None if nll is None else nll[first:last]
        blocks.append(
            {
                "first_token": first,
                "tokens": last - first,
                "tpot_ms": 1e3 * spent / (last - first),
                "memory_mb": memory,
                "mean_nll": None if block_nll is None else finite_or_none(block_nll.mean()),
                "not_finite": None if block_nll is None else int((~np.isfinite(block_nll)).sum()),
            }
        )
    return blocks
