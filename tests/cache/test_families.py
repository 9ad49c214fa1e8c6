"""Which models the cache serves, what it reads of them, and which it refuses, each by name and reason."""

import re
import sys
from types import SimpleNamespace

import pytest
import torch
from oracle.models import FAMILIES as ORACLE_FAMILIES
from oracle.models import MAX_POSITIONS, build, token_ids
from oracle.rotation import FLOAT32_POWER, rotation_of_layer
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BloomConfig,
    BloomForCausalLM,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PersimmonConfig,
    PersimmonForCausalLM,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from sinkstream.cache import FAMILIES, FAMILY, ROPE_TYPES, UNSERVED, StreamingCache, describe
from sinkstream.compat import cache_argument

TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
LATENT = {
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 2,
}
LONGROPE = {
    "rope_type": "longrope",
    "factor": 2.0,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 32,
}


def llama(**rope):
    """A tiny Llama with other rope parameters."""
    return LlamaForCausalLM(LlamaConfig(**TINY, rope_parameters={"rope_theta": 1e4, **rope} if rope else None))


def tiny(model_class, config_class, **options):
    """A function that makes a tiny model."""
    return lambda: model_class(config_class(**{**TINY, **options}))


# ---- what is read of a supported model ----


@pytest.mark.parametrize("family", ORACLE_FAMILIES)
def test_a_supported_model_is_described(family):
    model = build(family)
    spec = describe(model)
    config = model.config
    assert spec.family == config.model_type and spec.family in FAMILIES
    assert (spec.layers, spec.query_heads) == (config.num_hidden_layers, config.num_attention_heads)
    assert spec.trained_positions == MAX_POSITIONS and spec.dtype == torch.float32
    assert spec.attention == ("eager" if family in ("gemma2", "gpt_oss") else "sdpa")
    keys = {}
    with torch.no_grad():
        past = getattr(model(token_ids(3)[None]), cache_argument(model))
    for i, layer in enumerate(past.layers):
        keys[i] = layer.keys.shape
    assert keys == {i: (1, spec.kv_heads, 3, spec.head_dim) for i in range(spec.layers)}
    rotations = [rotation_of_layer(config, i)[0] for i in range(spec.layers)]
    for rope, layers in (
        (spec.rope, spec.full_layers),
        *([(spec.sliding.rope, spec.sliding.layers)] if spec.sliding else []),
    ):
        for row, layer in enumerate(layers):
            expected = torch.zeros(rope.rotary_dim // 2).double() if rotations[layer] is None else rotations[layer]
            torch.testing.assert_close(rope.layer(row).inv_freq, expected, rtol=FLOAT32_POWER, atol=0)
    assert spec.decoder is describe(spec.decoder).decoder


def test_every_family_and_rope_type_is_met_by_the_oracle():
    configs = [build(family).config for family in ORACLE_FAMILIES]
    assert {c.model_type for c in configs} == set(FAMILIES)
    ropes = [c.rope_parameters for c in configs]
    kinds = [rope.get("full_attention", rope)["rope_type"] for rope in ropes]
    assert set(kinds) == set(ROPE_TYPES)


@pytest.mark.parametrize(("family", "dtype"), [("gpt_neox", torch.float16), ("qwen3", torch.bfloat16)])
def test_half_precision_is_kept(family, dtype):
    model = build(family, dtype=dtype)
    cache = StreamingCache.for_model(model, cap=40)
    with torch.no_grad():
        logits = cache.prefill(model, token_ids(200)[None])
    assert cache.stream.ring.keys.dtype == cache.stream.ring.values.dtype == dtype and logits.isfinite().all()
    assert cache.stream.ring.pinned_keys.dtype == torch.float32


# ---- what is refused ----

REFUSED = {
    "longrope": (lambda: llama(**LONGROPE), "constant inside its original length of 32 positions only"),
    "mistral with a sliding window": (
        tiny(MistralForCausalLM, MistralConfig, sliding_window=16),
        "mistral with sliding_window=16 in every layer: a cap at or below the window makes the window moot",
    ),
    "gemma2 that looks ahead": (
        tiny(Gemma2ForCausalLM, Gemma2Config, head_dim=16, use_bidirectional_attention=True),
        "'gemma2' with use_bidirectional_attention=True",
    ),
    "gemma3 that looks ahead": (
        tiny(Gemma3ForCausalLM, Gemma3TextConfig, head_dim=16, use_bidirectional_attention=True),
        "'gemma3_text' with use_bidirectional_attention=True",
    ),
    "falcon with alibi": (
        lambda: FalconForCausalLM(
            FalconConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, alibi=True)
        ),
        "'falcon' with alibi=True",
    ),
    "deepseek v2": (tiny(DeepseekV2ForCausalLM, DeepseekV2Config, **LATENT), "'deepseek_v2'.*latent attention"),
    "deepseek v3": (tiny(DeepseekV3ForCausalLM, DeepseekV3Config, **LATENT), "'deepseek_v3'.*latent attention"),
    "bloom": (lambda: BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=32, n_layer=1, n_head=2)), "ALiBi"),
    "t5": (
        lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        ),
        "'t5' is an encoder-decoder",
    ),
    "bart": (
        lambda: BartForConditionalGeneration(
            BartConfig(
                vocab_size=97,
                d_model=32,
                encoder_layers=1,
                decoder_layers=1,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
            )
        ),
        "'bart' is an encoder-decoder",
    ),
    "gpt2": (
        lambda: GPT2LMHeadModel(
            GPT2Config(vocab_size=97, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
        ),
        "'gpt2'.*learned absolute positions",
    ),
    "a family on no list": (
        tiny(PersimmonForCausalLM, PersimmonConfig),
        "'persimmon' is not supported; accepted: falcon, gemma, ",
    ),
    "no model at all": (lambda: "gpt-neox", "model=str is not accepted"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_unsupported_model_is_refused_with_its_reason(name):
    make, reason = REFUSED[name]
    model = make()
    with pytest.raises(ValueError, match=reason) as caught:
        StreamingCache.for_model(model, cap=32)
    assert "accepted: " in str(caught.value)
    assert not getattr(model, "_forward_pre_hooks", None)


@pytest.mark.parametrize("name", UNSERVED)
def test_every_unserved_family_is_refused_with_its_reason(name):
    config = PreTrainedConfig()
    config.model_type = name
    with pytest.raises(
        ValueError, match=re.escape(f"model type {name!r} is not supported ({UNSERVED[name]}); accepted: ")
    ):
        describe(SimpleNamespace(config=config))
    assert name not in FAMILY, "either served or not"


def test_every_family_has_a_file_of_its_own_and_says_what_it_is():
    files = [sys.modules[FAMILY[name].__module__].__file__ for name in FAMILY]
    assert len(set(files)) == len(FAMILY)
    assert all(FAMILY.summary(name) for name in FAMILY)


def test_layer_types_that_nobody_knows_are_refused():
    model = build("qwen2_sliding")
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ValueError, match="'qwen2' with layer types linear_attention is not supported"):
        describe(model)
    model.config.layer_types, model.config.sliding_window = ["full_attention", "sliding_attention"], None
    with pytest.raises(ValueError, match="sliding_attention layers and sliding_window=None"):
        describe(model)


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "flex_attention"])
def test_an_attention_implementation_that_is_not_listed_is_refused(name):
    model = llama()
    model.config._attn_implementation_internal = name  # set_attn_implementation asks for the package first
    with pytest.raises(ValueError, match=f"attn_implementation='{name}'.*accepted: sdpa, eager"):
        StreamingCache.for_model(model, cap=32)


def test_a_sliding_window_that_is_switched_off_is_no_obstacle():
    model = tiny(Qwen2ForCausalLM, Qwen2Config, use_sliding_window=False, sliding_window=16)()
    assert describe(model).family == "qwen2"


# ---- caps above the trained positions ----


@pytest.mark.parametrize(
    ("options", "peak"),
    [
        ({"cap": 65}, 65),
        ({"window": 61}, 65),
        ({"window": 54, "compress_every": 8}, 65),
        ({"cap": 58, "cap_accounting": "published", "compress_every": 8}, 65),
    ],
    ids=str,
)
def test_a_cache_that_outgrows_the_trained_positions_is_refused_unless_asked_for(options, peak):
    model = llama()
    with pytest.raises(ValueError, match=rf"up to {peak} entries.*trained on 64 positions.*allow_untrained_positions"):
        StreamingCache.for_model(model, **options)
    cache = StreamingCache.for_model(model, **options, allow_untrained_positions=True)
    assert cache.policy.peak == peak


def test_the_largest_window_that_is_named_is_accepted():
    model = llama()
    assert StreamingCache.for_model(model, cap=64).policy.peak == 64
    with pytest.raises(ValueError, match="window of at most 53"):
        StreamingCache.for_model(model, window=80, compress_every=8)
    assert StreamingCache.for_model(model, window=53, compress_every=8).policy.peak == 64


# ---- other wrong arguments ----


def test_positions_and_policies_that_do_not_exist_are_refused():
    model = llama()
    with pytest.raises(ValueError, match=r"positions='rotated'.*accepted: cache, original"):
        StreamingCache.for_model(model, cap=32, positions="rotated")
    with pytest.raises(ValueError, match="policy='strict' is not accepted; accepted: an EvictionPolicy"):
        StreamingCache.for_model(model, policy="strict")
    policy = StreamingCache.for_model(model, cap=32).policy
    with pytest.raises(ValueError, match="policy and cap exclude each other"):
        StreamingCache.for_model(model, policy=policy, cap=32)
    assert StreamingCache.for_model(model, policy=policy).policy is policy
