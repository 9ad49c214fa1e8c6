"""`StreamingCache` against the brute-force oracle: every policy, family and position frame, fed in three ways.

Token by token, in chunks that cross prunes, and through generate() must give the oracle's NLL for every single token.
"""

import pytest
import torch
from oracle.models import ENGINE, FAMILIES, build, token_ids
from oracle.rules import Rule
from streams import (
    TOLERANCE,
    chunk_sizes,
    feed,
    full_cache_error,
    generate_text,
    make_cache,
    nll_of,
    one_too_far,
    oracle_run,
    root_mean_square,
    rounding_bound,
    shift_pinned_frame,
    small_policy,
)

from sinkstream.cache import describe
from sinkstream.policies import PRESETS

TOKENS = 176  # every one of the odd sizes once
THOROUGH = ("gpt_neox", "llama")
ROTATED = [f for f in ENGINE if f not in THOROUGH]
COMPOSED = {
    "max-drop+overlap+slack": {"sink": 3, "window": 17, "compress_every": 11, "overlap": 4, "max_drop": 3, "slack": 8},
    "refresh-uniform+max-drop": small_policy("refresh-uniform", max_drop=3, overlap=3),
    "refresh-accumulated-attention+max-drop": small_policy("refresh-accumulated-attention", max_drop=5, slack=7),
    "refresh-window-attention+adaptive-top1": small_policy("adaptive-top1")
    | {"refresh": 6, "scorer": "window-attention", "observation": 5},
    "refresh-uncertainty+entropy": small_policy("refresh-uncertainty", uncertainty="entropy", compress_every=11),
    "refresh-key-norm+no-sink": small_policy("refresh-key-norm", sink=0),
}
POLICIES = {name: small_policy(name) for name in PRESETS} | COMPOSED


def jobs() -> list:
    """(policy, family, positions, ways of feeding) of every test."""
    found = []
    for i, policy in enumerate(POLICIES):
        a, b = THOROUGH if i % 2 else THOROUGH[::-1]
        found += [
            (policy, a, "cache", "single+chunks+generate"),
            (policy, b, "cache", "single+chunks"),
            (policy, a, "original", ("chunks", "generate")[i % 2]),
            (policy, ROTATED[2 * i % len(ROTATED)], "cache", "chunks"),
            (policy, ROTATED[(2 * i + 1) % len(ROTATED)], "original", "chunks"),
        ]
    return found


def worst(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest absolute difference."""
    return (a - b).abs().max().item()


@pytest.mark.parametrize(("policy", "family", "positions", "ways"), jobs())
def test_every_way_of_feeding_agrees_with_the_oracle(policy, family, positions, ways):
    options, model, ids, runs = POLICIES[policy], build(family), token_ids(TOKENS), {}
    if "single" in ways:
        cache = make_cache(model, options, positions=positions)
        runs["single"] = feed(model, cache, ids[None]), cache.stats()
    if "chunks" in ways:
        cache = make_cache(model, options, positions=positions)
        runs["chunks"] = feed(model, cache, ids[None], chunk_sizes(cache, TOKENS)), cache.stats()
    if "generate" in ways:
        cache = make_cache(model, options, positions=positions)
        logits = generate_text(model, cache, ids[None])
        runs["generate"] = torch.cat([logits, logits[:, -1:]], 1), cache.stats()  # it needs no logits of the last token
    expected = oracle_run(model, ids, options, positions)
    events = sum(step.event for step in expected.steps[:-1])
    assert events >= 6
    for way, (logits, stats) in runs.items():
        assert worst(nll_of(logits, ids[None])[0], expected.nll) < TOLERANCE, way
        assert 0 <= stats["events"] - events <= 1, way  # the last token may bring one more
        assert stats["evicted"] == stats["seen"] - stats["kept"] > 0, way


# ---- controls: the comparison above must be able to fail ----


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pinned_frame_off_by_one_would_show(family, monkeypatch):
    shift_pinned_frame(monkeypatch)
    model, ids, options = build(family), token_ids(90), POLICIES["lazy"]
    nll = nll_of(feed(model, make_cache(model, options), ids[None]), ids[None])[0]
    assert worst(nll, oracle_run(model, ids, options).nll) > 1e-2


@pytest.mark.parametrize("other", [name for name in POLICIES if name != "strict"])
def test_every_policy_differs_from_strict(other):
    model, ids = build("llama"), token_ids(TOKENS)
    nlls = []
    for name in ("strict", other):
        cache = make_cache(model, POLICIES[name])
        nlls.append(nll_of(feed(model, cache, ids[None], chunk_sizes(cache, TOKENS)), ids[None])[0])
    assert worst(*nlls) > 1e-2


def test_the_rules_of_the_oracle_are_those_of_the_options():
    """Otherwise a forgotten option would make the comparison vacuous."""
    known = {"adaptive", "scorer", "uncertainty", "observation", *Rule.__dataclass_fields__}
    for name, options in POLICIES.items():
        unknown = {key for key in options if key not in known and not key.startswith("adaptive_")}
        assert not unknown, f"{name}: tell streams.oracle_run what {unknown} means"


# ---- half precision ----


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", THOROUGH)
def test_half_precision_costs_what_it_costs_the_module(family, dtype):
    """Token by token against float64 on the same weights; means would hide errors of opposite sign."""
    model, ids, options = build(family, dtype, layers=2), token_ids(200), POLICIES["refresh-uniform"]
    plain, cache = full_cache_error(model, ids), make_cache(model, options)
    nll = nll_of(feed(model, cache, ids[None], chunk_sizes(cache, 200)), ids[None])[0]
    found = nll - oracle_run(model, ids, options).nll
    assert found.abs().max() < rounding_bound(model)
    assert root_mean_square(found) < 2 * root_mean_square(plain), "not one bit more"
    wrong = nll - oracle_run(model, ids, options, one_too_far).nll
    assert wrong.abs().max() > 2 * rounding_bound(model) and root_mean_square(wrong) > 4 * root_mean_square(plain)


# ---- the other attention implementation ----


@pytest.mark.parametrize("policy", ["strict", "lazy", "max-drop", "refresh-key-norm"])
def test_eager_attention_agrees(policy):
    model, ids, options = build("qwen3"), token_ids(TOKENS), POLICIES[policy]
    model.set_attn_implementation("eager")
    cache = make_cache(model, options)
    nll = nll_of(feed(model, cache, ids[None], chunk_sizes(cache, TOKENS)), ids[None])[0]
    assert worst(nll, oracle_run(model, ids, options).nll) < TOLERANCE


@pytest.mark.parametrize("scorer", ["window-attention", "accumulated-attention", "last-query"])
def test_eager_attention_is_refused_by_attention_scorers(scorer):
    model = build("llama")
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=r"attn_implementation='sdpa'.*'eager'"):
        make_cache(model, POLICIES[f"refresh-{scorer}"])


# ---- nothing is evicted ----


@pytest.mark.parametrize("policy", ["strict", "max-drop", "slack", "refresh-accumulated-attention"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cap_as_long_as_the_text_reproduces_the_full_cache(family, policy):
    model, ids = build(family), token_ids(150)[None]
    spec = describe(model)
    if policy == "refresh-accumulated-attention" and not (spec.observable and spec.attention == "sdpa"):
        policy = "refresh-uniform"  # attention scorers are refused where sdpa is: see above
    options = {k: v for k, v in POLICIES[policy].items() if k != "window"}
    for cap, same in [(150, True), (149, False)]:
        cache = make_cache(model, options | {"cap": cap})
        logits = feed(model, cache, ids, chunk_sizes(cache, 150))
        with torch.no_grad():
            assert (worst(logits, model(ids).logits) < TOLERANCE) == same
        assert (cache.stats()["evicted"] == 0) == same
