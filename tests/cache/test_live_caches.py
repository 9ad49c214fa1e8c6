"""Many caches of one model at once: what a forward costs, threads, and logits that are not finite."""

import gc
import sys
import threading

import pytest
import torch
from oracle.models import build, token_ids
from streams import feed, make_cache, small_policy

from sinkstream.cache import StreamingCache
from sinkstream.compat import with_cache

MANY = 1_000
ids = token_ids(150)[None]


@torch.no_grad()
def calls(model, cache: StreamingCache) -> int:
    """Python calls of a forward of one token."""
    count = 0

    def seen(frame, event, argument):
        nonlocal count
        count += event == "call"

    gc.disable()
    sys.setprofile(seen)
    try:
        model(ids[:, :1], **with_cache(model, cache))
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


def test_live_caches_cost_a_forward_nothing():
    model = build("llama", layers=2)
    cache = make_cache(model, small_policy("strict"))
    feed(model, cache, ids[:, :60])
    alone = calls(model, cache)
    assert calls(model, cache) == alone
    others = [make_cache(model, small_policy("strict")) for _ in range(MANY)]
    assert calls(model, cache) == alone
    for other in others:
        other.close()
    assert calls(model, cache) == alone and len(model._forward_hooks) == 1
    model.register_forward_hook(lambda *_: None)
    assert calls(model, cache) > alone, "a hook more would show"


def test_a_layer_takes_three_calls_of_ours():
    """`StreamingCache.update`, the forward's `write` and the ring's: what else there is, is done once a forward."""
    counted = []
    for layers in (2, 6):
        model = build("llama", layers=layers)
        model.set_attn_implementation("sdpa")
        cache = make_cache(model, small_policy("strict"))
        feed(model, cache, ids[:, :60])
        names = []

        def seen(frame, event, argument, names=names):
            if event == "call" and "sinkstream" in frame.f_code.co_filename.replace("\\", "/").split("/")[-3:]:
                names.append(frame.f_code.co_qualname)

        with torch.no_grad():
            sys.setprofile(seen)
            try:
                model(ids[:, 60:61], **with_cache(model, cache))
            finally:
                sys.setprofile(None)
        counted.append(len(names))
    assert counted[1] - counted[0] == 3 * 4


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_threads_with_a_cache_each_do_not_disturb_each_other(attention):
    """Each feeds chunks that cross prunes, for which attention is switched; others make and close caches meanwhile."""
    model = build("llama", layers=2)
    model.set_attn_implementation(attention)
    texts = [token_ids(150, seed=seed)[None] for seed in range(3)]
    sizes = [40, 1, 1, 30, 1, 50, 1, 1, 25]

    def stream(text: torch.Tensor) -> torch.Tensor:
        cache = make_cache(model, small_policy("lazy"))
        try:
            return feed(model, cache, text, sizes)
        finally:
            cache.close()

    expected = [stream(text) for text in texts]
    found: list = [None] * len(texts)
    over = threading.Event()

    def run(i: int) -> None:
        try:
            found[i] = [stream(texts[i]) for _ in range(3)]
        except Exception as error:  # shown by the assertion below
            found[i] = error

    def make_and_close() -> None:
        while not over.is_set():
            make_cache(model, small_policy("strict")).close()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(texts))]
    maker = threading.Thread(target=make_and_close)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        for thread in (*threads, maker):
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        over.set()
        maker.join()
        sys.setswitchinterval(interval)
    for one, wanted in zip(found, expected):
        assert isinstance(one, list), one
        assert all(torch.allclose(again, wanted, atol=1e-5) for again in one)
    assert not torch.allclose(expected[0], expected[1], atol=1e-2)
    assert len(model._forward_hooks) == 0 and model.config._attn_implementation == attention


# ---- logits that are not finite ----


def poison(model, bad: float):
    """Let the logits of the last token of each forward be `bad`; returns the handle."""

    def spoil(module, args, logits):
        logits = logits.clone()
        logits[:, -1] = bad
        return logits

    return model.lm_head.register_forward_hook(spoil)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_adaptive_policy_refuses_logits_that_are_not_finite(bad):
    """With the token's index; the token is not counted, and the stream goes on with finite ones."""
    model = build("llama", layers=2)
    cache, other = (make_cache(model, small_policy("adaptive-entropy")) for _ in range(2))
    for one in (cache, other):
        feed(model, one, ids[:, :50])
    handle = poison(model, bad)
    with pytest.raises(ValueError, match="logits after token 50 of the stream are not finite"):
        feed(model, cache, ids[:, 50:51])
    handle.remove()
    assert cache.stats() == other.stats()
    assert torch.equal(feed(model, cache, ids[:, 50:90]), feed(model, other, ids[:, 50:90]))


def test_rows_are_all_as_before_where_one_has_logits_that_are_not_finite():
    model, rows = build("llama", layers=2), torch.cat([ids, ids.flip(1)])
    cache, other = (make_cache(model, small_policy("adaptive-entropy")) for _ in range(2))
    for one in (cache, other):
        feed(model, one, rows[:, :50])

    def spoil(module, args, logits):
        logits = logits.clone()
        logits[1, -1] = float("nan")
        return logits

    handle = model.lm_head.register_forward_hook(spoil)
    with pytest.raises(ValueError, match="are not finite"):
        feed(model, cache, rows[:, 50:51])
    handle.remove()
    assert cache.row_stats() == other.row_stats()
    assert torch.equal(feed(model, cache, rows[:, 50:80]), feed(model, other, rows[:, 50:80]))


def test_other_policies_pass_them_on_and_pin_no_token_for_them():
    """As any cache of transformers; the token of which nothing is known is not held to be the most uncertain."""
    model = build("llama", layers=2)
    for policy in ("strict", "refresh-uncertainty"):
        cache = make_cache(model, small_policy(policy))
        feed(model, cache, ids[:, :50])
        handle = poison(model, float("nan"))
        assert feed(model, cache, ids[:, 50:51]).isnan().all()
        handle.remove()
        assert feed(model, cache, ids[:, 51:140]).isfinite().all()
        if policy == "refresh-uncertainty":
            assert all(channel.isfinite().all() for channel in cache.stream.ring.channels.values())
            assert not (cache.stream.ring.pinned_positions == 51).any(), "token 51 was drawn from those logits"
