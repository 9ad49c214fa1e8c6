"""Releases of transformers: a cache is found by what it is, an untested release is told, a renamed argument refused."""

import inspect
import pickle
import threading
import warnings
from contextlib import contextmanager

import pytest
import torch
import transformers
from oracle.models import VOCAB, build, token_ids
from streams import feed, make_cache, small_policy
from torch import nn
from transformers import DynamicCache

from sinkstream import compat
from sinkstream.compat import CACHE_NAMES, cache_argument, named_arguments, with_cache

ids = token_ids(60)[None]
PAD = next(t for t in range(VOCAB) if t not in ids)


def by_name(name: str):
    return lambda model, part, cache: model(part, **{name: cache})


def by_position(model, part, cache):
    """As many positional arguments as it takes to reach the cache: their order differs between families."""
    names = compat.parameters(model)
    given = {"input_ids": part, cache_argument(model): cache}
    return model(*(given.get(name) for name in names[: names.index(cache_argument(model)) + 1]))


CALLS = {**{name: by_name(name) for name in CACHE_NAMES}, "position": by_position}


@pytest.mark.filterwarnings("ignore:`past_key_values`:FutureWarning")
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@torch.no_grad()
def test_a_cache_is_found_by_what_it_is(family, call):
    model, options = build(family), small_policy("strict")
    wanted = feed(model, make_cache(model, options), ids)
    cache = make_cache(model, options)
    found = torch.cat([CALLS[call](model, part, cache).logits for part in ids.split(1, 1)], 1)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    assert cache.seen_tokens == 60 and cache.kept_tokens == 24
    alone = torch.cat([model(part).logits for part in ids.split(1, 1)], 1)
    assert (alone - wanted).abs().max() > 1e-2, "a cache that is not found would show"


@torch.no_grad()
def test_arguments_by_position_are_checked_like_those_by_name():
    model = build("llama")
    cache = make_cache(model, small_policy("strict"))
    mask = torch.ones(1, 5, dtype=torch.int64)
    model(ids[:, :5], mask, **with_cache(model, cache))
    with pytest.raises(ValueError, match="counts 0 tokens of row 0"):
        model(ids[:, 5:10], torch.cat([0 * mask, mask], 1), **with_cache(model, cache))
    with pytest.raises(TypeError, match="multiple values for argument 'input_ids'"):
        model(ids[:, 5:10], input_ids=ids[:, 5:10], **with_cache(model, cache))
    with pytest.raises(TypeError, match="30 positional arguments"):
        model(*[None] * 29, cache)
    assert cache.seen_tokens == 5


def test_another_cache_beside_ours_is_left_for_the_model_to_refuse():
    model, other = build("llama"), DynamicCache()
    cache = make_cache(model, small_policy("strict"))
    wrong = next(name for name in CACHE_NAMES if name != cache_argument(model))
    named = named_arguments(model, (ids,), {wrong: other, cache_argument(model): cache}, cache)
    assert named[wrong] is other and named[cache_argument(model)] is cache
    assert named_arguments(model, (ids,), {wrong: cache}, cache) == {"input_ids": ids} | with_cache(model, cache)


def test_generate_warns_of_nothing_under_the_name_of_the_release(recwarn):
    model = build("llama")
    cache = make_cache(model, small_policy("lazy"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        model.generate(ids, **with_cache(model, cache), max_new_tokens=4, do_sample=False, pad_token_id=PAD)
        model(ids[:, :1], **with_cache(model, cache))
        cache.prefill(model, ids)
    assert not [w for w in recwarn if issubclass(w.category, FutureWarning)]


def test_a_newer_release_than_the_tested_ones_is_told_once():
    compat.warn_if_untested.cache_clear()
    with pytest.warns(UserWarning, match=r"transformers 5\.99\.0 is newer than"):
        compat.warn_if_untested("5.99.0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compat.warn_if_untested("5.99.0")
        for tested in (f"{compat.NEWEST_TESTED}.9", f"{compat.OLDEST_TESTED}.0", transformers.__version__):
            compat.warn_if_untested(tested)


def test_a_renamed_argument_is_refused_before_it_can_be_passed_over():
    class Renamed(nn.Module):
        def forward(self, input_ids=None, attention_mask=None, positions=None, kv=None, **kwargs):
            return kwargs

    with pytest.raises(ValueError, match=r"Renamed of transformers .* position_ids, cache or past_key_values"):
        compat.check_forward(Renamed())
    model = build("llama")
    compat.check_forward(model, needed=("logits_to_keep",))
    with pytest.raises(ValueError, match="logits_to_keep"):
        compat.check_forward(model.model, needed=("logits_to_keep",))


def test_the_insides_that_are_read_are_there():
    model = build("llama")
    config = model.generation_config
    assert compat.attention_implementation(model.config) == "sdpa"
    seen = {}

    def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        seen.update(compat.generate_arguments(inspect.currentframe().f_back, model), pad=generation_config)
        seen["caller's"] = [v for v in kwargs.values() if compat.is_callers_cache(v)]
        return input_ids

    cache, streamer = DynamicCache(config=model.config), type("Streamer", (), {"put": lambda *_: None})()
    given = with_cache(model, cache)
    model.generate(ids, custom_generate=loop, streamer=streamer, max_new_tokens=2, pad_token_id=PAD, **given)
    assert seen["streamer"] is streamer and seen["caller's"] == [cache]
    assert compat.pad_token(seen["pad"]).tolist() == PAD
    model.generate(ids, custom_generate=loop, max_new_tokens=2, pad_token_id=PAD)
    assert seen["caller's"] == [] and config is not None
    assert compat.generate_arguments(None, model) == {}


# ---- one pair of hooks a model ----


def hooks(model) -> dict:
    return {m: (list(m._forward_pre_hooks.values()), list(m._forward_hooks.values())) for m in model.modules()}


def test_a_model_has_one_pair_of_hooks_however_many_caches_live():
    model = build("llama")
    before = hooks(model)
    caches = [make_cache(model, small_policy("strict")) for _ in range(20)]
    one = hooks(model)
    assert one != before and all(len(pre) <= 1 and len(post) <= 1 for pre, post in one.values())
    while caches:
        assert hooks(model) == one
        caches.pop()
    assert hooks(model) == before


@torch.no_grad()
def test_a_model_with_a_live_cache_can_be_copied_and_pickled():
    model, options = build("llama"), small_policy("lazy")
    cache = make_cache(model, options)
    start = feed(model, cache, ids[:, :30])
    copy = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(copy(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match="not attached to the model"):
        copy(ids[:, :1], **with_cache(copy, cache))
    found = torch.cat([start, feed(model, cache, ids[:, 30:])], 1)
    torch.testing.assert_close(found, feed(copy, make_cache(copy, options), ids), rtol=0, atol=1e-5)


@torch.no_grad()
def test_threads_that_make_and_drop_caches_do_not_disturb_each_other():
    model, options = build("llama"), small_policy("refresh-window-attention")
    wanted = feed(model, make_cache(model, options), ids)
    plain, failed = model(ids).logits, []

    def session(number: int) -> None:
        try:
            for _ in range(4):
                if number % 2:
                    torch.testing.assert_close(model(ids).logits, plain, rtol=0, atol=1e-4)
                else:
                    with torch.no_grad():
                        found = feed(model, make_cache(model, options), ids)
                    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=session, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed


@contextmanager
def interrupt(module: nn.Module):
    """Ctrl-C as `module` is called: not an Exception, so no hook of torch is told."""

    def raise_it(*_):
        raise KeyboardInterrupt

    handle = module.register_forward_pre_hook(raise_it)
    with pytest.raises(KeyboardInterrupt):
        yield
    handle.remove()


@pytest.mark.parametrize("block_tokens", [0, 32])
@torch.no_grad()
def test_a_forward_that_is_interrupted_leaves_other_calls_alone(block_tokens):
    model, options = build("llama"), small_policy("strict")
    plain, other = model(ids).logits, make_cache(model, options)
    wanted = feed(model, make_cache(model, options), ids)
    start = feed(model, other, ids[:, :40])
    cache = make_cache(model, options, block_tokens=block_tokens)
    feed(model, cache, ids[:, :30])
    with interrupt(model.model.layers[1].mlp):
        model(ids[:, 30:60], **with_cache(model, cache))
    torch.testing.assert_close(model(ids).logits, plain)
    torch.testing.assert_close(torch.cat([start, feed(model, other, ids[:, 40:])], 1), wanted, rtol=0, atol=1e-5)
    found = feed(model, cache, ids[:, 30:], [30])
    torch.testing.assert_close(found, wanted[:, 30:], rtol=0, atol=1e-4)
