"""Scoring in blocks: two frames in one attention, speculative blocks, bounded memory, and a model left as it was.

Step by step is the reference here; `test_cache_oracle` compares that with the brute-force oracle.
"""

import pytest
import torch
from oracle.models import ENGINE, build, token_ids
from streams import (
    TOLERANCE,
    feed,
    make_cache,
    nll_of,
    one_too_far,
    oracle_run,
    root_mean_square,
    rounding_bound,
    small_policy,
)

from sinkstream.cache import StreamingCache
from sinkstream.cache.attention import SINKSTREAM_SDPA
from sinkstream.cache.chunks import PinnedCopies
from sinkstream.compat import with_cache
from sinkstream.kernels import attention_prefill
from sinkstream.kernels.band import Band, Columns
from sinkstream.policies import PRESETS, EvictionPolicy

TOKENS = 160
BLOCKS = (7, 64, 130)  # the last is several times the cap
PLANNED = [name for name in PRESETS if EvictionPolicy.build(window=20, **PRESETS[name]()).plan_known]
ADAPTIVE = [name for name in PRESETS if "adaptive" in PRESETS[name]()]
EVERY_FAMILY = ("strict", "max-drop")
CASES = [
    (policy, ENGINE[(i + j) % len(ENGINE)])
    for i, policy in enumerate(PRESETS)
    for j in range(0, len(ENGINE), 1 if policy in EVERY_FAMILY else 4)
]
MIXED = small_policy("adaptive-top1") | {"refresh": 6, "scorer": "window-attention", "observation": 5}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles in a block, the last one shorter."""
    monkeypatch.setattr(attention_prefill, "TILE", {"cpu": 24})


def block_cache(model, options: dict, block_tokens: int, **more) -> StreamingCache:
    cache = make_cache(model, options, block_tokens=block_tokens, **more)
    cache.stream.speculative = True
    return cache


@torch.no_grad()
def score(model, cache: StreamingCache, ids: torch.Tensor, block_tokens: int) -> tuple[torch.Tensor, list, list[int]]:
    """NLL (T - 1,), steps of all tokens and the length of every forward."""
    logits, steps, sizes, fed = [], [], [], 0
    for size in cache.chunks(len(ids), block_tokens):
        out = model(ids[None, fed : fed + size], **with_cache(model, cache)).logits
        sizes.append(size)
        steps += cache.last_steps
        logits.append(out[:, : len(cache.last_steps)])
        fed += len(cache.last_steps)
    return nll_of(torch.cat(logits, 1), ids[None])[0], steps, sizes


def by_steps(model, options: dict, ids: torch.Tensor, **more) -> tuple[torch.Tensor, list]:
    """The same, token by token."""
    steps = []
    cache = make_cache(model, options, **more)
    logits = feed(model, cache, ids[None], seen=lambda c: steps.extend(c.last_steps))
    return nll_of(logits, ids[None])[0], steps


def worst(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


# ---- exact ----


@pytest.mark.parametrize(("policy", "family"), CASES)
def test_blocks_of_every_size_are_the_steps(policy, family):
    model, ids, options = build(family), token_ids(TOKENS), small_policy(policy)
    expected, steps = by_steps(model, options, ids)
    assert sum(s.event for s in steps) >= 4
    for block_tokens in BLOCKS:
        cache = block_cache(model, options, block_tokens)
        nll, found, _ = score(model, cache, ids, block_tokens)
        assert worst(nll, expected) < TOLERANCE, block_tokens
        assert found == steps


@pytest.mark.parametrize("policy", PLANNED)
@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_blocks_at_original_positions(policy, family):
    model, ids, options = build(family), token_ids(TOKENS), small_policy(policy)
    expected, _ = by_steps(model, options, ids, positions="original")
    cache = block_cache(model, options, 160, positions="original")
    assert worst(score(model, cache, ids, 160)[0], expected) < TOLERANCE
    inside, _ = by_steps(model, options, ids)
    assert options["sink"] == 0 or worst(inside, expected) > 1e-2


@pytest.mark.parametrize(
    "options", [small_policy("strict"), small_policy("max-drop"), MIXED], ids=["strict", "max-drop", "mixed"]
)
def test_blocks_agree_with_the_oracle(options):
    model, ids = build("llama"), token_ids(TOKENS)
    expected = oracle_run(model, ids, options).nll
    assert worst(score(model, block_cache(model, options, 160), ids, 160)[0], expected) < TOLERANCE


def test_a_frame_off_by_one_would_show(monkeypatch):
    model, ids, options = build("llama"), token_ids(TOKENS), small_policy("strict")
    expected, _ = by_steps(model, options, ids)
    made = Band.__init__
    wrong = {
        "turn": lambda first, turn: (first, turn + 1),
        "no turn": lambda first, turn: (first, None),
        "first": lambda first, turn: (first + 1, turn),
    }
    for name, change in wrong.items():

        def off_by_one(band, first, turn, *more, change=change, **named):
            made(band, *change(first, turn), *more, **named)

        monkeypatch.setattr(Band, "__init__", off_by_one)
        assert worst(score(model, block_cache(model, options, 64), ids, 64)[0], expected) > 1e-2, name


def test_rebases_in_blocks_change_nothing():
    model, ids, options = build("gpt_neox", layers=1), token_ids(1200), small_policy("max-drop")
    expected, _ = by_steps(model, options, ids)
    cache = block_cache(model, options, 160, rebase_at=100)
    assert worst(score(model, cache, ids, 160)[0], expected) < TOLERANCE
    assert cache.stats()["rebases"] >= 2


def test_rows_of_a_batch_in_blocks():
    model, ids, options = build("qwen2"), token_ids(120, batch=3), small_policy("lazy")
    cache = block_cache(model, options, 120)
    with torch.no_grad():
        logits = model(ids, **with_cache(model, cache)).logits
    for row, found in zip(ids, nll_of(logits, ids), strict=True):
        assert worst(found, by_steps(model, options, row)[0]) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_as_exact_in_blocks_as_in_steps(dtype):
    """Token by token against float64 on the same weights."""
    model, ids, options = build("llama", dtype), token_ids(TOKENS), small_policy("strict")
    exact = oracle_run(model, ids, options).nll
    stepped = by_steps(model, options, ids)[0] - exact
    blocks = score(model, block_cache(model, options, 160), ids, 160)[0]
    assert worst(blocks, exact) < rounding_bound(model)
    assert root_mean_square(blocks - exact) < 2 * root_mean_square(stepped), "not one bit more"
    wrong = oracle_run(model, ids, options, one_too_far).nll
    assert worst(blocks, wrong) > 2 * rounding_bound(model), "control: sinks that are rotated one too far"


# ---- adaptive: speculate, keep up to the event ----


@pytest.mark.parametrize("policy", ADAPTIVE)
def test_speculation_takes_about_one_forward_an_event(policy):
    model, ids, options = build("llama"), token_ids(400), small_policy(policy)
    cache = block_cache(model, options, 64)
    _, steps, sizes = score(model, cache, ids, 64)
    cautious = block_cache(model, options, 64)
    cautious.stream.speculative = False
    _, same, more_sizes = score(model, cautious, ids, 64)
    events = sum(s.event for s in steps)
    assert steps == same and events >= 20
    assert len(sizes) <= events + 5 < len(more_sizes) / 2
    assert sum(sizes) > len(ids) == sum(more_sizes), "some tokens are fed twice"


@pytest.mark.parametrize("policy", ADAPTIVE)
def test_a_prompt_takes_about_one_forward_an_event(policy):
    """Speculation is the prompt's own; a call that is not a prompt keeps all of its tokens, as before."""
    model, ids, options, forwards = build("llama"), token_ids(400), small_policy(policy), []
    expected, steps = by_steps(model, options, ids)
    cache = make_cache(model, options)
    handle = model.register_forward_hook(lambda *_: forwards.append(cache.seen_tokens))
    logits = cache.prefill(model, ids[None, :399])
    handle.remove()
    assert (nll_of(torch.stack([logits, logits], 1), ids[None, 398:])[0] - expected[-1]).abs() < TOLERANCE
    events = sum(step.event for step in steps[:399])
    assert cache.stats()["events"] == events >= 20 and len(forwards) <= events + 5
    assert not cache.stream.speculative


def test_what_attention_scorers_need_follows_the_kept_tokens():
    """Queries of tokens that are let go must not vote; accumulated attention is never speculated with."""
    model, ids = build("llama"), token_ids(TOKENS)
    accumulated = small_policy("adaptive-top1") | {"refresh": 6, "scorer": "accumulated-attention"}
    for options, speculates in ((MIXED, True), (accumulated, False)):
        expected, steps = by_steps(model, options, ids)
        cache = block_cache(model, options, 64)
        nll, found, sizes = score(model, cache, ids, 64)
        assert worst(nll, expected) < TOLERANCE and found == steps
        assert (sum(sizes) > len(ids)) == speculates


# ---- bounded ----


def test_memory_is_bounded_by_the_block_and_not_by_the_prunes(monkeypatch):
    model, ids, block_tokens = build("llama"), token_ids(600), 90
    columns, rows = [], []
    window = Columns.window
    monkeypatch.setattr(Columns, "window", lambda *a: columns.append(a[3] - a[2]) or window(*a))
    monkeypatch.setattr(PinnedCopies, "extend", lambda *a: pytest.fail("pinned keys were copied"))
    handle = model.register_forward_hook(lambda m, a, out: rows.append(out.logits.shape[1]))
    for policy in ("strict", "lazy"):
        cache = block_cache(model, small_policy(policy), block_tokens)
        score(model, cache, ids, block_tokens)
        assert cache.stream.ring.capacity == max(512, cache.policy.peak + block_tokens)
    handle.remove()
    assert max(rows) == block_tokens
    assert 24 < max(columns) <= 24 + cache.policy.peak, "of a tile of 24 queries"


def test_the_buffer_has_room_for_one_block():
    model = build("llama")
    cache = block_cache(model, small_policy("strict"), 2000)
    score(model, cache, token_ids(2100), 2000)
    assert cache.stream.ring.capacity == 2000 + cache.policy.peak


# ---- the model is left as it was ----


def test_the_attention_function_goes_with_the_cache():
    model, ids, options = build("llama"), token_ids(TOKENS), small_policy("strict")
    expected = score(model, make_cache(model, options), ids, 64)[0]
    assert model.config._attn_implementation == "sdpa"
    cache = block_cache(model, options, 64)
    assert model.config._attn_implementation == SINKSTREAM_SDPA
    with torch.no_grad():
        others = model(ids[None]).logits
    assert worst(score(model, cache, ids, 64)[0], expected) < TOLERANCE
    cache.close()
    assert model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        assert worst(model(ids[None]).logits, others) < TOLERANCE, "a call without the cache is sdpa's own"


def test_eager_models_stay_eager():
    model, ids, options = build("qwen3"), token_ids(TOKENS), small_policy("strict")
    model.set_attn_implementation("eager")
    expected, _ = by_steps(model, options, ids)
    cache = block_cache(model, options, 64)
    assert model.config._attn_implementation == "eager"
    assert worst(score(model, cache, ids, 64)[0], expected) < TOLERANCE
