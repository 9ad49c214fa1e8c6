"""Every family but those of `test_against_oracle`, on the oracle and on the release's own modelling code.

What is new with a family is where its layers differ: some slide, some do not rotate, some rotate otherwise, and some
models have their own idea of a mask. So each is fed in every way under policies that drop, pin, and pin by head.
"""

import pytest
import torch
from oracle.models import ENGINE, FAMILIES, HYBRID, WINDOW, build, token_ids
from oracle.network import Network
from streams import (
    TOLERANCE,
    chunk_sizes,
    feed,
    generate_text,
    make_cache,
    nll_of,
    oracle_run,
    shift_pinned_frame,
    small_policy,
)

from sinkstream.cache import StreamingCache, describe
from sinkstream.cache.rope import Rope
from sinkstream.cache.sliding import SlidingRing
from sinkstream.compat import with_cache
from sinkstream.engine import Engine

TOKENS = 168
FLOAT32_ANGLES = 3 * TOLERANCE  # nats; positions run up to 500 before they are set back, and angles are float32
NEW = [f for f in FAMILIES if f not in ENGINE]
BOUNDED = ("llama_dynamic", "phi3_longrope")
UNOBSERVABLE = ("falcon", "falcon_sequential", "falcon_grouped", "gemma2", "gpt_oss")  # attention that is not sdpa's
JOBS = [
    (family, *job)
    for family in NEW
    for job in (
        ("strict", "cache", "generate"),
        ("lazy", "cache", "chunks"),
        ("max-drop", "original", "chunks"),
        ("refresh-key-norm", "cache", "single"),
        ("refresh-window-attention", "cache", "chunks"),
    )
    if not (family in BOUNDED and job[1] == "original")
    and not (family in UNOBSERVABLE and job[0] == "refresh-window-attention")
]


def text(tokens: int, **more) -> torch.Tensor:
    """Token ids (tokens,) without 0, which generate() takes for padding."""
    return token_ids(tokens, **more).clamp(min=1)


def worst(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest absolute difference."""
    return (a - b).abs().max().item()


def fed_nll(model, cache: StreamingCache, ids: torch.Tensor, way: str = "chunks") -> torch.Tensor:
    """NLL of tokens 1 .. T - 1 of ids (T,), fed in one way; of those after a prompt of 60 through generate()."""
    if way == "generate":
        logits = generate_text(model, cache, ids[None], prompt=60)
        return -logits[0].double().log_softmax(-1).gather(1, ids[60:, None])[:, 0]
    return nll_of(feed(model, cache, ids[None], () if way == "single" else chunk_sizes(cache, len(ids))), ids[None])[0]


@pytest.mark.parametrize(("family", "policy", "positions", "way"), JOBS)
def test_every_family_agrees_with_the_oracle(family, policy, positions, way):
    model, ids, options = build(family), text(TOKENS), small_policy(policy)
    cache = make_cache(model, options, positions=positions)
    nll = fed_nll(model, cache, ids, way)
    expected = oracle_run(model, ids, options, positions).nll
    assert worst(nll, expected[-len(nll) :]) < TOLERANCE
    assert cache.stats()["events"] >= 6


@pytest.mark.parametrize("family", [f for f in NEW if f not in UNOBSERVABLE])
def test_a_block_that_crosses_prunes_agrees_with_the_oracle(family):
    model, ids, options = build(family), text(TOKENS), small_policy("strict")
    cache = make_cache(model, options, block_tokens=64)
    nll = nll_of(feed(model, cache, ids[None], [40, 64, 64]), ids[None])[0]
    cache.close()
    assert worst(nll, oracle_run(model, ids, options).nll) < TOLERANCE


@pytest.mark.parametrize("family", NEW)
def test_while_nothing_is_evicted_the_logits_are_those_of_the_release(family):
    model, ids = build(family), text(100)[None]
    with torch.no_grad():
        expected = model(ids).logits
    for cap, same in [(100, True), (99, False)]:
        cache = make_cache(model, {"sink": 4, "cap": cap})
        logits = feed(model, cache, ids, [7, 64, 1, 20])
        assert (worst(logits, expected) < TOLERANCE) == same
    cache = make_cache(model, {"sink": 4, "cap": 100})
    assert worst(feed(model, cache, ids, [100]), expected) < TOLERANCE, "in one forward, as a prompt comes"


@pytest.mark.parametrize("family", NEW)
def test_rows_of_a_batch_are_streams_of_their_own(family):
    model, ids, options = build(family), text(90, batch=2), small_policy("lazy")
    both = feed(model, make_cache(model, options), ids, [13, 50])
    for row in (0, 1):
        one = ids[row : row + 1]
        assert worst(feed(model, make_cache(model, options), one, [13, 50]), both[row : row + 1]) < TOLERANCE


@pytest.mark.parametrize("family", ["smollm3", "smollm3_sliding", "qwen3_sliding", "gemma3"])
def test_rebases_move_every_kind_of_layer(family):
    """The buffers wrap after 512 tokens; then the window, and what sliding layers hold, are set back."""
    model, ids, options = build(family), text(620), small_policy("lazy")
    cache = make_cache(model, options, rebase_at=0)
    nll = fed_nll(model, cache, ids)
    assert cache.stats()["rebases"] >= 1
    assert worst(nll, oracle_run(model, ids, options).nll) < FLOAT32_ANGLES


# ---- controls: the comparisons above must be able to fail ----


def test_a_rebase_that_leaves_sliding_layers_alone_would_show(monkeypatch):
    monkeypatch.setattr("sinkstream.cache.sliding.turned_back", lambda rope, keys, positions: keys)
    model, ids, options = build("gemma3"), text(620), small_policy("lazy")
    nll = fed_nll(model, make_cache(model, options, rebase_at=0), ids)
    assert worst(nll, oracle_run(model, ids, options).nll) > 1e-2


@pytest.mark.parametrize("family", NEW)
def test_a_pinned_frame_off_by_one_would_show(family, monkeypatch):
    shift_pinned_frame(monkeypatch)
    model, ids, options = build(family), text(90), small_policy("lazy")
    nll = fed_nll(model, make_cache(model, options), ids, "single")
    assert worst(nll, oracle_run(model, ids, options).nll) > 1e-2


def test_rotating_the_keys_of_a_layer_without_rotation_would_show():
    model, ids, options = build("smollm3"), text(TOKENS), small_policy("lazy")
    cache = make_cache(model, options)
    (rotary,) = cache.spec.frequencies.values()
    cache.stream.spec.__dict__["rope"] = Rope(rotary)
    assert worst(fed_nll(model, cache, ids), oracle_run(model, ids, options).nll) > 1e-2


@pytest.mark.parametrize("family", HYBRID)
def test_a_sliding_window_off_by_one_would_show(family, monkeypatch):
    model, ids, options = build(family), text(TOKENS), small_policy("lazy")
    monkeypatch.setattr(
        SlidingRing, "window", property(lambda ring: WINDOW - 1, lambda ring, window: None), raising=False
    )
    assert worst(fed_nll(model, make_cache(model, options), ids), oracle_run(model, ids, options).nll) > 1e-3


# ---- sliding layers ----


@pytest.mark.parametrize("family", HYBRID)
def test_sliding_layers_hold_their_window_and_full_layers_the_cap(family):
    model, ids = build(family), text(300)
    spec, cache = describe(model), make_cache(model, {"sink": 4, "cap": 32})
    feed(model, cache, ids[None], [20, 64, 64, 64])
    kinds = model.config.layer_types
    assert [kinds[i] for i in spec.full_layers] == ["full_attention"] * len(spec.full_layers)
    assert [kinds[i] for i in spec.sliding.layers] == ["sliding_attention"] * len(spec.sliding.layers)
    ring, sliding = cache.stream.ring, cache.stream.sliding
    assert len(ring.keys) + len(sliding.keys) == spec.layers and sliding.window == WINDOW
    assert ring.live == cache.kept_tokens == 32 and sliding.live <= WINDOW
    assert cache.stats()["bytes"] == ring.bytes + sliding.bytes + cache.stream.seen_ids.bytes
    before = cache.stats()["bytes"]
    feed(model, cache, text(900)[None], [64] * 12)
    assert cache.stats()["bytes"] == before, "constant"
    cache.reset()
    assert cache.stream.sliding is None and cache.stats()["bytes"] == 0


def test_a_forward_that_raises_leaves_sliding_layers_as_they_were():
    model, ids, options = build("gemma3"), text(TOKENS), small_policy("lazy")
    cache = make_cache(model, options)
    first = feed(model, cache, ids[None, :90], [50, 40])
    model.lm_head.register_forward_pre_hook(lambda module, args: (_ for _ in ()).throw(RuntimeError("stop")))
    with pytest.raises(RuntimeError, match="stop"):
        feed(model, cache, ids[None, 90:], [30])
    model.lm_head._forward_pre_hooks.clear()
    again = torch.cat([first, feed(model, cache, ids[None, 90:], [30, 7])], 1)
    assert worst(nll_of(again, ids[None])[0], oracle_run(model, ids, options).nll) < TOLERANCE


def test_a_bare_call_longer_than_a_hybrid_takes_is_refused_and_prefill_feeds_it():
    model, ids = build("gemma3"), text(900)[None]
    cache = make_cache(model, {"sink": 4, "cap": 400})
    most = cache.max_chunk_tokens()
    assert most < 900
    with pytest.raises(ValueError, match=f"at most {most} now"):
        model(ids, **with_cache(model, cache))
    with torch.no_grad():
        logits = cache.prefill(model, ids)
    other = make_cache(model, {"sink": 4, "cap": 400})
    assert worst(logits, feed(model, other, ids, [100] * 9)[:, -1]) < TOLERANCE


# ---- windows and lengths that bound the cap ----


WINDOWED = [("mistral", "sliding_window"), ("mixtral", "sliding_window"), ("phi3", "sliding_window")]


@pytest.mark.parametrize(("family", "option"), WINDOWED)
def test_a_cap_at_or_below_the_window_of_every_layer_makes_it_moot(family, option):
    model, ids = build(family, **{option: 36}), text(TOKENS)
    options = {"sink": 4, "window": 25, "compress_every": 8}
    assert make_cache(model, options).policy.peak == 36
    for way in ("single", "chunks"):
        nll = fed_nll(model, make_cache(model, options), ids, way)
        assert worst(nll, oracle_run(model, ids, options).nll) < TOLERANCE
    with pytest.raises(ValueError, match=r"sliding_window=36 in every layer: a cap at or below.*up to 37 entries"):
        make_cache(model, options | {"window": 26})
    with pytest.raises(ValueError, match=r"sliding_window=36 in every layer.*positions='original'"):
        make_cache(model, options, positions="original")


def test_a_qwen_whose_layers_all_slide_is_one_of_them():
    more = {"layer_types": ["sliding_attention"] * 2, "sliding_window": 36, "use_sliding_window": True}
    model, ids, options = build("qwen2", **more), text(TOKENS), {"sink": 4, "cap": 36}
    assert describe(model).every_window == 36 and describe(model).sliding is None
    nll = fed_nll(model, make_cache(model, options), ids)
    plain = build("qwen2")
    plain.load_state_dict(model.state_dict())
    assert worst(nll, oracle_run(plain, ids, {"sink": 4, "window": 32}).nll) < TOLERANCE
    with pytest.raises(ValueError, match="sliding_window=36 in every layer"):
        make_cache(model, {"sink": 4, "cap": 37})


LENGTH = 64
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0 + i / 10 for i in range(8)],
    "long_factor": [3.0] * 8,
    "original_max_position_embeddings": LENGTH,
}
SHORT = {
    "llama_dynamic": {"max_position_embeddings": LENGTH + 1},
    "phi3_longrope": {"original_max_position_embeddings": LENGTH, "rope_parameters": LONGROPE},
}


@pytest.mark.parametrize("family", SHORT)
@pytest.mark.parametrize("way", ["single", "chunks", "generate"])
def test_changing_frequencies_are_served_inside_the_original_length(family, way):
    model, ids, options = build(family, **SHORT[family]), text(300), {"sink": 4, "window": 45, "compress_every": 8}
    cache = make_cache(model, options)
    assert cache.policy.peak == LENGTH - LENGTH // 8 and cache.max_chunk_tokens() <= LENGTH
    before = {name: value.clone() for name, value in model.model.rotary_emb.named_buffers()}
    if way == "chunks":
        nll = nll_of(feed(model, cache, ids[None], cache.chunks(len(ids))), ids[None])[0]
    else:
        nll = fed_nll(model, cache, ids, way)
    assert cache.stats()["rebases"] > 10, "positions are set back before they leave the original length"
    assert worst(nll, oracle_run(model, ids, options).nll[-len(nll) :]) < TOLERANCE
    assert all(torch.equal(value, before[n]) for n, value in model.model.rotary_emb.named_buffers() if n in before)


@pytest.mark.parametrize("family", SHORT)
def test_a_cap_outside_the_original_length_is_refused_with_that_sentence(family):
    model = build(family, **SHORT[family])
    with pytest.raises(ValueError, match=r"constant inside its original length of 64 positions only.*at most 56"):
        make_cache(model, {"sink": 4, "window": 53})
    with pytest.raises(ValueError, match=r"original length of 64 positions only.*positions='original'"):
        make_cache(model, {"sink": 4, "window": 40}, positions="original")


@pytest.mark.parametrize("family", SHORT)
def test_a_long_forward_without_the_cache_between_two_with_it_changes_nothing(family):
    model, ids, options = build(family, **SHORT[family]), text(120), {"sink": 4, "window": 40}
    cache = make_cache(model, options)
    first = feed(model, cache, ids[None, :60], [20])
    with torch.no_grad():
        model(text(200)[None])  # changes the frequencies of the rotary module
    both = torch.cat([first, feed(model, cache, ids[None, 60:], [20])], 1)
    assert worst(nll_of(both, ids[None])[0], oracle_run(model, ids, options).nll) < TOLERANCE


def test_generate_keeps_the_cache_of_a_phi3_that_outgrows_its_original_length():
    """The release's own method drops a cache at that length: generate() would go on with another, unbounded one."""
    model, ids, options = build("phi3", original_max_position_embeddings=64), text(150), small_policy("lazy")
    cache = make_cache(model, options)
    nll = fed_nll(model, cache, ids, "generate")
    assert cache.seen_tokens == 149 and cache.kept_tokens <= cache.policy.peak
    assert worst(nll, oracle_run(model, ids, options).nll[-len(nll) :]) < TOLERANCE
    assert model.generate(ids[None, :20], max_new_tokens=60, do_sample=False).shape[1] == 80, "without a cache of ours"


# ---- attention ----


@pytest.mark.parametrize(("family", "why"), [("gemma2", "soft cap"), ("gpt_oss", "learned sinks")])
def test_attention_that_leaves_a_part_of_the_model_out_is_refused(family, why):
    model = build(family)
    model.config._attn_implementation_internal = "sdpa"
    with pytest.raises(ValueError, match=rf"attn_implementation='sdpa' is not supported.*{why}.*accepted: eager"):
        make_cache(model, {"sink": 4, "cap": 32})


@pytest.mark.parametrize("family", ["falcon", "falcon_grouped"])
def test_scorers_that_read_attention_are_refused_where_nobody_can_show_it(family):
    model = build(family)
    with pytest.raises(ValueError, match="scorers that read attention are not supported for falcon"):
        make_cache(model, small_policy("refresh-window-attention"))
    assert not model.transformer._forward_pre_hooks


@pytest.mark.parametrize("family", ["qwen3_sliding", "gemma3", "smollm3", "olmo3", "falcon", "mixtral"])
def test_eager_attention_agrees(family):
    model, ids, options = build(family, attn_implementation="eager"), text(TOKENS), small_policy("lazy")
    nll = fed_nll(model, make_cache(model, options), ids)
    assert worst(nll, oracle_run(model, ids, options).nll) < TOLERANCE


@pytest.mark.parametrize("family", ["qwen3_sliding", "gemma3", "smollm3", "olmo3"])
def test_attention_that_writes_the_entries_itself_agrees(family, monkeypatch):
    """What a compiled model does, here without compiling."""
    monkeypatch.setattr("sinkstream.cache.streaming.is_compiled", lambda model: True)
    model, ids, options = build(family), text(TOKENS), small_policy("lazy")
    cache = make_cache(model, options)
    assert cache.compiled
    nll = fed_nll(model, cache, ids)
    cache.close()
    assert worst(nll, oracle_run(model, ids, options).nll) < TOLERANCE


def test_a_compiled_falcon_is_refused(monkeypatch):
    monkeypatch.setattr("sinkstream.cache.streaming.is_compiled", lambda model: True)
    with pytest.raises(ValueError, match="a compiled falcon is not supported"):
        make_cache(build("falcon"), {"sink": 4, "cap": 32})


# ---- the engine ----


@pytest.mark.parametrize("family", NEW)
def test_the_engine_refuses_by_name_what_it_does_not_serve(family):
    model = build(family)
    with pytest.raises(ValueError, match=rf"{model.config.model_type}.* not served by the engine"):
        Engine(model, cap=32, backend="ring")


def test_the_engine_serves_a_mistral_whose_window_is_moot():
    model, ids = build("mistral", sliding_window=32), text(100)
    engine = Engine(model, cap=32, backend="ring")
    engine.prefill(ids[:70])
    nll = engine.score(ids[70:])
    expected = oracle_run(model, ids, {"sink": 4, "window": 28}).nll
    assert worst(nll.double(), expected[69:]) < TOLERANCE
    with pytest.raises(ValueError, match="sliding_window=32 in every layer"):
        Engine(build("mistral", sliding_window=32), cap=33, backend="ring")


def test_the_oracle_knows_which_layers_slide():
    assert all(any(Network(build(f)).windows) for f in HYBRID)
    assert not any(any(Network(build(f)).windows) for f in FAMILIES if f not in HYBRID)


@pytest.mark.parametrize("family", HYBRID)
@pytest.mark.parametrize("place", [3, 90])
def test_a_hybrid_models_cache_goes_on_from_a_file_and_in_a_fork(family, place, tmp_path):
    """Bit for bit, before sliding layers let entries go and after; a fork does not disturb what it was made of."""
    model, ids, path = build(family), text(TOKENS)[None], tmp_path / "stream.safetensors"
    cache = make_cache(model, small_policy("lazy"))
    feed(model, cache, ids[:, :place])
    cache.save(path)
    loaded, fork = StreamingCache.load(model, path), cache.fork()
    feed(model, fork, ids.flip(1)[:, :40])
    expected = feed(model, cache, ids[:, place:], [1, 1, 20, 30])
    assert torch.equal(feed(model, loaded, ids[:, place:], [1, 1, 20, 30]), expected)
    assert loaded.stats() == cache.stats()


def test_a_file_of_another_sliding_window_is_refused(tmp_path):
    model, path = build("gemma3"), tmp_path / "stream.safetensors"
    cache = make_cache(model, small_policy("lazy"))
    feed(model, cache, text(60)[None])
    cache.save(path)
    model.config.sliding_window = WINDOW + 1
    with pytest.raises(
        ValueError, match=f"another model: sliding_window={WINDOW}; accepted: sliding_window={WINDOW + 1}"
    ):
        StreamingCache.load(model, path)


@pytest.mark.parametrize("family", HYBRID)
def test_rows_of_a_hybrid_model_can_be_selected(family):
    """In another order, and one alone: what sliding layers hold goes with them."""
    model, first, second = build(family), text(TOKENS), text(TOKENS).flip(0)
    options = small_policy("lazy")
    cache = make_cache(model, options)
    feed(model, cache, torch.stack([first, second])[:, :90], [45, 45])
    alone = cache.fork()
    cache.batch_select_indices(torch.tensor([1, 0]))
    alone.batch_select_indices(torch.tensor([1]))
    swapped = feed(model, cache, torch.stack([second, first])[:, 90:], [30, 30])
    expected = feed(model, make_cache(model, options), second[None], [45, 45, 30, 30])[:, 90:]
    assert torch.allclose(swapped[:1], expected, atol=1e-4)
    assert torch.allclose(feed(model, alone, second[None, 90:], [30, 30]), expected, atol=1e-4)
    assert not torch.allclose(swapped[1:], expected, atol=1e-2)
