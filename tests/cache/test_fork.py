"""Forks: conversations from one prompt that go on independently, and share its buffers until they do."""

import copy
import gc
import pickle

import pytest
import torch
from oracle.models import build, token_ids
from streams import chunk_sizes, feed, make_cache, small_policy

from sinkstream.cache import POSITIONS
from sinkstream.compat import with_cache
from sinkstream.policies import PRESETS

prompt, *turns = (token_ids(n, seed=s)[None] for n, s in ((75, 0), (36, 1), (36, 2)))


@pytest.mark.parametrize(("policy", "positions"), [(name, POSITIONS[i % 2]) for i, name in enumerate(PRESETS)])
@pytest.mark.parametrize("place", [9, 75])
def test_forks_are_as_caches_of_their_own(policy, positions, place):
    """Fed in turns, each gives what a fresh cache gives that was fed the same tokens in the same forwards."""
    model = build("llama", layers=2)
    whole = prompt[:, :place]

    def fed():
        cache = make_cache(model, small_policy(policy), positions=positions, rebase_at=60)
        feed(model, cache, whole, chunk_sizes(cache, place))
        return cache

    def spoken(cache, turn, half):
        return feed(model, cache, turn[:, 18 * half : 18 * half + 18])

    expected = []
    for turn in turns:
        alone = fed()
        expected.append([spoken(alone, turn, half) for half in (0, 1)])
    root = fed()
    one = root.fork()
    two = one.fork()
    found = [[spoken(cache, turn, half) for cache, turn in ((one, turns[0]), (two, turns[1]))] for half in (0, 1)]
    for half in (0, 1):
        assert torch.equal(found[half][0], expected[0][half]) and torch.equal(found[half][1], expected[1][half])
        assert torch.equal(spoken(root, turns[0], half), expected[0][half]), "fed last"
    assert root.stats() == one.stats()
    assert not torch.equal(expected[0][0], expected[1][0])


def test_a_prompt_is_held_once_until_somebody_writes():
    model = build("llama", layers=2)
    root = make_cache(model, small_policy("refresh-uniform"))
    feed(model, root, prompt)
    held = root.stats()["bytes"]
    forks = [root.fork() for _ in range(5)]
    buffers = {cache.stream.ring.keys.data_ptr() for cache in (root, *forks)}
    assert len(buffers) == 1 and {c.stats()["shared_bytes"] for c in (root, *forks)} == {held}
    before = [layer.clone() for layer in (root.layers[0].keys, root.layers[1].values)]
    feed(model, forks[0], turns[0])
    assert forks[0].stats()["shared_bytes"] == 0 and forks[0].stream.ring.keys.data_ptr() not in buffers
    assert torch.equal(root.layers[0].keys, before[0]) and torch.equal(forks[4].layers[1].values, before[1])
    for cache in (root, *forks[1:4]):
        feed(model, cache, turns[0][:, :1])
    assert forks[4].stats()["shared_bytes"] == 0, "the last one has the buffers to itself"
    feed(model, forks[4], turns[0][:, :1])
    assert forks[4].stream.ring.keys.data_ptr() in buffers, "and writes to them"


@pytest.mark.parametrize("gone", ["closed", "collected", "reset"])
def test_one_that_ends_leaves_the_others_intact(gone):
    model = build("llama", layers=2)
    options = small_policy("refresh-window-attention")
    root = make_cache(model, options)
    feed(model, root, prompt, chunk_sizes(root, 75))
    fork = root.fork()
    if gone == "reset":
        root.reset()
        feed(model, root, turns[1])
    elif gone == "closed":
        root.close()
        with pytest.raises(ValueError, match="closed, or whose model is gone, cannot be forked"):
            root.fork()
    else:
        del root
        gc.collect()
        assert fork.stats()["shared_bytes"] == 0
    alone = make_cache(model, options)
    feed(model, alone, prompt, chunk_sizes(alone, 75))
    assert torch.equal(feed(model, fork, turns[0]), feed(model, alone, turns[0]))


def test_hooks_count_forks():
    model = build("llama", layers=2)
    root = make_cache(model, small_policy("refresh-window-attention"))
    feed(model, root, prompt[:, :10])
    hooks, attention = len(model._forward_hooks), model.config._attn_implementation
    forks = [root.fork() for _ in range(3)]
    assert len(model._forward_hooks) == hooks == 1, "one pair a model"
    root.close()
    forks.pop().close()
    feed(model, forks[0], turns[0])
    assert model.config._attn_implementation == attention != "sdpa"
    forks.clear()
    gc.collect()
    assert len(model._forward_hooks) == 0 and model.config._attn_implementation == "sdpa"


def test_a_fork_during_a_forward_copies_at_once():
    model = build("llama", layers=2)
    root, forks = make_cache(model, small_policy("lazy")), []
    feed(model, root, prompt)
    alone = make_cache(model, small_policy("lazy"))
    feed(model, alone, prompt)
    handle = model.model.layers[1].register_forward_pre_hook(lambda *_: forks.append(root.fork()))
    feed(model, root, turns[0], [36])
    handle.remove()
    (fork,) = forks
    assert fork.seen_tokens == 75 and fork.stats()["shared_bytes"] == 0
    assert (feed(model, fork, turns[1]) - feed(model, alone, turns[1])).abs().max() < 1e-5


def test_copies_are_forks_and_pickles_are_refused():
    model = build("llama", layers=2)
    cache = make_cache(model, small_policy("strict"))
    feed(model, cache, prompt)
    for made in (copy.copy(cache), copy.deepcopy(cache), copy.deepcopy({"inside": [cache]})["inside"][0]):
        assert made is not cache and made.stream is not cache.stream and made.seen_tokens == 75
        assert torch.equal(feed(model, made, turns[0]), feed(model, cache.fork(), turns[0]))
    with pytest.raises(ValueError, match=r"cannot be pickled; accepted: cache.save\(path\)"):
        pickle.dumps(cache)
    fresh = make_cache(model, small_policy("strict"))
    assert fresh.fork().seen_tokens == 0, "a cache that was not fed can be forked too"


def test_conversations_of_forks_are_checked_each_by_itself():
    model = build("gpt_neox")
    root = make_cache(model, small_policy("strict"))
    feed(model, root, prompt)
    one, two = root.fork(), root.fork()
    for cache, turn in ((one, turns[0]), (two, turns[1])):
        told = torch.cat([prompt, turn], 1)
        model.generate(told, **with_cache(model, cache), max_new_tokens=3, do_sample=False, pad_token_id=96)
    with pytest.raises(ValueError, match=r"differs from what the cache has seen at token 7[5-9] of 113"):
        told = torch.cat([prompt, turns[1], turns[1]], 1)
        model.generate(told, **with_cache(model, one), max_new_tokens=3, do_sample=False, pad_token_id=96)
