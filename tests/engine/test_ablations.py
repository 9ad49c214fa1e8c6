"""Steps that fuse one thing only say what the plain step says: on the twins, in the interpreter, on a GPU."""

import pytest
import torch
from ops_cases import NEEDS_TRITON
from oracle.models import build, token_ids
from streams import FakeTokenizer, small_policy

from sinkstream.engine import Engine, ablations
from sinkstream.kernels import set_implementation

FAMILIES = ("gpt_neox", "llama", "qwen3")
STEPS = {
    "graph-norm": lambda e: lambda: ablations.decode_add_norm(e.state.span(), e.weights),
    "graph-linear": lambda e: ablations.LinearDecode(e.weights, e.state.span()),
}


def engine(model, policy: str | dict, **more) -> Engine:
    options = small_policy(policy) if isinstance(policy, str) else policy
    return Engine(model, tokenizer=FakeTokenizer(), **{"backend": "ring"} | more, **options)


def worst_of(model, policy: str | dict, step: str, tokens: int) -> tuple[float, Engine]:
    """Largest difference of a logit between the step and the plain one, over a text."""
    plain, other = engine(model, policy), engine(model, policy)
    other._step = torch.no_grad()(STEPS[step](other))
    differences = [(plain.step([t]) - other.step([t])).abs().max().item() for t in token_ids(tokens).tolist()]
    return max(differences), other


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("policy", ["strict", "lazy", "refresh-accumulated-attention", "refresh-window-attention"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_twins_say_what_the_plain_step_says(family, policy, step):
    worst, other = worst_of(build(family, layers=2), policy, step, 60)
    assert worst < 1e-4
    assert other.state.stats(0)["events"] >= 2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_norm_that_is_left_out_would_show(family, monkeypatch):
    one = ablations.add_norm
    monkeypatch.setattr(ablations, "add_norm", lambda x, delta, *norms, eps: (one(x, delta, *norms, eps=eps)[0],) * 3)
    assert worst_of(build(family, layers=2), "strict", "graph-norm", 8)[0] > 0.01


@NEEDS_TRITON
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_the_kernels_say_what_the_plain_step_says(family, step):
    set_implementation("triton")
    try:
        model = build(family, torch.float16, layers=1)
        worst, other = worst_of(model, {"sink": 1, "window": 2, "compress_every": 1}, step, 5)
        assert worst < 0.02 and other.state.stats(0)["events"] >= 2
    finally:
        set_implementation("auto")


@pytest.mark.gpu
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_under_a_graph(family, step):
    model = build(family, torch.float16, layers=2).to("cuda")
    plain, other = engine(model, "lazy"), engine(model, "lazy", backend=step)
    for token in token_ids(60).tolist():
        assert (plain.step([token]) - other.step([token])).abs().max() < 0.05
    assert other.state.stats(0)["events"] >= 2
