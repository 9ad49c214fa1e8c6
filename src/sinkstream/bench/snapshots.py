"""``bench --snapshot``: how long a full stream takes to its file and back, beside the disk itself, in turns."""

import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sinkstream.bench.policy_session import PolicySession
from sinkstream.bench.snapshot_records import WAYS, SnapshotRecord
from sinkstream.data import TokenStream
from sinkstream.evaluation.runner import Report, Request
from sinkstream.evaluation.settings import RunSettings
from sinkstream.measure.timing import timed
from sinkstream.models import LoadedModel
from sinkstream.records.files import write_atomically

REPEATS = 5

DEFINITIONS = {
    "snapshot": "Engine.snapshot of a full stream to a file in --out",
    "disk_write": "the same bytes from memory to a file beside it: write, fsync, rename",
    "restore": "Engine.restore of the file, which the page cache holds",
    "disk_read": "the file into memory, out of the page cache",
}


@dataclass
class SnapshotSession(PolicySession[SnapshotRecord]):
    """Times snapshots of one model, under one policy after the other."""

    record_class = SnapshotRecord
    work = prefix = "snapshot"

    loaded: LoadedModel
    text: TokenStream  # what the stream is filled with, repeated if need be
    backend: str  # the engine's
    request: Request
    name: str  # the same in all records of one command
    repeats: int = REPEATS

    def check(self, runs: Sequence[RunSettings]) -> None:
        """Raise ValueError, before anything is timed, if the engine does not serve a policy."""
        self._check_engine(runs, self.backend)

    def _measure(self, run: RunSettings, report: Report) -> list[Callable[[], dict[str, Any]]]:
        device = self.loaded.model.device
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        with self._open_engine(run, self.backend) as engine:
            engine.prefill(self._ids(self._policy(run).peak))
            with tempfile.TemporaryDirectory(dir=self.request.out, prefix=".snapshot-") as folder:
                file, plain = Path(folder) / "stream.safetensors", Path(folder) / "plain"
                engine.snapshot(file)  # the first one computes the model's hash
                data = file.read_bytes()
                ways: dict[str, Callable[[], Any]] = {
                    "snapshot": lambda: engine.snapshot(file),
                    "disk_write": lambda: write_atomically(plain, data),
                    "restore": lambda: engine.restore(file),
                    "disk_read": file.read_bytes,
                }
                for done in range(self.repeats):
                    report(done, self.repeats)
                    for way in WAYS:
                        os.sync()  # nothing of another way is still on its way to the disk
                        seconds[way].append(timed(ways[way], device=device)[1])
            report(self.repeats, self.repeats)
        return [partial(self._record, run, len(data), seconds)]

    def _own_identity(self, run: RunSettings) -> dict[str, Any]:
        return {"protocol": self._protocol(run)}

    def _protocol(self, run: RunSettings) -> dict[str, Any]:
        return {**super()._protocol(run), "backend": self.backend, "repeats": self.repeats, **DEFINITIONS}

    def _record(self, run: RunSettings, size: int, seconds: dict[str, list[float]]) -> dict[str, Any]:
        return self._record_of(
            run,
            protocol=self._protocol(run),
            bytes=size,
            seconds={way: statistics.median(found) for way, found in seconds.items()},
            repeats_seconds=seconds,
        )
