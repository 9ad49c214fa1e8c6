"""The points of a matrix as Ray tasks, on this machine or on a cluster: the same records."""

import os
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from sinkstream.evaluation.settings import BASELINES
from sinkstream.matrix.file import Matrix
from sinkstream.matrix.measure import DeviceLost, Workbench
from sinkstream.matrix.point import Point
from sinkstream.matrix.run import Measure
from sinkstream.ray_cluster import check_address, connect, ray_package
from sinkstream.records.files import WriteError

RETRIES = 3  # of a point whose worker died or lost its device; what else a point raises is its record
REPLY_SEC = 1.0  # that a worker which has lost its device lives on, so that its reply arrives
_benches: dict[tuple[str, str], Workbench] = {}  # of a worker: the model of its latest point stays loaded
_lost = threading.Event()  # of a worker: its device refuses all work


def on_ray(
    matrix: Matrix, out: Path, arguments: dict[str, Any], command: list[str], address: str, gpus: float
) -> Measure:
    """Measures as Ray tasks. Baselines are measured first, so that the others find them.

    Parameters
    ----------
    out : Path
        Folder of the records; runs go to its ``runs/``, which workers on other machines see on a shared file system
        only.
    address : str
        Of a cluster, as for ``ray.init``; empty: a Ray of this machine's own.
    gpus : float
        GPUs of a point on a GPU; below 1 several points share one.

    Raises ValueError: Ray is not installed, the address does not answer, or timed points would share a GPU.
    """
    ray = ray_package()
    check_address(address)

    def measure(points: Sequence[Point]) -> Iterator[tuple[Point, dict[str, Any], float]]:
        on_gpu = any(point.device.startswith("cuda") for point in points)
        if on_gpu and not gpus.is_integer() and any(point.speed for point in points):
            raise ValueError(
                f"--gpus-per-point {gpus}: points that share a GPU cannot be timed; accepted: a whole number, or points"
                ' with speed_backend = "none"'
            )
        connect(ray, address)
        bench = Workbench(out, matrix.name, arguments, command, Console(quiet=True))
        try:
            task = ray.remote(_measure).options(max_retries=RETRIES, num_cpus=1, num_gpus=gpus if on_gpu else 0)
            losses: Counter[str] = Counter()

            def begin(point: Point) -> Any:
                return task.remote(point, matrix.baselines(point), out.resolve(), matrix.name, arguments, command)

            for wave in _waves(points):
                open_tasks = {begin(point): point for point in wave}
                while open_tasks:
                    (done,), _ = ray.wait(list(open_tasks))
                    point = open_tasks.pop(done)
                    try:
                        content, seconds, lost = ray.get(done)
                    except ray.exceptions.RayError as error:
                        yield point, bench.failed(point, matrix.baselines(point), _reason(error)), 0.0
                        continue
                    losses[point.id] += lost
                    if lost and losses[point.id] <= RETRIES:
                        open_tasks[begin(point)] = point
                    else:
                        yield point, content, seconds
        finally:
            ray.shutdown()

    return measure


def _measure(
    point: Point,
    baselines: dict[str, Point | None],
    out: Path,
    experiment: str,
    arguments: dict[str, Any],
    command: list[str],
) -> tuple[dict[str, Any], float, bool]:
    """What a worker does: the content of a point's record, its seconds, and whether the device was lost.

    A worker that has lost its device ends, so that Ray gives its GPU to a new one.
    """
    if _lost.is_set():
        os._exit(1)  # Ray gives the point to another worker
    bench = _benches.setdefault(
        (str(out), experiment), Workbench(out, experiment, arguments, command, Console(quiet=True))
    )
    start = time.perf_counter()
    try:
        content = bench.measure(point, baselines)
    except DeviceLost as error:
        content = error.content
        _lost.set()
        threading.Timer(REPLY_SEC, os._exit, (1,)).start()
    return content, time.perf_counter() - start, _lost.is_set()


def _reason(error: Exception) -> str:
    """Why a task ended without a record, for the record of the failed point. Raises WriteError: no point's fault."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, WriteError):
        raise cause from error
    first_line = next(iter(str(cause or error).strip().splitlines()), "")
    died = "" if cause else f"the worker died {RETRIES + 1} times: "
    return f"{died}{type(cause or error).__name__}: {first_line}"


def _waves(points: Sequence[Point]) -> list[list[Point]]:
    """Baselines, then all that is compared with them."""
    first = [p for p in points if p.settings.method in (*BASELINES, "strict")]
    return [wave for wave in (first, [p for p in points if p not in first]) if wave]
