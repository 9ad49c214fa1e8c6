"""The search for a plan: from the fastest of every op, or from the measured plan, one change at a time.

A trial is a label and a change: a function from a plan to the plan to be timed. So every trial starts from what the
trials before it have left.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, replace
from itertools import product
from typing import Any

from sinkstream.kernels import AttentionLinearConfig
from sinkstream.kernels.config import MultiStreamConfig
from sinkstream.kernels.plans import LAYERS, MB, OpLaunch, fitted, measured_plan
from tune_kernels.candidates import candidates, changed, neighbours_of, persistent_grid, several_candidates, short
from tune_kernels.measure import Job, Measurements, Plan, failures_in

Trial = tuple[str, Callable[[Plan], Plan]]
PREFETCHES = (0, MB, 2 * MB, 4 * MB, 6 * MB, 10 * MB, 16 * MB)


def sweep(m: Measurements, limit_s: float) -> None:
    """Time every op alone, without PDL; the best again with it."""
    ops, stop = m.shape.ops, time.monotonic() + limit_s
    grids = {op: candidates(m.shape, op)[: 2 if m.pool is None else None] for op in ops if op != "head"}
    longest = max(map(len, grids.values()))
    jobs = [(op, OpLaunch(grid[i])) for i in range(longest) for op, grid in grids.items() if i < len(grid)]
    for op, planned in m.compiled(jobs, limit_s):
        m.measure(op, planned)
        if time.monotonic() > stop:
            break
    jobs = [("head", OpLaunch(c)) for c in m.best("qkv", False, 4)]
    jobs += [(op, OpLaunch(c, pdl=True)) for op in ops if op != "head" for c in m.best(op, False, 5)]
    jobs += [("head", OpLaunch(c, pdl=True)) for c in m.best("qkv", False, 4)]
    for op, planned in m.compiled(jobs, 40):
        m.measure(op, planned)


def measure_streams(m: Measurements, limit_s: float) -> Plan:
    """Several streams: every op alone with its own configuration and with others, then whole steps with the best."""
    for op, pdl in product(m.shape.ops, (False, True)):
        m.measure(op, OpLaunch(pdl=pdl))
    plan, best = {}, float("inf")
    for pdl in (False, True):
        trial = dict.fromkeys(m.shape.ops, OpLaunch(pdl=pdl))
        label = f"{m.shape.streams} streams{', PDL' if pdl else ''}"
        ms = m.time_step(trial, label)
        print(f"  {label} {ms:.3f} ms, error of the logits {m.checks.logits(trial):.2g}", flush=True)
        plan, best = trial, ms
    grids = {op: several_candidates(m.shape, op)[: 1 if m.pool is None else None] for op in m.shape.ops}
    longest, stop = max(map(len, grids.values())), time.monotonic() + limit_s
    jobs = [(op, OpLaunch(g[i], pdl=True)) for i in range(longest) for op, g in grids.items() if i < len(g)]
    for op, planned in m.compiled(jobs, limit_s):
        m.measure(op, planned)
        if time.monotonic() > stop:
            break
    m.table(6)
    return finish(m, *keep_what_helps(m, plan, best, _best_of_several(m)))


def _best_of_several(m: Measurements) -> Iterator[Trial]:
    """The fastest configurations of every op, then later ones and longer prefetches of those that were kept."""
    for rank, op in product(range(5), m.shape.ops):
        found = m.best(op, True, rank + 1)
        if len(found) > rank and found[rank] is not None:
            yield f"{op} {short(found[rank])}", _other_config(op, found[rank])
    for op, (name, values) in product(m.shape.ops, {"ahead": (0, 512, 2048, 4096), "late": (False, True)}.items()):
        for value in values:
            yield f"{op} {name}={value}", _rows_changed(op, name, value)


def _rows_changed(op: str, name: str, value: Any) -> Callable[[Plan], Plan]:
    def change(plan: Plan) -> Plan:
        config = plan[op].config
        if isinstance(config, MultiStreamConfig):
            return plan | {op: replace(plan[op], config=replace(config, **{name: value}))}
        return plan

    return change


def tune(m: Measurements) -> Plan:
    """Whole steps after a `sweep`: first the best of each op, then one change after the other."""
    plain = {op: OpLaunch((m.best(op, False, 1) or m.best(op, True, 1))[0]) for op in m.shape.ops}
    best = m.time_step(plain, "best of each op")
    print(f"  no PDL {best:.3f} ms, error of the logits {m.checks.logits(plain):.2g}", flush=True)
    plan = {op: OpLaunch((m.best(op, True, 1) or m.best(op, False, 1))[0], pdl=True) for op in m.shape.ops}
    plan = _with_late_qkv(m, plan)
    return finish(m, *keep_what_helps(m, plan, m.time_step(plan, "PDL"), trials(m, plan)))


def climb(m: Measurements) -> Plan:
    """Whole steps from the measured plan on: every neighbour in turn, until a whole round helps no more."""
    plan = measured_plan(m.shape.neox, m.step.sizes)
    best, previous = m.time_step(plan, "measured plan"), float("inf")
    print(f"  measured plan {best:.3f} ms", flush=True)
    for label, filled in filled_plans(m, plan):
        ms = m.time_step(filled, label)
        print(f"  {label} {ms:.3f} ms", flush=True)
        if ms < best * 1.01:  # slower by so little, it still has more to gain from its neighbours
            plan, best = filled, ms
    while best < previous and m.left() > 10:
        previous = best
        plan, best = keep_what_helps(m, plan, best, neighbours(m, plan))
    return finish(m, plan, best)


def measure_persistent(m: Measurements) -> None:
    """Whole steps with all layers in one persistent kernel, beside the measured plan of the separate kernels."""
    plan = measured_plan(m.shape.neox, m.step.sizes)
    print(f"  measured plan {m.time_step(plan, 'measured plan'):.4f} ms", flush=True)
    jobs: list[Job] = [(LAYERS, OpLaunch(c, 6 * MB)) for c in persistent_grid(m.shape)]
    for op, planned in m.compiled(jobs, m.left() / 2):
        if m.left() < 8:
            break
        trial, row = plan | {op: planned}, {"shape": m.shape.name, "op": op, "plan": planned}
        m.rows.append(row)
        with failures_in(row):
            row["error"] = m.checks.logits(trial)
            row["ms"] = m.time_step(trial, f"persistent {short(planned.config)}")
        print(f"  {short(planned.config)}: {row.get('failed') or format(row['ms'], '.4f') + ' ms'}", flush=True)
    timed = [row for row in m.rows if "ms" in row]
    if timed:
        best = min(timed, key=lambda row: row["ms"])
        m.steps.append({"shape": m.shape.name, "label": "persistent"} | best)


def keep_what_helps(m: Measurements, plan: Plan, best: float, trials: Iterable[Trial]) -> tuple[Plan, float]:
    """Time every change of the plan and go on from it if the step gets faster.

    Returns
    -------
    plan, best : dict of OpLaunch, float
        The last plan that helped and its time, milliseconds.
    """
    for label, change in trials:
        if m.left() < 8:
            break
        trial = change(plan)
        if trial == plan:
            continue
        ms = m.time_step(trial, label)
        if ms < best * 0.998:
            plan, best = trial, ms
            print(f"  {label}: {ms:.3f} ms", flush=True)
    return plan, best


def finish(m: Measurements, plan: Plan, best: float) -> Plan:
    """Check the plan, record it, and print what each op costs in it."""
    error = m.checks.logits(plan)
    print(f"  PDL, tuned {best:.3f} ms, error of the logits {error:.2g}", flush=True)
    m.steps.append({"shape": m.shape.name, "label": "tuned", "ms": best, "error": error, "plan": plan})
    for op, planned in plan.items():
        print(f"    {op}: {planned.config}", flush=True)
    costs(m, plan, best)
    return plan


def costs(m: Measurements, plan: Plan, ms: float) -> None:
    """Print what each op costs in a step of `ms` milliseconds: how much faster the step is without the op."""
    for op in m.shape.ops:
        us = 1e3 * (ms - m.time_step(plan, f"without {op}", without=op)) / m.shape.calls(op)
        print(f"    {op} costs {us:.2f} us in the step, floor {m.floor_us(op):.2f}", flush=True)


def _with_late_qkv(m: Measurements, plan: Plan) -> Plan:
    """With a late `qkv` the up-projection in the kernel of attention need not wait."""
    return plan | {"qkv": with_config(plan["qkv"], late=True)} if m.shape.neox else plan


# ---- changes ----


def with_config(planned: OpLaunch, **changes: Any) -> OpLaunch:
    """An op launched with other values in its configuration; `attention_up` in that of the up-projection."""
    return replace(planned, config=changed(planned.config, **changes))


def linear_changes(ops: Iterable[str], **changes: Any) -> Callable[[Plan], Plan]:
    """The change that gives linear layers other values."""
    return lambda plan: plan | {op: with_config(plan[op], **changes) for op in ops}


def prefetching(op: str, size: int) -> Trial:
    """The trial in which an op prefetches `size` bytes for the ops after it."""
    return f"{op} prefetches {size >> 20} MB", lambda plan: plan | {op: replace(plan[op], prefetch=size)}


def trials(m: Measurements, plan: Plan) -> Iterator[Trial]:
    """Changes to try after a sweep whose best is `plan`."""
    ops, rows = m.shape.ops, [op for op in m.shape.ops if op != "attention"]
    for ahead in (0, 1, 4, 8):
        yield f"ahead {ahead}", linear_changes(rows, ahead=ahead)
    late = [(op, with_config(plan[op], late=True)) for op in ops if op != "attention_up"]
    if "attention_up" in plan:
        joined = plan["attention_up"].config
        for of_rows, of_attention in ((False, False), (True, True), (False, True)):
            attention = replace(joined.attention, late=of_attention)
            late.append(
                ("attention_up", OpLaunch(replace(changed(joined, late=of_rows), attention=attention), pdl=True))
            )
    fetching = [(op, replace(plan[op], prefetch=MB)) for op in ops if op != "head"]
    others = [(op, OpLaunch(c, pdl=True)) for op in ops for c in m.best(op, True, 5)[1:]]
    others += [(op, OpLaunch(c, pdl=True)) for op in ops for c in m.best(op, False, 12)[5:]]
    ready = set(m.compiled([*late, *fetching, *others], m.left() / 3))
    for op, planned in (job for job in late if job in ready):
        change = _other_config(op, planned.config) if op == "attention_up" else linear_changes([op], late=True)
        yield f"{op} late {short(planned.config)}", change
    for size, (op, _) in product((2 * MB, 6 * MB, 16 * MB), [job for job in fetching if job in ready]):
        yield prefetching(op, size)
    for op, planned in (job for job in others if job in ready):
        yield f"{op} {short(planned.config)}", _other_config_as_early(op, planned.config)
    for ahead, op in product((0, 1, 2, 3, 6), rows):
        yield f"{op} ahead {ahead}", linear_changes([op], ahead=ahead)
    for op in rows:
        yield f"{op} keeps L2", linear_changes([op], evict=False)


def _other_config(op: str, config: Any) -> Callable[[Plan], Plan]:
    return lambda plan: plan | {op: replace(plan[op], config=config)}


def _other_config_as_early(op: str, config: Any) -> Callable[[Plan], Plan]:
    """Another configuration with `late` and `ahead` of the plan's; no change where the plan's is late."""

    def change(plan: Plan) -> Plan:
        old = plan[op].config
        if isinstance(old, AttentionLinearConfig):
            return plan | {op: replace(plan[op], config=changed(config, ahead=old.linear.ahead))}
        if old.late and op != "qkv":
            return plan
        early = {"late": old.late} | ({} if op == "attention" else {"ahead": old.ahead})
        return plan | {op: replace(plan[op], config=replace(config, **early))}

    return change


def filled_plans(m: Measurements, plan: Plan) -> list[tuple[str, Plan]]:
    """Whole plans whose pipelines are filled before the wait, shallow and deep: one op at a time may show no gain."""
    ops = [op for op in m.shape.linear_ops if not plan[op].config.hold]
    plans = []
    for stages, late in product((3, 4, 6, 8), (False, True)):
        filled = {op: with_config(plan[op], stages=stages, ahead=0, late=late, fill=True) for op in ops}
        filled = {op: replace(p, config=fitted(op, p.config, m.step.sizes)) for op, p in filled.items()}
        label = f"pipelines of {stages}, {'late' if late else 'early'}"
        plans.append((label, _with_late_qkv(m, plan | filled)))
    jobs: list[Job] = [(op, trial[op]) for _, trial in plans for op in ops]
    list(m.compiled(jobs, m.left() / 4))
    return plans


def neighbours(m: Measurements, plan: Plan) -> Iterator[Trial]:
    """Small changes of one configuration of `plan`, as their kernels become available; then prefetches."""
    jobs = [(op, replace(plan[op], config=c)) for op in m.shape.ops for c in neighbours_of(plan[op].config)]
    for op, planned in m.compiled(jobs, m.left() / 2):
        yield f"{op} {short(planned.config)}", _as_different(op, plan[op].config, planned.config)
    for op, size in product([op for op in m.shape.ops if op != "head"], PREFETCHES):
        yield prefetching(op, size)


def _as_different(op: str, old: Any, new: Any) -> Callable[[Plan], Plan]:
    """The change of those fields in which two configurations of an op differ."""
    moved = {f.name: getattr(new, f.name) for f in fields(new) if getattr(new, f.name) != getattr(old, f.name)}
    if moved.keys() & {"hold", "fill"}:  # one takes the other's place, whatever the plan has by now
        moved |= {"hold": new.hold, "fill": new.fill}
    return lambda plan: plan | {op: replace(plan[op], config=replace(plan[op].config, **moved))}
