"""What transformers' `Cache` and `CacheLayerMixin` offer: every public name is answered truthfully, or refused."""

import functools

import pytest
import torch
from oracle.models import build, token_ids
from streams import FakeTokenizer, feed, make_cache, small_policy
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin

from sinkstream.cache import StreamingCache
from sinkstream.policies import PRESETS

ids = token_ids(90, batch=2)


@functools.cache
def shared_model():
    """One model, which outlives its caches."""
    return build("llama")


def fed(tokens: int = 60, policy: str = "lazy") -> StreamingCache:
    cache = make_cache(shared_model(), small_policy(policy))
    if tokens:
        feed(shared_model(), cache, ids[:, :tokens])
    return cache


def repeated(cache: StreamingCache) -> StreamingCache:
    other = cache.fork()
    other.batch_repeat_interleave(2)
    return other


def one_row(cache: StreamingCache) -> StreamingCache:
    other = cache.fork()
    other.batch_select_indices(torch.tensor([0]))
    return other


# name -> what a cache of 2 rows and 3 layers says after 60 tokens
ANSWERS = {
    "batch_size": lambda c: c.batch_size == 2 and fed(0).batch_size == -1,
    "early_initialization": lambda c: True,  # tested below
    "get_mask_sizes": lambda c: c.get_mask_sizes(5, 1) == (c.kept_tokens + 5, 60 - c.kept_tokens),
    "get_max_cache_shape": lambda c: c.get_max_cache_shape() == -1,
    "get_max_length": lambda c: c.get_max_length() == c.get_max_length(2) == -1,
    "get_query_offset": lambda c: c.get_query_offset() == 60,
    "get_seq_length": lambda c: {c.get_seq_length(i) for i in range(3)} == {60} and c.get_seq_length() == 60,
    "is_compileable": lambda c: c.is_compileable is False,
    "is_croppable": lambda c: c.is_croppable is False,
    "is_dummy": lambda c: c.is_dummy == [False] * 3,
    "is_initialized": lambda c: c.is_initialized and not fed(0).is_initialized,
    "is_linear": lambda c: c.is_linear == [False] * 3,
    "is_recording_past": lambda c: c.is_recording_past(1) is False,
    "is_sliding": lambda c: c.is_sliding == [False] * 3,
    "max_batch_size": lambda c: c.max_batch_size == 2,
    "batch_repeat_interleave": lambda c: repeated(c).batch_size == 4,
    "batch_select_indices": lambda c: one_row(c).batch_size == 1,
    "max_cache_len": lambda c: c.max_cache_len == -1,
    "reset": lambda c: c.reset() is None and c.stats()["seen"] == c.stats()["bytes"] == 0 and not c.is_initialized,
}
ENTRIES = torch.zeros(2, 2, 1, 16)
# name -> a call, and words of its refusal
REFUSED = {
    "activate_past_recording": (lambda c: c.activate_past_recording(), "cannot be rolled back.*fork"),
    "crop": (lambda c: c.crop(-1), "cannot be rolled back"),
    "get_conv_state": (lambda c: c.get_conv_state(0), "non linear attention layer"),
    "get_recurrent_state": (lambda c: c.get_recurrent_state(0), "non linear attention layer"),
    "has_previous_state": (lambda c: c.has_previous_state(), "only contain Attention layers"),
    "offload": (lambda c: c.offload(0), "offloading is not supported.*accepted: a smaller cap"),
    "prefetch": (lambda c: c.prefetch(0), "offloading is not supported"),
    "reorder_cache": (lambda c: c.reorder_cache(torch.tensor([1, 0])), "beam search is not supported.*accepted"),
    "update": (lambda c: c.update(ENTRIES, ENTRIES, 0), "not attached to the model that is using it"),
    "update_conv_state": (lambda c: c.update_conv_state(ENTRIES, 0), "non-LinearAttention layer"),
    "update_indexer": (lambda c: c.update_indexer(ENTRIES, 0), "no indexer key cache"),
    "update_recurrent_state": (lambda c: c.update_recurrent_state(ENTRIES, 0), "non-LinearAttention layer"),
}
LAYER_ANSWERS = {
    "get_mask_sizes": lambda c: c.layers[1].get_mask_sizes(5) == c.get_mask_sizes(5, 1),
    "get_max_cache_shape": lambda c: c.layers[1].get_max_cache_shape() == -1,
    "get_max_length": lambda c: c.layers[1].get_max_length() == -1,
    "get_seq_length": lambda c: c.layers[1].get_seq_length() == 60,
    "is_compileable": lambda c: c.layers[1].is_compileable is False,
    "is_croppable": lambda c: c.layers[1].is_croppable is False,
    "lazy_initialization": lambda c: c.layers[1].lazy_initialization(ENTRIES, ENTRIES) is None,
    "supports_early_init": lambda c: c.layers[1].supports_early_init is False,
}
LAYER_REFUSED = {
    "offload": (lambda c: c.layers[1].offload(), "offloading is not supported"),
    "prefetch": (lambda c: c.layers[1].prefetch(), "offloading is not supported"),
    "reorder_cache": (lambda c: c.layers[1].reorder_cache(torch.tensor([1, 0])), "beam search is not supported"),
    "reset": (lambda c: c.layers[1].reset(), r"accepted: cache.reset\(\)"),
    "update": (lambda c: c.layers[1].update(ENTRIES, ENTRIES), "not attached to the model"),
}


@pytest.mark.parametrize("kind", [Cache, CacheLayerMixin])
def test_no_public_name_is_unknown(kind):
    """A name that a new release brings is not served before it is in a table above."""
    known = ANSWERS.keys() | REFUSED.keys() if kind is Cache else LAYER_ANSWERS.keys() | LAYER_REFUSED.keys()
    public = {name for name in dir(kind) if not name.startswith("_")}
    assert public <= known, f"say in a table what {sorted(public - known)} of {kind.__name__} does"
    assert len(public) > 10, "control: there is something to know"


@pytest.mark.parametrize("where", ["cache", "layer"])
def test_every_name_answers_truthfully_or_is_refused_and_loses_nothing(where):
    kind, answers, refused = (
        (Cache, ANSWERS, REFUSED) if where == "cache" else (CacheLayerMixin, LAYER_ANSWERS, LAYER_REFUSED)
    )
    cache = fed()
    before, kept = cache.stats(), [tensor.clone() for pair in cache for tensor in pair]
    for name, (call, words) in refused.items():
        if hasattr(kind, name):
            with pytest.raises(ValueError, match=words):
                call(cache)
    for name in sorted(answers, key="reset".__eq__):
        if hasattr(kind, name) and name != "reset":
            assert answers[name](cache), name
    assert cache.stats() == before
    assert all(torch.equal(a, b) for a, b in zip(kept, (tensor for pair in cache for tensor in pair)))
    if where == "cache":
        assert answers["reset"](cache)


@pytest.mark.parametrize("policy", PRESETS)
def test_keys_and_values_are_what_attention_sees(policy):
    model = build("llama")
    cache, seen = make_cache(model, small_policy(policy)), {}
    assert [(layer.keys, layer.values) for layer in cache.layers] == [(None, None)] * 3
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def watched(query, key, value, **more):
        seen[len(seen) % 3] = key[:, :: key.shape[1] // 2], value[:, :: value.shape[1] // 2]
        return sdpa(query, key, value, **more)

    rows = ids[:1] if policy.startswith("adaptive") else ids  # rows of an adaptive policy may differ: see below
    feed(model, cache, rows[:, :60])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
        feed(model, cache, rows[:, 60:61])
    assert len(seen) == 3 == len(cache)
    for i, (keys, values) in enumerate(cache):
        assert (
            keys.shape == values.shape == (len(rows), 2, cache.kept_tokens, 16) and keys.dtype == cache.layers[i].dtype
        )
        assert torch.equal(keys, seen[i][0]) and torch.equal(values, seen[i][1])
        assert torch.equal(cache[i][0], keys) and torch.equal(cache.layers[i].values, values)
        assert keys.data_ptr() == cache.layers[i].keys.data_ptr(), "views, no copies"
    with pytest.raises(IndexError):
        cache[3]
    assert torch.equal(cache[-1][0], cache[2][0]) and cache.layers[0].device == keys.device


def test_rows_that_differ_have_no_tensor_in_common():
    cache = fed(policy="adaptive-top1")
    with pytest.raises(ValueError, match=r"rows that differ.*accepted: cache\.fork\(\)"):
        _ = cache.layers[0].keys
    row = one_row(cache)
    assert row.layers[0].keys.shape[0] == 1


def test_other_software_takes_them_over():
    """While nothing is evicted, positions are those of the stream, and transformers' own cache can go on with them."""
    model = build("llama")
    cache = make_cache(model, {"sink": 4, "window": 100})
    feed(model, cache, ids[:, :60])
    other = DynamicCache(tuple((k.clone(), v.clone()) for k, v, *_ in cache))
    wanted = feed(model, cache, ids[:, 60:])
    torch.testing.assert_close(feed(model, other, ids[:, 60:]), wanted, rtol=0, atol=1e-4)
    assert not any("keys" in vars(layer) for layer in cache.layers)


def test_buffers_can_be_allocated_early():
    model, options = build("llama"), small_policy("refresh-window-attention")
    cache, twin = (make_cache(model, options) for _ in range(2))
    cache.early_initialization(2, 2, 16, torch.float32, "cpu")
    assert cache.is_initialized and cache.batch_size == 2 and cache.seen_tokens == 0
    assert cache.layers[0].keys.shape == (2, 2, 0, 16)
    assert torch.equal(feed(model, cache, ids), feed(model, twin, ids))
    bytes_held = cache.stats()["bytes"]
    cache.early_initialization(2, [2] * 3, [16] * 3, torch.float32, torch.device("cpu"))
    assert cache.seen_tokens == 90 and cache.stats()["bytes"] == bytes_held, "a stream that has begun goes on"
    for wrong, words in (
        ({"num_heads": 4}, "num_heads=4 is not accepted; accepted: 2"),
        ({"head_dim": [16, 16, 8]}, "head_dim=.* is not accepted; accepted: 16"),
        ({"dtype": torch.float16}, "dtype=torch.float16 is not accepted"),
    ):
        given = {"batch_size": 2, "num_heads": 2, "head_dim": 16, "dtype": torch.float32, "device": "cpu"} | wrong
        with pytest.raises(ValueError, match=words):
            make_cache(model, options, tokenizer=FakeTokenizer()).early_initialization(**given)
