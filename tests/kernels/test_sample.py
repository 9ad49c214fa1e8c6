"""`sample`: the kernel draws what its twin draws, bit for bit, at any width, with ties and extreme values."""

import math

import pytest
import torch
from draws import OPTIONS, table_of
from ops_cases import DEVICE, NEEDS_TRITON, draw

from sinkstream.engine import Sampler
from sinkstream.kernels.begin_step import begin_step
from sinkstream.kernels.layout import DRAWN, FIELDS, IDLE, LIKELIEST, NO_TOKEN, TOKEN
from sinkstream.kernels.sample import TILE, Draws, SampleBuffers, sample
from sinkstream.kernels.sample_table import PROMPT, SampleTable
from sinkstream.kernels.sample_twin import weights

MORE = [
    {},
    {"repetition_penalty": 1.3},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_p": 1e-9},
    {"temperature": 1.5, "top_k": 40, "top_p": 0.5},
    {"temperature": 2.0, "presence_penalty": 0.7, "frequency_penalty": 0.4, "logit_bias": {0: 3.0, 2: -math.inf}},
    {"temperature": 0.01, "min_p": 1.0},
    {"temperature": 30.0, "top_p": 0.999},
]


def on_cpu(table: SampleTable) -> SampleTable:
    parts = (table.numbers, table.settings, table.counts, table.bias)
    return SampleTable(*(None if t is None else t.cpu() for t in parts))


def check(logits: torch.Tensor, chosen: list[dict], *, position: int = 3) -> list[int]:
    """The kernel against its twin on the CPU; what was drawn."""
    vocab = logits.shape[1]
    prompts = [torch.randint(vocab, (5,)) for _ in chosen]
    table, kernels = table_of([Sampler(**o) for o in chosen], vocab, prompts=prompts)
    if table.counts is not None:
        table.counts += torch.randint(3, table.counts.shape, dtype=torch.int16).to(DEVICE)
    positions = torch.arange(position, position + len(chosen), device=DEVICE)
    drawn = sample(logits, positions, table, kernels, implementation="triton").cpu()
    expected = sample(logits.cpu(), positions.cpu(), on_cpu(table), kernels, implementation="torch")
    assert drawn.tolist() == expected.tolist()
    return drawn.tolist()


@NEEDS_TRITON
@pytest.mark.parametrize(
    ("vocab", "chosen"),
    [
        pytest.param(7, OPTIONS[3:4], id="narrow"),
        pytest.param(TILE, OPTIONS[:1], id="one-tile"),
        pytest.param(TILE + 1, [OPTIONS[1], OPTIONS[5]], id="two-tiles"),
        pytest.param(601, MORE[:2], id="greedy"),
        *(pytest.param(601, [o], id=f"options{i}", marks=pytest.mark.slow) for i, o in enumerate([*OPTIONS, *MORE])),
        pytest.param(2500, [*OPTIONS, *MORE], id="together", marks=pytest.mark.slow),
    ],
)
def test_the_kernel_draws_what_its_twin_draws(vocab, chosen):
    check(draw(len(chosen), vocab, scale=3.0), chosen)


@NEEDS_TRITON
def test_ties_and_extreme_values():
    logits = draw(6, 600)
    logits[0] = 1.0
    logits[1, 300:] = -math.inf
    logits[2, [5, 599]] = 1e30
    logits[3, 599] = math.nan
    logits[4] = -math.inf
    logits[5] = 1e-30
    chosen = [{"temperature": 1.0, "top_k": 3, "top_p": 0.9}] * 6
    drawn = check(logits, chosen)
    assert drawn[1] < 300 and drawn[2] in (5, 599) and drawn[3:5] == [-1, -1]


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [50_257, 128_256])
@pytest.mark.parametrize("scale", [0.1, 1.0, 8.0])
def test_the_kernel_at_full_width(vocab, scale):
    chosen = [*OPTIONS, *MORE]
    for position in range(3):
        check(draw(len(chosen), vocab, scale=scale).round(decimals=2 + position % 3), chosen, position=position)


# ---- thresholds ----


def test_equal_tokens_stay_together():
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]], device=DEVICE)
    for options, kept in (({"top_k": 2}, 4), ({"top_p": 0.5}, 4), ({"top_p": 0.01}, 1), ({"min_p": 0.36}, 4)):
        table, _ = table_of([Sampler(temperature=1.0, **options)], 5)
        assert int((weights(logits, table) > 0).sum()) == kept


@pytest.mark.parametrize("options", [{"top_k": 17}, {"top_p": 0.7}, {"min_p": 0.03}, {"top_k": 80, "top_p": 0.6}])
def test_thresholds_are_those_of_float64(options):
    logits = draw(20, 1000, scale=2.0)
    table, _ = table_of([Sampler(temperature=0.8, **options)] * 20, 1000)
    found = weights(logits, table).cpu()
    for row, drawable in zip(logits.double().cpu(), found > 0):
        order = row.argsort(descending=True)
        p = (row[order] / 0.8).softmax(-1)
        stays = torch.ones(1000, dtype=torch.bool)
        stays[options.get("top_k", 1000) :] = False
        p = torch.where(stays, p, 0.0) / p[stays].sum()
        stays &= p.cumsum(-1) - p < options.get("top_p", 2.0)
        stays &= p >= options.get("min_p", 0.0) * p[0]
        assert sorted(order[stays].tolist()) == drawable.nonzero()[:, 0].tolist()


# ---- in a step ----


def step(chosen: list[dict], told: list[int], implementation: str, planned: list[int], logits: torch.Tensor):
    """`begin_step` of one stream each; ids noted in the plan, ids appended, counts."""
    streams, vocab = logits.shape
    table, kernels = table_of([Sampler(**o) for o in chosen], vocab, prompts=[torch.tensor([1])] * streams)
    draws = Draws(table, kernels, SampleBuffers(streams, vocab, DEVICE))
    plan = torch.zeros(2, streams, FIELDS, dtype=torch.int32, device=DEVICE)
    plan[0, :, TOKEN] = torch.tensor(planned)
    scalars, _, _ = begin_step(
        torch.tensor(told, device=DEVICE), logits, plan, torch.full((streams,), -1, device=DEVICE),
        draw(vocab, 8), torch.ones(4, device=DEVICE).double(), draws=draws, implementation=implementation,
    )  # fmt: skip
    return plan[0, :, TOKEN].tolist(), scalars[:, TOKEN].tolist(), table.counts.cpu()


@NEEDS_TRITON
def test_a_step_draws_counts_and_refuses():
    logits = draw(5, 70)
    logits[4, 9] = math.nan
    chosen = [{"temperature": 1.0, "frequency_penalty": 0.5}] * 5
    told, planned = [DRAWN, LIKELIEST, 7, DRAWN, DRAWN], [-4, -9, -3, IDLE, -6]
    twin, kernel = (step(chosen, told, name, planned, logits) for name in ("torch", "triton"))
    assert twin[:2] == kernel[:2] and torch.equal(twin[2], kernel[2])
    noted, appended, counts = kernel
    assert noted[4] == NO_TOKEN and appended[4] == 9 and noted[:4] == appended[:4]
    assert noted[1:3] == [int(logits[1].argmax()), 7]
    counts[:, 1] -= PROMPT
    assert counts.sum(-1).tolist() == [1, 0, 0, 0, 1] and counts[0, noted[0]] == 1


def test_mistakes_are_named():
    table, kernels = table_of([Sampler(temperature=1.0)], 8)
    zeros = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="logits has dtype"):
        sample(torch.zeros(1, 8, dtype=torch.float16, device=DEVICE), zeros, table, kernels)
    with pytest.raises(ValueError, match="positions has shape"):
        sample(torch.zeros(1, 8, device=DEVICE), zeros[:0], table, kernels)
    with pytest.raises(ValueError, match="numbers has shape"):
        sample(torch.zeros(2, 8, device=DEVICE), zeros.expand(2).contiguous(), table, kernels)
