"""The tuner drives the engine's step; its checks start from the same inputs whatever ran before, and find a fault."""

import copy
import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from ops_cases import NEEDS_TRITON
from tune_kernels import measure, search
from tune_kernels.__main__ import main
from tune_kernels.candidates import attention_grid, candidates, filled_grid, neighbours_of, persistent_grid, short
from tune_kernels.measure import Measurements, write_report
from tune_kernels.several import climb_streams, jobs_of_streams, sizes_of
from tune_kernels.shapes import SHAPES
from tune_kernels.step import implementation

from sinkstream.engine import fused
from sinkstream.engine.plain import Row
from sinkstream.kernels import AttentionConfig, LinearConfig
from sinkstream.kernels.config import filled_bytes
from sinkstream.kernels.plans import LAYERS, OpLaunch, measured_plan

DEFAULT = OpLaunch()


def measurements(name: str, *, streams: int = 1, kernels: str = "torch") -> Measurements:
    return Measurements(replace(SHAPES[name], streams=streams), "cpu", None, math.inf, 10.0, kernels=kernels)


@pytest.fixture(params=["smoke-neox", "smoke-llama"])
def m(request):
    torch.manual_seed(0)
    return measurements(request.param)


def check(m: Measurements, op: str) -> float:
    return m.checks.op(op, dict.fromkeys(m.shape.ops, DEFAULT))


def test_checks_do_not_depend_on_what_ran_before(m):
    """An op's input is another op's output, and a timing leaves the last layer's results there."""
    first = {op: check(m, op) for op in m.shape.ops}
    for op in m.shape.ops:
        m.step.run(op, 0)
    assert {op: check(m, op) for op in reversed(m.shape.ops)} == first
    assert max(first.values()) == 0.0


def test_a_wrong_result_is_found(m):
    layer = m.step.weights.layers[m.step.last]
    (layer.weight_out if m.shape.neox else layer.weight_down).neg_()
    with pytest.raises(ArithmeticError, match="relative error"):
        check(m, m.shape.ops[-2])


def test_an_output_that_is_not_written_is_found(m):
    m.step.without = m.shape.ops[0]
    with pytest.raises(ArithmeticError, match="relative error nan"):
        check(m, m.shape.ops[0])


def test_bytes_and_widths_are_those_of_the_weights_that_the_step_reads(m):
    layer, widths = m.step.weights.layers[0], dict(m.shape.widths)
    assert widths.pop("head") == m.step.weights.head.shape
    if m.shape.neox:
        rows = widths["qkv"][0] + widths.pop("attention_up")[0]
        assert (rows, widths.pop("qkv")[1]) == layer.weight_in.shape
    assert all(size == getattr(layer, f"weight_{op}").shape for op, size in widths.items())
    state = m.step.state
    biases_and_norms = 0.02 * m.step.weights.step_bytes
    held = m.step.weights.step_bytes + state.keys.nbytes + state.values.nbytes
    assert abs(held - m.shape.step_bytes) < biases_and_norms


def test_every_slot_is_read(m):
    with implementation("torch"):
        m.step()
    assert m.step.state.geometry.slots == m.shape.cap and bool(Row(m.step.state, 1.0).visible.all())


def test_the_plan_that_is_tried_is_what_the_step_launches(m, monkeypatch):
    """The tuner's step is the engine's: a configuration given to the tuner arrives at the engine's call of the op."""
    launched, norm_linear = [], fused.norm_linear

    def launch(*arguments, config, pdl, **more):
        launched.append((config, pdl))
        return norm_linear(*arguments, config=config, pdl=pdl, **more)

    monkeypatch.setattr(fused, "norm_linear", launch)
    tried = LinearConfig(rows=2)
    m.measure("qkv", OpLaunch(tried, pdl=True))
    assert launched[-m.shape.layers :] == [(tried, i > 0) for i in range(m.shape.layers)]
    m.measure("qkv", DEFAULT)
    assert launched[-1] == (None, False), "control"


def test_an_op_that_is_left_out_is_not_launched(m, monkeypatch):
    """And the next whole step has it again."""
    plan, logits = dict.fromkeys(m.shape.ops, DEFAULT), m.step.state.logits
    logits.fill_(7.0)
    m.time_step(plan, "without head", without="head")
    assert bool((logits == 7.0).all())
    assert m.time_step(plan, "all") < math.inf and not bool((logits == 7.0).any())


def test_several_streams_are_measured(m):
    several = measurements(m.shape.name, streams=3)
    plan = search.measure_streams(several, 60.0)
    assert set(plan) == set(several.shape.ops)
    assert len(several.rows) >= 2 * len(several.shape.ops) and not any("failed" in row for row in several.rows)
    assert len(several.step.state.logits) == 3 and several.step.state.logits.isfinite().all()
    shape, extra = several.shape, several.shape.step_bytes - m.shape.step_bytes
    assert extra == 2 * 2 * 2 * shape.layers * shape.kv_heads * shape.cap * shape.head_dim, "keys and values only"


def test_plans_of_several_streams_are_compared(m, capsys):
    several = measurements(m.shape.name, streams=3)
    climb_streams(several)
    grid = filled_grid(several.shape)
    labels = [row["label"] for row in several.steps]
    assert len(grid) > 5 and all(config.fill and config.splits <= 64 for config in grid)
    assert all(short(config) in labels for config in grid) and labels.count("measured plan") >= 2
    assert not any("failed" in row for row in several.rows + several.steps)
    assert "x floor" in capsys.readouterr().out
    assert sizes_of(several.shape) == several.step.sizes
    assert {planned.config for _, planned in jobs_of_streams(several.shape)} >= set(grid)


def test_what_is_on_its_way_is_not_compiled_again(m, monkeypatch):
    compiled = []
    monkeypatch.setattr(measure, "compile_one", lambda name, streams, op, planned: compiled.append((op, planned)))
    early, later = [(m.shape.ops[0], OpLaunch(prefetch=size)) for size in (16, 32)]
    with ThreadPoolExecutor(1) as pool:
        m.pool, m.ahead = pool, measure.compile_ahead(pool, m.shape, [early, early])
        assert set(m.compiled([later, early, later], 60.0)) == {early, later}
    assert sorted(compiled, key=str) == sorted([early, later], key=str)


def test_one_wave_of_attention():
    """As many programs as fit 132 multiprocessors at once, and shared memory for all of them."""
    for name, streams in (("llama-3.2-1b", 8), ("llama-3.2-1b", 2), ("pythia-2.8b", 8), ("pythia-2.8b", 2)):
        shape = replace(SHAPES[name], streams=streams)
        for config in filled_grid(shape):
            programs = config.splits * shape.kv_heads * streams
            per_sm = -(-programs // 132)
            assert per_sm <= 4 and per_sm * filled_bytes(config, shape.head_dim) <= 228 * 1024
            assert per_sm * config.warps * 32 * config.registers <= 65536


def test_the_report_keeps_plans(m, tmp_path):
    m.measure("qkv", OpLaunch(LinearConfig(rows=2), prefetch=5))
    m.time_step(dict.fromkeys(m.shape.ops, DEFAULT), "defaults")
    write_report(tmp_path / "ops.json", {"ops": m.rows, "steps": m.steps})
    report = json.loads((tmp_path / "ops.json").read_text())
    assert report["ops"][0]["plan"]["config"]["rows"] == 2 and report["ops"][0]["plan"]["prefetch"] == 5
    assert report["steps"][0]["plan"]["head"] == {"config": None, "prefetch": 0, "pdl": False}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["0"], "--streams 0; accepted: 1 to 16"),
        (["2", "17"], "--streams 17"),
        (["2", "--persistent"], "--persistent with --streams 2"),
        (["1", "--climb", "--persistent"], "--climb with --persistent"),
    ],
)
def test_streams_that_are_not_measured(options, says, capsys):
    with pytest.raises(SystemExit):
        main(["--out", "unused.json", "--streams", *options])
    assert says in capsys.readouterr().err


def test_neighbours_of_a_configuration_at_its_bounds_are_accepted_ones():
    least = LinearConfig(rows=1, columns=256, warps=1, stages=1, per_sm=1, ahead=0)
    assert {(c.rows, c.columns, c.warps, c.stages, c.ahead) for c in neighbours_of(least)} == {
        *((2, 256, 1, 1, 0), (1, 512, 1, 1, 0), (1, 256, 2, 1, 0), (1, 256, 1, 2, 0), (1, 256, 1, 1, 1)),
        (1, 256, 1, 1, 0),  # more programs, or a flag
    }
    assert {c.tile for c in neighbours_of(AttentionConfig(tile=16))} == {16, 32}


def test_every_op_has_configurations_to_try():
    for shape in SHAPES.values():
        if not shape.name.startswith("smoke"):
            assert all(len(candidates(shape, op)) > 8 for op in shape.ops)
            assert len(attention_grid(shape)) == len(set(attention_grid(shape)))


# ---- the search ----


@pytest.fixture
def plan(m):
    return measured_plan(m.shape.neox, m.step.sizes)


@NEEDS_TRITON
def test_a_step_with_filled_pipelines_gives_the_same_logits(m, plan):
    plans = [{op: replace(planned, prefetch=0) for op, planned in p.items()} for _, p in search.filled_plans(m, plan)]
    assert len({str(p) for p in plans}) == len(plans) > 4
    filled = [op for op in m.shape.linear_ops if plans[-1][op].config.fill]
    assert set(filled) >= {"qkv", "head"} and plans[-1]["head"].config.stages > plans[0]["head"].config.stages
    kernels = measurements(m.shape.name, kernels="triton")
    assert 0 < kernels.checks.logits(plans[-1]) < m.checks.tolerance


def test_a_change_starts_from_what_was_kept(m, plan):
    """Neighbours are made from the first plan; what comes early is replaced whatever was kept before."""
    op, filled = m.shape.ops[-2], []
    plan[op] = replace(plan[op], config=replace(plan[op].config, hold=False, fill=False))
    kept = plan
    for _, change in search.neighbours(m, plan):
        trial = change(kept)
        if trial[op].config.hold:
            kept = trial  # as one that helped
        elif trial[op].config.fill:
            filled.append(trial)
    assert kept[op].config.hold and filled
    assert not plan[op].config.hold, "control: a change leaves its plan as it was"


def test_climbing_tries_every_neighbour_of_the_measured_plan_and_keeps_what_helps(m, monkeypatch):
    """Times are made up: one change is faster, everything else is as it was."""
    op, tried = m.shape.ops[-2], []

    def time_step(plan, label, **how):
        tried.append(label)
        return 2.0 - 0.1 * min(plan[op].config.ahead, 2)

    monkeypatch.setattr(m, "time_step", time_step)
    monkeypatch.setattr(m.checks, "logits", lambda plan: 0.0)
    plan = search.climb(m)
    assert plan[op].config.ahead == 2, "the faster neighbour was not kept"
    assert all(any(label.startswith(o) for label in tried) for o in m.shape.ops)
    assert len(neighbours_of(plan[op].config)) == len(set(neighbours_of(plan[op].config)))


def test_a_sweep_gives_the_plan_that_tuning_begins_with(m, monkeypatch):
    monkeypatch.setattr(m.checks, "logits", lambda plan: 0.0)
    search.sweep(m, math.inf)
    m.table()
    tuned, labels = search.tune(m), [row["label"] for row in m.steps]
    assert labels[:2] == ["best of each op", "PDL"] and f"without {m.shape.ops[0]}" in labels
    assert set(tuned) == set(m.shape.ops) and all(planned.pdl for planned in tuned.values())


@pytest.mark.parametrize("name", ["smoke-neox", "smoke-llama"])
def test_the_persistent_kernel_is_timed_beside_the_measured_plan(name, monkeypatch):
    shape = SHAPES[name]
    config = copy.deepcopy(shape.config)
    config.hidden_size = 64 * config.num_attention_heads
    m = Measurements(replace(shape, config=config), "cpu", None, math.inf, 10.0, kernels="torch")
    launched, layers = [], fused.persistent_layers
    monkeypatch.setattr(fused, "persistent_layers", lambda *given, **more: launched.append(1) or layers(*given, **more))
    search.measure_persistent(m)
    timed = [row for row in m.rows if row["op"] == LAYERS]
    assert [row["plan"].config for row in timed] == persistent_grid(m.shape) and len(launched) >= 2 * len(timed)
    assert all(row["error"] < m.checks.tolerance and row["ms"] > 0 for row in timed)
    labels = [row["label"] for row in m.steps]
    assert labels[0] == "measured plan" and labels[-1] == "persistent" and len(labels) == len(timed) + 2
    m.step.weights.final_norm.weight.zero_()
    search.measure_persistent(m)
    assert "failed" in m.rows[-1], "control: logits that cannot be compared are found"
