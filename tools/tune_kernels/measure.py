"""Compile, check and time: one op over all layers of a model, and whole steps."""

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

from sinkstream.kernels import LinearConfig
from sinkstream.kernels.config import MultiStreamConfig
from sinkstream.kernels.plans import LAYERS, LaunchPlan, OpLaunch
from sinkstream.kernels.runtime import set_compile_only
from tune_kernels.candidates import short
from tune_kernels.shapes import SHAPES, Shape
from tune_kernels.step import Checks, RandomStep, implementation, time_ms

Plan = dict[str, OpLaunch]
Job = tuple[str, OpLaunch]  # name of an op, and how it is launched
_steps: dict[str, RandomStep] = {}  # of a worker process, by shape


def alone(shape: Shape, op: str, planned: OpLaunch) -> Plan:
    """A plan for launching one op; with PDL the up-projection in the kernel of attention need not wait for `qkv`."""
    plan = dict.fromkeys(shape.ops, OpLaunch())
    if planned.pdl:
        late = LinearConfig(late=True) if shape.streams == 1 else MultiStreamConfig(late=True)
        plan["qkv"] = OpLaunch(late, pdl=True)
    return plan | {op: planned}


def compile_one(name: str, streams: int, op: str, planned: OpLaunch) -> None:
    """Compile one kernel into Triton's cache on disk; runs in a worker process."""
    set_compile_only(True)
    if name not in _steps:
        _steps[name] = RandomStep(replace(SHAPES[name], streams=streams), "cpu", initialised=False)
    step = _steps[name]
    step.use(alone(step.shape, op, planned))
    with implementation("triton"):
        step.run_layers() if op == LAYERS else step.run(op, step.last)


def compile_ahead(pool: ProcessPoolExecutor | None, shape: Shape, jobs: Iterable[Job]) -> dict[Job, Future]:
    """Kernels of a shape whose turn comes later, on their way."""
    if pool is None:
        return {}
    return {job: pool.submit(compile_one, shape.name, shape.streams, *job) for job in dict.fromkeys(jobs)}


@contextmanager
def failures_in(row: dict[str, Any]) -> Iterator[None]:
    """Note in `row` why a configuration failed; an error after which the device serves nothing more is raised."""
    try:
        yield
    except Exception as problem:
        row["failed"] = f"{type(problem).__name__}: {str(problem).strip()[:160]}"
        if "CUDA error" in str(problem) or "illegal" in str(problem):
            raise


class Measurements:
    """Everything that is measured of one shape.

    Parameters
    ----------
    shape : Shape
    device : str
    pool : ProcessPoolExecutor or None
        Processes that compile; None: each kernel is compiled, or interpreted, where it is measured.
    deadline : float
        Of ``time.monotonic()``, seconds.
    copy_gbs : float
        Bandwidth of a copy, from which floors follow, GB/s.
    kernels : {"triton", "torch"}
        What is measured: kernels or twins.
    ahead : mapping of Future, optional
        Of `compile_ahead`.

    Attributes
    ----------
    rows, steps : list of dict
        Every op and every whole step that was measured, in order; "plan" is an `OpLaunch` or a whole plan.
    """

    def __init__(
        self,
        shape: Shape,
        device: str,
        pool: ProcessPoolExecutor | None,
        deadline: float,
        copy_gbs: float,
        *,
        kernels: str = "triton",
        ahead: Mapping[Job, Future] | None = None,
    ):
        self.ahead = ahead or {}
        self.shape, self.pool, self.deadline, self.copy_gbs = shape, pool, deadline, copy_gbs
        self.step = RandomStep(shape, device)
        self.checks = Checks(self.step, kernels)
        self.rows: list[dict[str, Any]] = []
        self.steps: list[dict[str, Any]] = []

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def floor_us(self, op: str) -> float:
        """Microseconds in which a copy moves the bytes of an op."""
        return self.shape.bytes_of(op) / self.copy_gbs / 1e3

    def measure(self, op: str, planned: OpLaunch) -> dict[str, Any]:
        """Check and time one op over all layers; an error is kept and reported, not raised."""
        row: dict[str, Any] = {"shape": self.shape.name, "streams": self.shape.streams, "op": op, "plan": planned}
        with failures_in(row):
            plan, calls = alone(self.shape, op, planned), self.shape.calls(op)
            row["error"] = self.checks.op(op, plan)
            with implementation(self.checks.kernels):
                ms = time_ms(lambda: [self.step.run(op, i) for i in range(calls)], self.step.state.device, rep_ms=4)
            us = 1e3 * ms / calls
            gbs = self.shape.bytes_of(op) / us / 1e3
            row |= {"us": us, "gbs": gbs, "share": gbs / self.copy_gbs}
        self.rows.append(row)
        return row

    def time_step(self, plan: LaunchPlan, label: str, *, without: str = "") -> float:
        """Milliseconds of a whole step with greedy decoding, recorded; infinite if it fails."""
        row: dict[str, Any] = {"shape": self.shape.name, "streams": self.shape.streams, "label": label}
        row["plan"] = dict(plan)
        self.step.use(plan)
        self.step.whole.choose(None)
        self.step.without = without
        self.step.rows_wait |= without == "qkv"
        try:
            with failures_in(row), implementation(self.checks.kernels):
                row["ms"] = time_ms(self.step, self.step.state.device, rep_ms=10)
                row["over_floor"] = row["ms"] / (self.shape.step_bytes / self.copy_gbs / 1e6)
        finally:
            self.step.without = ""
        self.steps.append(row)
        return row.get("ms", float("inf"))

    def compiled(self, jobs: Iterable[Job], limit_s: float) -> Iterator[Job]:
        """Yield jobs as their kernels become available."""
        if self.pool is None:
            yield from jobs
            return
        jobs = list(dict.fromkeys(jobs))
        started = compile_ahead(self.pool, self.shape, [job for job in jobs if job not in self.ahead])
        futures = {future: job for job, future in {**self.ahead, **started}.items() if job in jobs}
        try:
            for future in as_completed(futures, timeout=max(1.0, limit_s)):
                op, planned = futures[future]
                if future.exception() is None:
                    yield op, planned
                else:
                    self.rows.append({"op": op, "plan": planned, "failed": str(future.exception())[-160:]})
        except TimeoutError:
            print(f"  time is up with {sum(not f.done() for f in futures)} kernels not compiled")
        finally:
            for future in futures:
                future.cancel()

    def fastest(self, op: str, pdl: bool) -> list[dict[str, Any]]:
        """What was measured of an op without failing, the fastest first."""
        rows = [r for r in self.rows if r["op"] == op and r["plan"].pdl == pdl and "us" in r]
        return sorted(rows, key=lambda r: r["us"])

    def best(self, op: str, pdl: bool, count: int) -> list[Any]:
        """The fastest configurations of an op so far."""
        return [r["plan"].config for r in self.fastest(op, pdl)[:count]]

    def table(self, count: int = 3) -> None:
        """Print the best configurations of every op, and what failed."""
        print(f"  {'op':10} {'us':>8} {'floor':>7} {'GB/s':>6} {'share':>6}  config")
        for op, pdl in product(self.shape.ops, (False, True)):
            for r in self.fastest(op, pdl)[:count]:
                figures = f"{r['us']:8.2f} {self.floor_us(op):7.2f} {r['gbs']:6.0f} {r['share']:6.3f}"
                print(f"  {op:10} {figures}  {short(r['plan'].config)}{' pdl' if pdl else ''}")
        failed = [r for r in self.rows if "failed" in r]
        print(f"  {len(self.rows)} configurations, {len(failed)} failed")
        for r in failed[:6]:
            print(f"    {r['op']} {short(r['plan'].config)}: {r['failed']}", flush=True)


def write_report(path: Path, report: dict[str, Any]) -> None:
    """All numbers as JSON; plans as dictionaries."""
    path.write_text(json.dumps(report, indent=1, default=asdict), encoding="utf-8")
