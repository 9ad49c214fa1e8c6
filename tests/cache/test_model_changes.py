"""A model that changes while a cache of it lives: right as before, or refused by name, and never silently wrong."""

import pytest
import torch
from oracle.models import build, token_ids
from streams import TOLERANCE, feed, make_cache, small_policy

from sinkstream.compat import with_cache

ids = token_ids(80)[None]


@pytest.mark.parametrize("other", ["eager", "flex_attention"])
@torch.no_grad()
def test_another_attention_is_refused_and_going_back_is_right(other):
    model, options = build("llama"), small_policy("strict")
    wanted = feed(model, make_cache(model, options), ids)
    cache = make_cache(model, options)
    start = feed(model, cache, ids[:, :40])
    model.set_attn_implementation(other)
    with pytest.raises(ValueError, match=f"changed from 'sdpa' to '{other}' after the cache was made"):
        feed(model, cache, ids[:, 40:], [30])
    model.set_attn_implementation("sdpa")
    found = torch.cat([start, feed(model, cache, ids[:, 40:], [30])], 1)
    torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_another_dtype_is_refused_and_going_back_is_right():
    model, options = build("llama"), small_policy("strict")
    wanted = feed(model, make_cache(model, options), ids)
    cache = make_cache(model, options)
    start = feed(model, cache, ids[:, :40])
    kept = [parameter.data for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    with pytest.raises(ValueError, match=r"changed from torch.float32 to torch.bfloat16 after the cache was made"):
        feed(model, cache, ids[:, 40:])
    for parameter, data in zip(model.parameters(), kept):
        parameter.data = data
    found = torch.cat([start, feed(model, cache, ids[:, 40:])], 1)
    torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_rotary_frequencies_that_were_rounded_are_refused():
    model, options = build("llama"), small_policy("strict")
    wanted = feed(model, make_cache(model, options), ids)
    cache, exact = make_cache(model, options), model.model.rotary_emb.inv_freq.clone()
    feed(model, cache, ids[:, :40])
    model.bfloat16().float()
    with pytest.raises(ValueError, match="rotary frequencies changed"):
        feed(model, cache, ids[:, 40:])
    model = build("llama")
    assert not torch.equal(model.model.rotary_emb.inv_freq, exact.bfloat16().float()), "they are rounded by the cast"
    cache = make_cache(model, options)
    start = feed(model, cache, ids[:, :40])
    model.model.rotary_emb.inv_freq = exact  # as after a move to another device and back
    found = torch.cat([start, feed(model, cache, ids[:, 40:])], 1)
    torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", ["llama", "gpt_oss"])  # gpt_oss: eager attention, in which the mask would not fit
def test_layers_that_pass_the_cache_over_are_an_error(family):
    """Gradient checkpointing in training mode takes the cache away from every layer, and says so in a log line only."""
    model, options = build(family), small_policy("strict")
    with torch.no_grad():
        wanted = feed(model, make_cache(model, options), ids)
    cache = make_cache(model, options)
    model.gradient_checkpointing_enable()
    model.train()
    for tokens in (8, 60):
        with pytest.raises(
            ValueError, match=r"gradient checkpointing pass no cache on.*gradient_checkpointing_disable"
        ):
            model(ids[:, :tokens], **with_cache(model, cache))
    assert cache.seen_tokens == 0
    model.eval()
    torch.testing.assert_close(feed(model, cache, ids), wanted, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_training_mode_and_autocast_are_no_obstacle():
    model, options = build("llama"), small_policy("strict")
    wanted = feed(model, make_cache(model, options), ids)
    model.train()
    torch.testing.assert_close(feed(model, make_cache(model, options), ids), wanted, rtol=0, atol=TOLERANCE)
    with torch.autocast("cpu", torch.bfloat16):
        rough = feed(model, make_cache(model, options), ids)
    assert 0 < (rough.float() - wanted).abs().mean() < 0.5


@pytest.mark.parametrize("assign", [False, True])
@torch.no_grad()
def test_weights_that_are_loaded_under_a_stream_are_refused_until_reset(assign):
    model, other, options = build("llama"), build("llama", seed=5), small_policy("strict")
    wanted, wanted_other = (feed(m, make_cache(m, options), ids) for m in (model, other))
    cache, fresh = make_cache(model, options), make_cache(model, options)
    start, first = feed(model, cache, ids[:, :40]), model.state_dict()
    copies = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    model.load_state_dict(copies, assign=assign)
    with pytest.raises(ValueError, match=r"weights were loaded into the model .* cache.reset\(\)"):
        feed(model, cache, ids[:, 40:])
    assert cache.seen_tokens == 40
    torch.testing.assert_close(feed(model, fresh, ids), wanted_other, rtol=0, atol=TOLERANCE)
    if assign:
        model.load_state_dict(first, assign=True)
        found = torch.cat([start, feed(model, cache, ids[:, 40:])], 1)
        torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE)
        model.load_state_dict(copies, assign=True)
    cache.reset()
    torch.testing.assert_close(feed(model, cache, ids), wanted_other, rtol=0, atol=TOLERANCE)
