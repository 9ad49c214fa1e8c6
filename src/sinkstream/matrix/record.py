"""Point records: one JSON file for each point of a matrix, with quality and speed and which backend gave which."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sinkstream.measure.memory import OWN
from sinkstream.records.base import StatusRecord
from sinkstream.records.blocks import Blocks
from sinkstream.records.schema import REQUIRED, check_keys
from sinkstream.statistics import PairedDelta, delta_of_blocks

LATENCY = ("p50", "p90", "p99", "max")

#: Required keys, as in `schema.REQUIRED`; docs/matrix.md says what they hold.
POINT_REQUIRED: dict[str, Any] = {
    **dict.fromkeys(("schema", "id", "name", "experiment", "status", "status_reason", "created", "command")),
    **dict.fromkeys(("arguments", "configuration", "quality", "speed", "spike", "seconds")),
    "environment": REQUIRED["environment"],
    "model": REQUIRED["model"],
    "data": REQUIRED["data"],
    "policy": dict.fromkeys(("name", "label", "options")),
    "protocol": dict.fromkeys(("dtype", "device", "tf32", "seed", "cap", "cap_accounting", "prefill_tokens")),
    "baselines": dict.fromkeys(("recompute", "strict", "full")),
}
QUALITY_REQUIRED = dict.fromkeys(
    ("backend", "evaluate", "record", "created", "sample_every", "summary", "blocks", "sampled")
)
SPEED_REQUIRED: dict[str, Any] = {
    **dict.fromkeys(("backend", "feed", "text", "warmup_tokens", "steady_tokens", "tpot_ms", "tpot_ms_range")),
    **dict.fromkeys(("floor_ms", "over_floor", "peak_mb", "memory_kind", "repeats")),
    "latency_ms": dict.fromkeys(LATENCY),
}


@dataclass(frozen=True)
class PointRecord(StatusRecord):
    """One point of a matrix: the fields of its JSON file (see `POINT_REQUIRED`)."""

    SCHEMA, KIND, REQUIRED, STATUSES = "sinkstream.point/1", "point", POINT_REQUIRED, ("complete", "failed")

    name: str
    experiment: str
    data: dict[str, Any]
    policy: dict[str, Any]
    configuration: dict[str, Any]
    baselines: dict[str, str | None]
    quality: dict[str, Any] | None
    speed: dict[str, Any] | None
    spike: dict[str, Any] | None
    seconds: dict[str, float | None]

    @classmethod
    def check_own(cls, content: Mapping[str, Any], where: str) -> None:
        for part, required in (("quality", QUALITY_REQUIRED), ("speed", SPEED_REQUIRED)):
            found = content[part]
            if found is None and content["configuration"][part] is not None and content["status"] == "complete":
                raise ValueError(f"{where}: field {part!r} is null, although the point is complete")
            for key, nested in required.items() if found is not None else ():
                if key not in found or any(one not in found[key] for one in nested or ()):
                    raise ValueError(f"{where}: required field '{part}.{key}' is missing or incomplete")
        quality = content["quality"] or {}
        Blocks.check(quality.get("blocks"), where, "quality.blocks.")
        if quality.get("sampled") is not None:
            check_keys(quality["sampled"], {"every": None, "blocks": {}}, where, "quality.sampled.")
            Blocks.check(quality["sampled"]["blocks"], where, "quality.sampled.blocks.")
        if content["status"] == "complete" and None in (content["model"]["hash"], content["data"]["sha256"]):
            raise ValueError(f"{where}: a complete point must state model.hash and data.sha256")

    @property
    def label(self) -> str:
        """The policy with its options, for tables."""
        return str(self.policy["label"])

    @property
    def ppl(self) -> float | None:
        """Perplexity; None where quality was not measured."""
        return self.quality["summary"]["ppl"] if self.quality else None

    @property
    def tpot_ms(self) -> float | None:
        """Steady TPOT in milliseconds, median over the repeats; None where speed was not measured."""
        return self.speed["tpot_ms"] if self.speed else None

    @property
    def peak_mb(self) -> float | None:
        """Peak memory in MB of 2**20 bytes of what ran; None where the figure holds what other points had left."""
        return self.speed["peak_mb"] if self.speed and self.speed["memory_kind"] == OWN else None

    @cached_property
    def blocks(self) -> Blocks | None:
        """NLL in blocks of all scored tokens."""
        found = self.quality and self.quality["blocks"]
        return Blocks.read(found) if found else None

    def sampled(self, every: int) -> Blocks | None:
        """NLL in blocks of every `every`-th token, where the record holds them."""
        found = self.quality and self.quality["sampled"]
        return Blocks.read(found["blocks"]) if found and found["every"] == every else None


def load_points(folder: Path | str) -> list[PointRecord]:
    """All point records below a folder, oldest first. Raises ValueError as `BaseRecord.read`."""
    return PointRecord.below(folder)


def difference(point: PointRecord, baseline: PointRecord) -> str | None:
    """Why two points cannot be compared token by token, with both values; None if they can.

    Hashes say what is the same: a model may lie in files of two names.
    """
    facts = {
        "model": lambda p: (p.model["name"], p.model["hash"]),
        "text": lambda p: (p.data["name"], p.data["sha256"]),
    }
    for name, fact in facts.items():
        if fact(point)[1] != fact(baseline)[1]:
            return f"another {name}: {point.id} has {fact(point)[0]!r} and {baseline.id} has {fact(baseline)[0]!r}"
    return None


def point_delta(point: PointRecord, baseline: PointRecord) -> PairedDelta:
    """ΔPPL of a point against a baseline in percent, on the tokens that both have scored, with its 95 % interval.

    A sampled baseline (recompute with ``sample_every``) is paired with the same tokens of the point.

    Raises ValueError: another model or text, quality that was not measured, or tokens that do not pair.
    """
    different = difference(point, baseline)
    if different:
        raise ValueError(f"point {point.id} cannot be paired: {different}")
    every = [1 if p.quality is None else int(p.quality["sample_every"]) for p in (point, baseline)]
    own = point.blocks if every[0] >= every[1] else point.sampled(every[1])
    other = baseline.blocks if every[1] >= every[0] else baseline.sampled(every[0])
    if own is None or other is None:
        raise ValueError(f"point {point.id} cannot be paired with {baseline.id}: tokens or quality are absent")
    extents = [(one.tokens, one.first, one.last, one.counts.tolist()) for one in (own, other)]
    if extents[0] != extents[1]:
        raise ValueError(f"point {point.id} cannot be paired with {baseline.id}: other tokens are scored")
    scored = own.counts > 0
    return delta_of_blocks((own.sums - other.sums)[scored], own.counts[scored], own.tokens)
