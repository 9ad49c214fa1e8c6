"""Measure and tune the kernels of the decode step: every op against its own byte floor, then whole steps.

    PYTHONPATH=tools python -m tune_kernels --seconds 230 --out ops.json

What is launched is the engine's `FusedDecode`, with the plan that is tried, over random weights of a published shape.
The ceiling comes first: the bandwidth of a large device-to-device copy. Every op is checked against its twin (with
poisoned outputs) and timed over all layers, so that nothing stays in L2, under a CUDA graph. Then whole steps under one
graph, with and without programmatic dependent launch (PDL), from the fastest configurations on: each change is tried in
turn and kept if the step gets faster. With --climb the search begins at the measured plan (`sinkstream.kernels.plans`),
or at a plan in which every pipeline is filled before the wait, and tries every neighbour of every configuration until
none is faster. With --persistent whole steps are timed with all layers in one persistent kernel, in a grid of its
configurations, beside the measured plan. With --streams N the ops of N streams are measured, each alone and in a step,
then a grid of configurations of every op, and whole steps with the best of them; with --climb as well, whole steps of
the measured plan beside the same with other kernels of attention, for every number of streams that is named.
Several processes compile the kernels. Without a GPU each kernel runs once, in Triton's interpreter, which needs
TRITON_INTERPRET=1.
"""

import argparse
import os
import time
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from sinkstream.kernels.config import MAX_STREAMS
from sinkstream.measure.bandwidth import memory_bandwidth
from tune_kernels.measure import Job, Measurements, compile_ahead, write_report
from tune_kernels.search import climb, measure_persistent, measure_streams, sweep, tune
from tune_kernels.several import climb_streams, jobs_of_streams
from tune_kernels.shapes import SHAPES, Shape

SHARES = {"pythia-2.8b": 0.55, "llama-3.2-1b": 0.5, "llama-3.1-8b": 1.0}  # of the time left when its turn comes
PRINTED = ("best of each op", "PDL", "measured plan", "tuned", "persistent")  # steps printed at the end


def read_options(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        prog="tune_kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=230, help="time limit in seconds (default 230)")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for all numbers")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHARES), help="model shapes")
    parser.add_argument("--streams", type=int, nargs="+", default=[1], help="streams, up to 16, in turn (default 1)")
    parser.add_argument("--climb", action="store_true", help="begin at the measured plan, without a sweep")
    parser.add_argument("--persistent", action="store_true", help="only the persistent kernel and the measured plan")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="compiling processes")
    options = parser.parse_args(arguments)
    for streams in options.streams:
        if not 1 <= streams <= MAX_STREAMS:
            parser.error(f"--streams {streams}; accepted: 1 to {MAX_STREAMS}, which the kernels serve")
        if options.persistent and streams > 1:
            parser.error(f"--persistent with --streams {streams}; accepted: one stream, which that kernel serves")
    if options.climb and options.persistent:
        parser.error("--climb with --persistent; accepted: one of them")
    return options


def search_plan(m: Measurements, options: argparse.Namespace, budget_s: float) -> None:
    """Run the search of one shape that the options name, and print its best steps."""
    if m.shape.streams > 1 and options.climb:
        climb_streams(m)
    elif m.shape.streams > 1:
        measure_streams(m, budget_s * 0.5)
    elif options.climb:
        climb(m)
    elif options.persistent:
        measure_persistent(m)
    else:
        sweep(m, budget_s * 0.5)
        m.table()
        tune(m)
    floor_ms = m.shape.step_bytes / m.copy_gbs / 1e6
    for row in m.steps:
        if row["label"] in PRINTED and "ms" in row:
            figures = f"{row['ms']:.3f} ms = {row['ms'] / floor_ms:.3f} x floor"
            print(f"  STEP {m.shape.name} {row['label']}: {figures}", flush=True)


def compiled_ahead(
    options: argparse.Namespace, shapes: list[Shape], pool: ProcessPoolExecutor | None
) -> dict[tuple[str, int], dict[Job, Future]]:
    """With --climb and several streams: the kernels of all turns, on their way while the first turn is measured."""
    several = [s for s in shapes if options.climb and s.streams > 1]
    return {(s.name, s.streams): compile_ahead(pool, s, jobs_of_streams(s)) for s in several}


def main(arguments: list[str] | None = None) -> None:
    """Run the tuner; see the module's docstring."""
    options = read_options(arguments)
    start, cuda = time.monotonic(), torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    pool = ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) if cuda else None
    name = torch.cuda.get_device_name() if cuda else "cpu"
    report: dict[str, Any] = {"device": name, "torch": torch.__version__, "ops": [], "steps": [], "stopped": {}}
    bandwidth = memory_bandwidth(device)
    report["bandwidth_gbs"] = {"copy": bandwidth.copy_gbs, "read": bandwidth.read_gbs}
    print(f"{name}: {bandwidth}", flush=True)
    turns = [replace(SHAPES[name], streams=streams) for streams in options.streams for name in options.shapes]
    ahead = compiled_ahead(options, turns, pool)
    for turn, shape in enumerate(turns):
        left, name = options.seconds - (time.monotonic() - start), shape.name
        if left < 15:
            print(f"{name}: no time left")
            break
        remaining, compiles = len(turns) - turn, int(turn == 0)  # the first turn waits for its kernels: two shares
        share = SHARES.get(name, 1.0) if len(options.streams) == 1 else (1 + compiles) / (remaining + compiles)
        budget = left * (share if remaining > 1 else 1.0)
        print(f"{name}, {shape.streams} streams: {shape.step_bytes / 1e9:.3f} GB a step, {budget:.0f} s", flush=True)
        deadline, jobs = time.monotonic() + budget, ahead.get((name, shape.streams))
        m = Measurements(shape, device, pool, deadline, bandwidth.copy_gbs, ahead=jobs)
        try:
            search_plan(m, options, budget)
        except Exception as problem:
            print(f"  {name} stopped: {type(problem).__name__}: {str(problem)[:500]}", flush=True)
            report["stopped"][name] = repr(problem)[:2000]
        report["ops"] += m.rows
        report["steps"] += m.steps
        write_report(options.out, report)
        del m
        if cuda:
            torch.cuda.empty_cache()
    if pool is not None:
        pool.shutdown(wait=False, cancel_futures=True)
    print(f"done in {time.monotonic() - start:.0f} s, numbers in {options.out}", flush=True)


if __name__ == "__main__":
    main()
