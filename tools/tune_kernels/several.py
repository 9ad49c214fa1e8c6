"""Several streams from their measured plan on: attention with filled pipelines side by side, then the other ops."""

from collections.abc import Iterator
from dataclasses import replace

from sinkstream.kernels.config import MultiStreamConfig
from sinkstream.kernels.plans import MB, OpLaunch, Sizes, several_plan
from tune_kernels.candidates import filled_grid, short
from tune_kernels.measure import Job, Measurements, Plan
from tune_kernels.search import costs, finish, keep_what_helps
from tune_kernels.shapes import SINK, Shape
from tune_kernels.step import H100

MEASURED = "measured plan"
AGAIN = 4  # the fastest, whose steps are timed a second time along with the measured plan


def climb_streams(m: Measurements) -> Plan:
    """Time the measured plan and every attention of `filled_grid`, print them, and try what else helps the fastest."""
    plan = several_plan(m.shape.neox, m.step.sizes, m.shape.streams)
    plans = {MEASURED: plan} | {short(planned.config): plan | {op: planned} for op, planned in _filled(m.shape, plan)}
    steps = _timed(m, plans)
    for label in sorted(steps, key=lambda label: steps[label])[:AGAIN]:
        steps[label] = (steps[label] + m.time_step(plans[label], label)) / 2
    steps[MEASURED] = (steps[MEASURED] + m.time_step(plan, MEASURED)) / 2
    floor_ms = m.shape.step_bytes / m.copy_gbs / 1e6
    print(f"  {'ms':>7} {'x floor':>8}  {m.shape.name}, {m.shape.streams} streams", flush=True)
    for label in sorted(steps, key=lambda label: steps[label]):
        print(f"  {steps[label]:7.4f} {steps[label] / floor_ms:8.4f}  {label}", flush=True)
    costs(m, plan, steps[MEASURED])
    fastest = min(steps, key=lambda label: steps[label])
    changes = list(_changes(plan))
    list(m.compiled([(op, planned) for op, planned, _ in changes], m.left() / 3))
    trials = [(label, lambda plan, op=op, planned=planned: plan | {op: planned}) for op, planned, label in changes]
    return finish(m, *keep_what_helps(m, plans[fastest], steps[fastest], trials))


def jobs_of_streams(shape: Shape) -> list[Job]:
    """Every kernel of `climb_streams` on an H100: of the measured plan, of attention, of changes of the other ops."""
    plan = several_plan(shape.neox, sizes_of(shape), shape.streams)
    return [*plan.items(), *_filled(shape, plan), *((op, planned) for op, planned, _ in _changes(plan))]


def sizes_of(shape: Shape) -> Sizes:
    """What the plans of a shape are fitted to on an H100."""
    c, rings = shape.config, (shape.cap - SINK, SINK)
    return Sizes(c.hidden_size, c.intermediate_size, shape.heads, shape.kv_heads, shape.head_dim, *rings, **H100)


def _filled(shape: Shape, plan: Plan) -> list[Job]:
    """Attention with filled pipelines."""
    op = "attention_up" if shape.neox else "attention"
    return [(op, replace(plan[op], config=config)) for config in filled_grid(shape)]


def _changes(plan: Plan) -> Iterator[tuple[str, OpLaunch, str]]:
    """Products that start the next op earlier or later, or that prefetch something or nothing: op, launch, label."""
    for op, planned in plan.items():
        if isinstance(planned.config, MultiStreamConfig) and op != "head":
            late = not planned.config.late
            yield op, replace(planned, config=replace(planned.config, late=late)), f"{op} late={late}"
            size = 0 if planned.prefetch else 4 * MB
            yield op, replace(planned, prefetch=size), f"{op} prefetches {size >> 20} MB"


def _timed(m: Measurements, plans: dict[str, Plan]) -> dict[str, float]:
    """Milliseconds of the steps of all plans that pass the check of their attention, as kernels become available."""
    op = "attention_up" if m.shape.neox else "attention"
    list(m.compiled(plans[MEASURED].items(), m.left() / 2))
    labels = {plan[op]: label for label, plan in plans.items()}
    m.measure(op, plans[MEASURED][op])
    steps = {MEASURED: m.time_step(plans[MEASURED], MEASURED)}
    for _, planned in m.compiled([(op, planned) for planned in labels if labels[planned] != MEASURED], m.left() / 2):
        if m.left() < 8:
            break
        if "failed" not in m.measure(op, planned):
            steps[labels[planned]] = m.time_step(plans[labels[planned]], labels[planned])
    return steps
