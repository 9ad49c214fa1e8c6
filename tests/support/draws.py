"""Sampling for tests: tables of samplers, transformers' processors of the same options, and a test of draws."""

from collections.abc import Sequence

import torch
from ops_cases import DEVICE
from scipy.stats import chi2
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sinkstream.engine import Sampler
from sinkstream.kernels.sample import SampleKernels
from sinkstream.kernels.sample_table import SampleTable

OPTIONS = [
    {"temperature": 0.7},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 1.0, "top_k": 5000},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 1.0, "top_p": 1.0},
    {"temperature": 0.9, "min_p": 0.2},
    {"temperature": 0.8, "repetition_penalty": 1.4},
    {"temperature": 1.1, "top_k": 9, "repetition_penalty": 1.3, "logit_bias": {5: -1.5, 39: 4.0}},
    {"temperature": 0.8, "top_k": 30, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2},
]


def table_of(
    samplers: Sequence[Sampler], vocab: int, *, seeds: Sequence[int] | None = None, prompts: Sequence = ()
) -> tuple[SampleTable, SampleKernels]:
    """A table with a row for each sampler, and what the draws need."""
    table, kernels = SampleTable.empty(len(samplers), DEVICE), SampleKernels()
    if any(s.kernels.tables for s in samplers):
        table.remember(vocab)
    for i, sampler in enumerate(samplers):
        prompt = prompts[i].to(DEVICE) if prompts else None
        sampler.write(table, i, i if seeds is None else seeds[i], prompt)
        kernels |= sampler.kernels
    return table, kernels


def processors(options: dict) -> LogitsProcessorList:
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


def g_test(drawn: torch.Tensor, probabilities: torch.Tensor) -> float:
    """P-value of the G-test of draws, (draws,), against a distribution, (vocab,); 0 if an impossible one was drawn."""
    observed = torch.bincount(drawn.cpu(), minlength=len(probabilities)).double()
    expected = probabilities.double().cpu() * len(drawn)
    if observed[expected == 0].sum():
        return 0.0
    order = expected.argsort(descending=True)
    order = order[expected[order] > 0]
    many = expected[order] >= 5  # rarer tokens are one class
    observed = torch.cat([observed[order][many], observed[order][~many].sum()[None]])
    expected = torch.cat([expected[order][many], expected[order][~many].sum()[None]])
    observed, expected = observed[expected > 0], expected[expected > 0]
    terms = torch.where(observed > 0, observed * (observed / expected).log(), 0.0)
    return float(chi2.sf(2 * terms.sum(), max(1, len(observed) - 1)))
