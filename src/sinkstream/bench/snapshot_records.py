"""Records of how long a stream takes to its file and back, beside the disk itself, and their table."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sinkstream.bench.two_shapes import newest_on_gpu, shape_name
from sinkstream.records.base import StatusRecord
from sinkstream.records.cards import each_card
from sinkstream.records.origin import machine
from sinkstream.records.schema import REQUIRED
from sinkstream.show.table import NONE_YET, Table

#: What takes turns; the names are explained in `protocol`.
WAYS = ("snapshot", "disk_write", "restore", "disk_read")

#: Required keys, as in `schema.REQUIRED`. Seconds: the median, and every repeat.
SNAPSHOT_REQUIRED: dict[str, Any] = {
    **dict.fromkeys(("schema", "id", "status", "status_reason", "created", "session", "command", "arguments")),
    "environment": REQUIRED["environment"],
    "model": REQUIRED["model"],
    "policy": dict.fromkeys(("name", "label", "options")),
    "protocol": dict.fromkeys(("dtype", "device", "tf32", "seed", "cap", "backend", "repeats", *WAYS)),
    "bytes": None,
    "seconds": dict.fromkeys(WAYS),
    "repeats_seconds": dict.fromkeys(WAYS),
}


@dataclass(frozen=True)
class SnapshotRecord(StatusRecord):
    """One stream to its file and back: the fields of its JSON file (see `SNAPSHOT_REQUIRED`).

    Attributes
    ----------
    bytes : int
        Of the file.
    seconds : dict
        Median of every name in `WAYS`.
    repeats_seconds : dict
        All figures that the medians are of, in order.
    """

    SCHEMA, KIND, REQUIRED, STATUSES = "sinkstream.snapshot/1", "snapshot", SNAPSHOT_REQUIRED, ("complete",)

    session: str
    policy: dict[str, Any]
    bytes: int
    seconds: dict[str, float]
    repeats_seconds: dict[str, list[float]]


def snapshot_table(records: Sequence[SnapshotRecord], title: str | None = None) -> Table:
    """One row a record."""
    header = ["shape", "policy", "file (MB)", "snapshot (s)", "disk writes (s)", "restore (s)", "disk reads (s)"]
    rows = [
        [shape_name(r), r.policy["label"], f"{r.bytes / 1e6:,.1f}", *(f"{r.seconds[way]:.3f}" for way in WAYS)]
        for r in records
    ]
    return Table(header, rows, title, ["disk: the same bytes from and to memory, fsync included; medians, in turns"], 2)


def render_snapshots(results: Path) -> dict[str, str]:
    """Markdown of the table, by its name in the documents. Raises ValueError if such a record is broken."""
    found = newest_on_gpu(SnapshotRecord.below(results))
    said = each_card(found, lambda some: f"{machine(some)}\n\n{snapshot_table(some).markdown()}")
    return {"bench-snapshot": said or NONE_YET}
