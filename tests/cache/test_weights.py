"""Weights that cannot compute, or that make entries of several dtypes, are refused by name; other mixtures work."""

import pytest
import torch
from oracle.models import build, token_ids
from streams import TOLERANCE, feed, make_cache, small_policy

from sinkstream.cache import StreamingCache

ids, POLICY = token_ids(60)[None], small_policy("strict")
ATTENTION = "model.layers.1.self_attn"


def cast(model, path, dtype):
    model.get_submodule(path).to(dtype)
    return model


def llama_on_meta():
    with torch.device("meta"):
        return build("llama").to("meta")


REFUSED = {
    "all on meta": (llama_on_meta, r"model\.embed_tokens\.weight lies on meta.*accepted: weights that are loaded"),
    "values on meta": (
        lambda: cast(build("llama"), f"{ATTENTION}.v_proj", "meta"),
        rf"{ATTENTION}\.v_proj\.weight lies on meta",
    ),
    "frequencies on meta": (
        lambda: cast(build("llama"), "model.rotary_emb", "meta"),
        r"inv_freq of the model's rotary module lies on meta.*not offloaded",
    ),
    "float8": (
        lambda: build("llama").to(torch.float8_e4m3fn),
        r"model\.embed_tokens\.weight is torch\.float8_e4m3fn.*accepted: torch\.float16, torch\.bfloat16",
    ),
    "one float8 projection": (
        lambda: cast(build("gpt_neox"), "gpt_neox.layers.1.mlp.dense_4h_to_h", torch.float8_e5m2),
        r"gpt_neox\.layers\.1\.mlp\.dense_4h_to_h\.weight is torch\.float8_e5m2",
    ),
    "attention of two dtypes": (
        lambda: cast(build("llama"), ATTENTION, torch.bfloat16),
        rf"layers\.0\.self_attn\.k_proj\.weight is torch\.float32 and {ATTENTION}\.k_proj\.weight is torch\.bfloat16"
        ".*accepted: one dtype",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_weights_that_cannot_stream_are_refused_when_the_cache_is_made(case):
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        StreamingCache.for_model(make(), **POLICY)


@pytest.mark.parametrize("path", ["model.embed_tokens", "model.norm", "model.layers.0.input_layernorm"])
@torch.no_grad()
def test_mixtures_that_transformers_runs_have_entries_of_the_projections_dtype(path):
    model = cast(build("llama"), path, torch.bfloat16)
    wanted, cache = model(ids).logits, make_cache(model, POLICY | {"window": 80})
    torch.testing.assert_close(feed(model, cache, ids), wanted, rtol=0, atol=TOLERANCE)
    assert cache.stream.ring.keys.dtype == torch.float32
    evicting = feed(model, make_cache(model, POLICY), ids)
    assert not torch.equal(evicting, wanted) and (evicting - wanted)[:, :24].abs().max() < TOLERANCE


def test_float32_norms_in_a_bfloat16_model_work():
    """gemma's norms give the dtype of their input back."""
    model = build("gemma").bfloat16()
    plain = feed(model, make_cache(model, POLICY), ids)
    for name, module in model.named_modules():
        if "norm" in name:
            module.float()
    cache = make_cache(model, POLICY)
    found = feed(model, cache, ids)
    assert cache.stream.ring.keys.dtype == torch.bfloat16 and found.dtype == plain.dtype
    torch.testing.assert_close(found, plain, rtol=0, atol=0)  # all that float32 norms of rounded weights can differ by


def test_attention_of_two_dtypes_works_under_autocast():
    model = cast(build("llama"), ATTENTION, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        logits = feed(model, make_cache(model, POLICY), ids)
    assert logits.isfinite().all()


class Away:
    """What an offload does: weights on meta at rest, brought before a forward and put away behind it."""

    def __init__(self, module):
        self.weight = module.weight
        module.weight = torch.nn.Parameter(self.weight.to("meta"), requires_grad=False)
        module.register_forward_pre_hook(lambda m, args: setattr(m, "weight", self.weight))
        module.register_forward_hook(
            lambda m, args, out: setattr(m, "weight", torch.nn.Parameter(self.weight.to("meta"), requires_grad=False))
        )


def test_weights_that_a_hook_brings_are_left_to_it():
    model = build("llama")
    wanted = feed(model, make_cache(model, POLICY), ids)
    Away(model.get_submodule(f"{ATTENTION}.k_proj"))
    assert model.get_submodule(f"{ATTENTION}.k_proj").weight.is_meta
    torch.testing.assert_close(feed(model, make_cache(model, POLICY), ids), wanted, rtol=0, atol=TOLERANCE)


def test_a_hook_that_makes_keys_of_another_dtype_is_refused_with_the_layer():
    model = build("llama")
    for name in ("k_proj", "v_proj", "q_proj"):
        model.get_submodule(f"{ATTENTION}.{name}").register_forward_hook(lambda m, args, out: out.double())
    cache = make_cache(model, POLICY)
    with pytest.raises(
        ValueError, match=r"layer 1 makes keys of torch\.float64, and the layers before it torch\.float32"
    ):
        feed(model, cache, ids)
    assert cache.seen_tokens == 0
