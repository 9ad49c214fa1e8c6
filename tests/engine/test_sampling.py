"""Sampling against transformers' logits processors, and draws against their distribution."""

import pytest
import torch
from oracle.models import build
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sinkstream.engine import Engine, Sampler

OPTIONS = [
    {"temperature": 0.7},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 1.0, "top_k": 5000},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 1.0, "top_p": 1.0},
    {"temperature": 0.9, "min_p": 0.2},
    {"repetition_penalty": 1.4},
    {"logit_bias": {3: 2.5, 150: -100.0, 7: float("-inf")}},
    {"temperature": 1.1, "top_k": 9, "repetition_penalty": 1.3, "logit_bias": {5: -1.5, 199: 4.0}},
    {"temperature": 0.8, "top_k": 30, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2},
]


def reference(options: dict) -> LogitsProcessorList:
    """The same options as transformers' generate() would order them."""
    made = LogitsProcessorList()
    if "logit_bias" in options:
        made.append(SequenceBiasLogitsProcessor([[[token], bias] for token, bias in options["logit_bias"].items()]))
    if "repetition_penalty" in options:
        made.append(RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]))
    for name, processor in [
        ("temperature", TemperatureLogitsWarper),
        ("top_k", TopKLogitsWarper),
        ("top_p", TopPLogitsWarper),
        ("min_p", MinPLogitsWarper),
    ]:
        if name in options:
            made.append(processor(options[name]))
    return made


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_distribution_is_that_of_transformers(options, dtype):
    logits, past = 3 * torch.randn(4, 200, dtype=dtype), torch.randint(200, (4, 30))
    seen = torch.zeros(4, 200, dtype=torch.bool).scatter_(1, past, True)
    expected = reference(options)(past, logits.float())
    found = Sampler(**options).process(logits, seen)
    assert torch.equal(found.isinf(), expected.isinf())
    assert torch.allclose(found.softmax(-1), expected.softmax(-1), atol=1e-6)


@pytest.mark.parametrize("presence", [0.0, 0.7])
@pytest.mark.parametrize("frequency", [0.0, -0.4])
def test_penalties_of_generated_tokens_by_hand(presence, frequency):
    logits, counts = torch.tensor([[1.0, -2.0, 0.5]]), torch.tensor([[0, 1, 3]])
    found = Sampler(presence_penalty=presence, frequency_penalty=frequency).process(logits, counts=counts)
    expected = [1.0, -2.0 - presence - frequency, 0.5 - presence - 3 * frequency]
    assert found[0].tolist() == pytest.approx(expected)


def test_penalties_count_what_was_generated_and_a_bias_forces_a_token():
    engine = Engine(build("llama"), window=40)
    written = engine.generate([3, 4, 5], max_new_tokens=60, frequency_penalty=1e4).tokens
    assert len(set(written)) == 60, "each token is so much less likely once it was written"
    engine.reset()
    assert len(set(engine.generate([3, 4, 5], max_new_tokens=60).tokens)) < 60
    assert engine.generate([6], max_new_tokens=5, logit_bias={9: 1e6}).tokens == [9] * 5


def test_draws_follow_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]]).expand(20_000, 4)
    drawn = Sampler(temperature=1.0).draw(logits, generator=torch.Generator().manual_seed(1))
    share = torch.bincount(drawn, minlength=4) / len(drawn)
    assert (share - logits[0].softmax(-1)).abs().max() < 0.02
    assert set(Sampler(temperature=1.0, top_k=2).draw(logits).tolist()) == {1, 2}


def test_a_seed_repeats_and_greedy_takes_the_likeliest():
    logits = torch.randn(3, 50)
    draws = [Sampler(temperature=1.0).draw(logits, generator=torch.Generator().manual_seed(s)) for s in (5, 5)]
    assert torch.equal(*draws)
    assert torch.equal(Sampler().draw(logits), logits.argmax(-1))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"temperature": 1.0, "top_k": 0},
        {"temperature": 1.0, "top_k": 2.5},
        {"temperature": 1.0, "top_p": 0.0},
        {"temperature": 1.0, "min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"presence_penalty": float("inf")},
        {"frequency_penalty": float("nan")},
        {"logit_bias": {-1: 2.0}},
        {"logit_bias": {5: float("nan")}},
        {"top_k": 5},
    ],
)
def test_wrong_options_are_refused_by_name(options):
    with pytest.raises(ValueError, match=list(options)[-1]):
        Sampler(**options)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, *OPTIONS])
def test_drawing_never_waits_for_the_device(options):
    logits = torch.randn(2, 5000, device="cuda")
    seen, generator = torch.zeros_like(logits, dtype=torch.bool), torch.Generator("cuda").manual_seed(1)
    sampler = Sampler(**options)
    sampler.process(logits, seen)  # a bias goes to the device once
    torch.cuda.set_sync_debug_mode("error")
    try:
        drawn = sampler.draw(logits, seen, generator)
        with pytest.raises(RuntimeError, match="synchroniz"):
            drawn.tolist()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert drawn.shape == (2,)
