"""What every rival's worker shares. It runs in the rival's environment and imports nothing of sinkstream.

A worker is given a job (JSON on its command line's file) and prints one JSON object as the last line of its output:
per-token arrays and figures, or the reason why the rival cannot run.
"""

import importlib.metadata
import json
import platform
import sys
import time
from collections.abc import Callable
from typing import Any


def main(measure: Callable[[dict[str, Any]], dict[str, Any]], *packages: str) -> None:
    """Do the job of ``sys.argv[1]`` with `measure`; `packages` are those whose versions can change the result."""
    with open(sys.argv[1], encoding="utf-8") as file:
        job = json.load(file)
    try:
        found = measure(job)
    except Exception as error:
        first_line = next(iter(str(error).splitlines()), "")
        found = {"error": f"{type(error).__name__}: {first_line}".rstrip(": ")}
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    print(json.dumps(without_nan({**found, "versions": versions})), flush=True)


def without_nan(value: Any) -> Any:
    """NaN as None: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [without_nan(entry) for entry in value]
    return None if value != value else value


class Tokens:
    """Per-token arrays of a run: what is known of each scored token."""

    def __init__(self) -> None:
        self.index: list[int] = []  # of the token that is predicted
        self.nll: list[float | None] = []  # nats; None or NaN: not scored
        self.seconds: list[float] = []  # NaN: not timed
        self.kv_length: list[int] = []  # entries that the step saw, its own token included

    def add(self, index: int, nll: float | None, seconds: float, kv_length: int) -> None:
        """Append one decode step."""
        self.index.append(index)
        self.nll.append(nll)
        self.seconds.append(seconds)
        self.kv_length.append(kv_length)

    def record(self) -> dict[str, list]:
        """The arrays by name."""
        return {"index": self.index, "nll": self.nll, "seconds": self.seconds, "kv_length": self.kv_length}


def process_peak() -> dict[str, Any]:
    """Most resident memory of this process so far, in MB of 2**20 bytes, and its kind.

    The largest set of getrusage is not it: on Linux that of the parent, which is larger, is handed on to a new program.
    """
    with open("/proc/self/status", encoding="ascii") as file:
        lines = dict(line.split(":", 1) for line in file)
    return {"peak_memory_mb": int(lines["VmHWM"].split()[0]) / 1024, "peak_memory_kind": "process_vm_hwm"}


def clock(synchronise: Callable[[], None], call: Callable[[], Any]) -> tuple[Any, float]:
    """Result and seconds of `call`, the device waited for on both sides."""
    synchronise()
    start = time.perf_counter()
    result = call()
    synchronise()
    return result, time.perf_counter() - start
