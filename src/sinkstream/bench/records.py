"""Speed records on disk: one JSON file for each configuration that was timed, with the same origin as run records.

A speed record says how fast one rung decodes one shape; it has no text to be right or wrong about. A record that is
not complete (interrupted) may be replaced by its own continuation, a complete one never.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sinkstream.records.base import BaseRecord
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
class BenchRecord(BaseRecord):
    """One timed configuration: the fields of its JSON file (see `BENCH_REQUIRED`)."""

    SCHEMA, KIND, REQUIRED, STATUSES = "sinkstream.bench/1", "speed", BENCH_REQUIRED, ("complete", "partial")

    status: str
    status_reason: str | None
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

    @property
    def hardware(self) -> str:
        """The GPU, or "CPU" and which."""
        gpu = self.environment["gpu"]["name"]
        return gpu if self.protocol["device"] == "cuda" else f"CPU ({self.environment['cpu']['model']})"

    @classmethod
    def check_own(cls, content: Mapping[str, Any], where: str) -> None:
        if len(content["chunks"]["tokens"]) != len(content["chunks"]["seconds"]):
            raise ValueError(f"{where}: field 'chunks' has tokens and seconds of different lengths")
