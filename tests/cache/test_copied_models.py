"""A model that is copied, pickled, saved or moved while a cache of it lives: the copy is a model without a cache."""

import copy
import io
import json
import pickle

import processes
import pytest
import torch
from oracle.models import build, token_ids
from streams import chunk_sizes, feed, make_cache, small_policy

from sinkstream.compat import with_cache

ids = token_ids(700)[None]


def through_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "torch.save": through_torch}


def hooks(model) -> int:
    return sum(len(hooks) for m in model.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks))


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("policy", ["strict", "refresh-window-attention"])
def test_a_copy_has_no_cache_and_can_have_one(how, policy):
    model, options = build("llama", layers=2), small_policy(policy)
    plain = len(pickle.dumps(model))
    cache = make_cache(model, options, rebase_at=60)
    feed(model, cache, ids[:, :200], chunk_sizes(cache, 200))
    twin = COPIES[how](model)
    assert len(pickle.dumps(model)) < plain + 4_000 < plain + cache.stats()["bytes"], "the cache is not dragged along"
    wanted = model(ids[:, :9]).logits
    assert torch.equal(twin(ids[:, :9]).logits, wanted)
    assert hooks(twin) == 0 and twin.config._attn_implementation == "sdpa", (
        "the first call has taken off what it brought"
    )
    fresh = COPIES[how](model)
    own = make_cache(fresh, options, rebase_at=60)  # before any call of the copy
    assert hooks(fresh) == hooks(model) == 4
    found = feed(fresh, own, ids, chunk_sizes(own, 700))
    rest = feed(model, cache, ids[:, 200:], chunk_sizes(cache, 500))
    assert (found[:, 200:] - rest).abs().max() < 1e-4 and own.stats()["rebases"] > 0
    own.close()
    assert hooks(fresh) == 0 and "prepare_inputs_for_generation" not in vars(fresh)
    with pytest.raises(ValueError, match="not attached to the model that is using it"):
        twin(ids[:, :3], **with_cache(twin, cache))


def test_a_pickle_is_opened_by_another_process(tmp_path):
    model = build("llama", layers=2)
    cache = make_cache(model, small_policy("refresh-window-attention"))
    feed(model, cache, ids[:, :40])
    torch.save({"model": model, "ids": ids[:, :9], "logits": model(ids[:, :9]).logits}, tmp_path / "model.pt")
    script = (
        "import sys, torch; held = torch.load(sys.argv[1], weights_only=False); model = held['model']\n"
        "print(torch.allclose(model(held['ids']).logits, held['logits'], atol=1e-5), len(model._forward_hooks))\n"
        "print(model.generate(held['ids'], max_new_tokens=3, pad_token_id=0).shape)"
    )
    done = processes.run("-c", script, tmp_path / "model.pt")
    assert done.stdout.split("\n")[:2] == ["True 0", "torch.Size([1, 12])"], done.stderr


def test_a_model_on_disk_knows_nothing_of_the_cache(tmp_path):
    model = build("llama", layers=2)
    model.save_pretrained(tmp_path / "before")
    cache = make_cache(model, small_policy("refresh-window-attention"))
    feed(model, cache, ids[:, :40])
    model.save_pretrained(tmp_path / "while")
    files = sorted(path.name for path in (tmp_path / "before").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "while").iterdir()) and "config.json" in files
    for name in files:
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "while" / name).read_bytes(), name
    assert "sinkstream" not in json.dumps(model.config.to_dict())


def test_a_model_on_another_device_is_refused():
    model = build("llama", layers=2)
    cache = make_cache(model, small_policy("strict"))
    feed(model, cache, ids[:, :40])
    moved = model.state_dict()
    model.to("meta")
    with pytest.raises(ValueError, match=r"moved from cpu to meta after the cache was filled; .*cache.reset\(\)"):
        model(ids[:, 40:42].to("meta"), **with_cache(model, cache))
    model.load_state_dict(moved, assign=True)
    model.model.rotary_emb.inv_freq = build("llama", layers=2).model.rotary_emb.inv_freq
    whole = feed(model, make_cache(model, small_policy("strict")), ids[:, :60])
    torch.testing.assert_close(feed(model, cache, ids[:, 40:60]), whole[:, 40:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("place", ["argument", "config"])
@torch.no_grad()
def test_use_cache_false_in_a_bare_call_still_uses_the_cache_that_is_given(place):
    """As transformers' own caches; generate() with it is refused (test_generate.py)."""
    model, options = build("llama", layers=2), small_policy("strict")
    wanted = feed(model, make_cache(model, options), ids[:, :60])
    more = {"use_cache": False} if place == "argument" else {}
    model.config.use_cache = place == "argument"
    cache = make_cache(model, options)
    found = [model(part, **with_cache(model, cache), **more).logits for part in ids[:, :60].split(17, 1)]
    assert cache.seen_tokens == 60
    torch.testing.assert_close(torch.cat(found, 1), wanted, rtol=0, atol=1e-4)
