"""`StreamingCache` against the brute-force oracle: every policy, family and position frame, fed in three ways.

Token by token, in chunks that cross prunes, and through generate() must give the oracle's NLL for every single token.
"""

import pytest
import torch
from oracle.models import FAMILIES, build, token_ids
from streams import (
    CHOOSERS,
    TOLERANCE,
    Replay,
    chunk_sizes,
    feed,
    generate_text,
    make_cache,
    nll_of,
    oracle_nll,
    small_policy,
)

from sinkstream.cache import POSITIONS, SoftRing
from sinkstream.policies import PRESETS

TOKENS = 304
THOROUGH = ("gpt_neox", "llama")
ROTATED = [f for f in FAMILIES if f not in THOROUGH]
COMPOSED = {
    "max-drop+overlap+slack": {"sink": 3, "window": 17, "compress_every": 11, "overlap": 4, "max_drop": 3, "slack": 8},
    "refresh-uniform+max-drop": small_policy("refresh-uniform", max_drop=3, overlap=3),
    "refresh-accumulated-attention+max-drop": small_policy("refresh-accumulated-attention", max_drop=5, slack=7),
    "refresh-window-attention+adaptive-top1": small_policy("adaptive-top1")
    | {"refresh": 6, "scorer": "window-attention", "observation": 5},
    "refresh-uncertainty+entropy": small_policy("refresh-uncertainty", uncertainty="entropy"),
    "refresh-key-norm+no-sink": small_policy("refresh-key-norm", sink=0),
}
POLICIES = {name: small_policy(name) for name in PRESETS} | COMPOSED


def rotation() -> list:
    """Every policy and every position frame on one of the other families, every family several times."""
    jobs = [(policy, positions) for policy in POLICIES for positions in POSITIONS]
    return [(policy, ROTATED[i % len(ROTATED)], positions) for i, (policy, positions) in enumerate(jobs)]


def thorough() -> list:
    return [(policy, family, positions) for policy in POLICIES for family in THOROUGH for positions in POSITIONS]


def worst(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


@pytest.mark.parametrize(("policy", "family", "positions"), thorough() + rotation())
def test_three_ways_of_feeding_agree_with_the_oracle(policy, family, positions):
    options, model, ids = POLICIES[policy], build(family), token_ids(TOKENS)
    replay = Replay()

    def new():
        return make_cache(model, options, positions=positions)

    cache = new()
    single = nll_of(feed(model, cache, ids[None], seen=replay.watch), ids[None])[0]
    events = cache.stats()["events"]
    result = oracle_nll(model, ids, options, positions, replay)
    assert events == sum(step.event for step in result.steps) >= 6
    assert worst(single, result.nll) < TOLERANCE

    cache = new()
    chunked = nll_of(feed(model, cache, ids[None], chunk_sizes(cache, TOKENS)), ids[None])[0]
    assert worst(chunked, result.nll) < TOLERANCE
    assert cache.stats()["events"] == events

    prompt = 11
    generated = generate_text(model, new(), ids[None], prompt)
    generated = -generated.double().log_softmax(-1)[0].gather(1, ids[prompt:, None])[:, 0]
    assert worst(generated, result.nll[prompt - 1 :]) < TOLERANCE
