"""The benchmark of the ops: its checks start from the same inputs whatever ran before, and find a wrong result."""

import math
from dataclasses import replace

import pytest
import torch
from ops_cases import NEEDS_TRITON
from tune_kernels import SHAPES, TOLERANCE, Bench, attention_grid, candidates, main, neighbours_of


@pytest.fixture(params=["smoke-neox", "smoke-llama"])
def bench(request):
    torch.manual_seed(0)
    return Bench(SHAPES[request.param], "cpu", None, math.inf, 10.0)


def test_checks_do_not_depend_on_what_ran_before(bench):
    """An op's input is another op's output, and a timing leaves the last layer's results there."""
    ops = [*bench.shape.ops, "head"]
    first = {op: bench.check(op, None, backend="torch") for op in ops}
    for op in bench.shape.ops:
        bench.model.call(op, bench.shape.layers - 1, None, backend="torch")
    assert {op: bench.check(op, None, backend="torch") for op in reversed(ops)} == first
    assert max(first.values()) == 0.0


def test_a_wrong_result_is_found(bench):
    name = bench.shape.ops[-1]
    bench.model.weights[0][name][0] *= -1
    with pytest.raises(ArithmeticError, match="relative error"):
        bench.check(name, None, backend="torch")


def test_several_streams_are_measured(bench):
    shape = replace(bench.shape, streams=3)
    several = Bench(shape, "cpu", None, math.inf, 10.0)
    ops = [*shape.ops, "head"]
    assert max(several.check(op, None, backend="torch") for op in ops) == 0.0
    several.model.step(dict.fromkeys(ops) | {"pdl": False, "next": {}}, backend="torch")
    assert len(several.model.logits) == 3 and several.model.logits.isfinite().all()
    extra = shape.step_bytes - bench.shape.step_bytes
    assert extra == 2 * 2 * 2 * shape.layers * shape.kv_heads * shape.cap * shape.head_dim, "keys and values only"


@pytest.mark.parametrize(
    ("options", "says"),
    [(["0"], "--streams 0; accepted: 1 to 16"), (["17"], "--streams 17"), (["2", "--climb"], "--climb")],
)
def test_streams_that_are_not_measured(options, says, capsys):
    with pytest.raises(SystemExit):
        main(["--out", "unused.json", "--streams", *options])
    assert says in capsys.readouterr().err


def test_an_output_that_is_not_written_is_found(bench, monkeypatch):
    monkeypatch.setattr(bench.model, "call", lambda *a, **how: None)
    with pytest.raises(ArithmeticError, match="relative error nan"):
        bench.check(bench.shape.ops[0], None, backend="torch")


def test_every_op_has_configurations_to_try():
    for shape in SHAPES.values():
        if not shape.name.startswith("smoke"):
            assert all(len(candidates(shape, op)) > 8 for op in shape.ops)
            assert len(attention_grid(shape)) == len(set(attention_grid(shape)))


@NEEDS_TRITON
def test_a_step_with_filled_rings_gives_the_same_logits(bench):
    measured = bench.measured_plan() | {"next": {}}
    plans = [plan for _, plan in bench.filled_plans(measured)]
    assert len({str(plan) for plan in plans}) == len(plans) > 4
    linear = [op for op in plans[-1] if getattr(plans[-1][op], "fill", False)]
    assert set(linear) >= {"qkv", "head"} and plans[-1]["head"].stages > plans[0]["head"].stages
    assert bench.check_step(plans[-1]) < TOLERANCE[bench.shape.dtype]


def test_what_comes_early_is_replaced_whatever_was_kept_before(bench):
    plan, op, filled = bench.measured_plan(), bench.shape.ops[-1], []
    plan[op] = replace(plan[op], hold=False, fill=False)
    for _, trial in bench.neighbours(plan):
        if trial[op].hold:
            plan.update(trial)  # as one that helped
        elif trial[op].fill:
            filled.append(trial)
    assert plan[op].hold and filled


def test_climbing_tries_every_neighbour_of_the_measured_plan_and_keeps_what_helps(bench, monkeypatch):
    """Times are made up: one change is faster, everything else is as it was."""
    names = {"smoke-neox": "out", "smoke-llama": "down"}
    op, tried = names[bench.shape.name], []

    def time_step(plan, label, **how):
        tried.append(label)
        return 2.0 - 0.1 * min(plan[op].ahead, 2)

    monkeypatch.setattr(bench, "time_step", time_step)
    monkeypatch.setattr(bench, "check_step", lambda plan: 0.0)
    plan = bench.climb()
    assert plan[op].ahead == 2, "the faster neighbour was not kept"
    assert all(any(label.startswith(o) for label in tried) for o in bench.shape.ops)
    assert len(neighbours_of(plan[op])) == len(set(neighbours_of(plan[op])))
