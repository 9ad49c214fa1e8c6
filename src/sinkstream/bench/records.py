"""Speed records on disk: one JSON file for each configuration that was timed, with the same origin as run records.

A speed record says how fast one rung decodes one shape; it has no text to be right or wrong about. A record that is
not complete (interrupted) may be replaced by its own continuation, a complete one never.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sinkstream.records.json_files import check_schema, load_family, read_json, write_json
from sinkstream.records.records import plain_json, scrub_paths
from sinkstream.records.schema import REQUIRED, check_environment, check_keys

SCHEMA = "sinkstream.bench/1"
STATUSES = ("complete", "partial")

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
class BenchRecord:
    """One timed configuration: the fields of its JSON file (see `BENCH_REQUIRED`)."""

    path: Path
    id: str
    status: str
    status_reason: str | None
    created: str
    session: str
    command: list[str]
    arguments: dict[str, Any]
    environment: dict[str, Any]
    model: dict[str, Any]
    rung: dict[str, Any]
    policy: dict[str, Any]
    protocol: dict[str, Any]
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


def check_bench_record(content: Any, where: str) -> None:
    """Raise ValueError, naming `where` and the field, unless `content` is a speed record of this schema."""
    check_schema(content, SCHEMA, "speed", where)
    check_keys(content, BENCH_REQUIRED, where)
    if content["status"] not in STATUSES:
        raise ValueError(f"{where}: field 'status' is {content['status']!r}; accepted: {', '.join(STATUSES)}")
    if (content["status"] == "complete") != (content["status_reason"] is None):
        raise ValueError(f"{where}: field 'status_reason' must be null for complete records and say why for all others")
    if len(content["chunks"]["tokens"]) != len(content["chunks"]["seconds"]):
        raise ValueError(f"{where}: field 'chunks' has tokens and seconds of different lengths")
    check_environment(content["environment"], str(content["protocol"]["device"]), where)


def write_bench_record(record: Mapping[str, Any], directory: Path | str) -> Path:
    """Write a speed record as ``<id>.json``; `schema` is filled in, paths are cut, NaN becomes null.

    Raises
    ------
    ValueError
        A required field is missing or malformed, or a complete record of that id is there already.
    WriteError
        The file could not be written.
    """
    content = {"schema": SCHEMA, **scrub_paths(plain_json(record))}
    where = f"speed record {record.get('id')!r}"
    check_bench_record(content, where)
    path = Path(directory) / f"{content['id']}.json"
    if path.exists() and load_bench_record(path).status == "complete":
        raise ValueError(f"{where}: {path} exists already; complete records are never overwritten")
    return write_json(path, content)


def load_bench_record(path: Path | str) -> BenchRecord:
    """Read and check one speed record. Raises ValueError naming the file and the field."""
    path = Path(path)
    content = read_json(path)
    check_bench_record(content, str(path))
    fields = {field: content[field] for field in BenchRecord.__dataclass_fields__ if field != "path"}
    return BenchRecord(path=path, **fields)


def load_bench_records(folder: Path | str) -> list[BenchRecord]:
    """All speed records below a folder, by creation time and id; other JSON files are left alone.

    Raises
    ------
    ValueError
        A file calls itself a speed record and is of another version, or lacks a field.
    """
    return load_family(folder, SCHEMA, load_bench_record)
