"""A conversation that is passed again: it must begin with what the cache has seen, or be refused at the right token."""

import pickle

import pytest
import torch
from oracle.models import VOCAB, build, token_ids
from streams import make_cache, small_policy
from transformers import DynamicCache

from sinkstream.cache.conversation import REMEMBERED, SeenTokens
from sinkstream.compat import with_cache

PAD = next(token for token in range(VOCAB) if token not in token_ids(400, seed=3))


def prompt(length: int) -> torch.Tensor:
    return token_ids(400, seed=3)[None, :length]


def answer(model, cache, new: int = 5, **inputs) -> torch.Tensor:
    return model.generate(**inputs, **with_cache(model, cache), max_new_tokens=new, do_sample=False, pad_token_id=PAD)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("policy", ["strict", "refresh-window-attention"])
def test_the_same_conversation_goes_on_and_another_is_refused_where_it_differs(family, policy):
    model, options = build(family), small_policy(policy)
    cache, twin = (make_cache(model, options) for _ in range(2))
    spoken = answer(model, cache, input_ids=prompt(40))
    again = torch.cat([spoken, prompt(70)[:, 60:]], 1)
    for index in (0, 17, 43):
        other = again.clone()
        other[0, index] = (other[0, index] + 1) % VOCAB
        before = cache.stats()
        with pytest.raises(ValueError, match=rf"at token {index} of 44; .*cache.reset\(\).*cache.continuation"):
            answer(model, cache, input_ids=other)
        assert cache.stats() == before
    answer(model, twin, input_ids=prompt(40))
    assert answer(model, cache, input_ids=again).tolist() == answer(model, twin, input_ids=again).tolist()
    cache.reset()
    other = prompt(90)[:, 30:]
    assert (
        answer(model, cache, input_ids=other).tolist()
        == answer(model, make_cache(model, options), input_ids=other).tolist()
    )


@torch.no_grad()
def test_new_tokens_only_are_asked_for_by_name():
    model, options = build("llama"), small_policy("lazy")
    cache, twin = (make_cache(model, options) for _ in range(2))
    answer(model, cache, input_ids=prompt(40))
    new = prompt(130)[:, 70:]
    with pytest.raises(ValueError, match="differs from what the cache has seen at token 0 of 44"):
        answer(model, cache, input_ids=new)
    spoken = answer(model, cache, **cache.continuation(new))
    twin.prefill(model, answer(model, make_cache(model, options), input_ids=prompt(40))[:, :44])
    logits = twin.prefill(model, new)
    assert spoken[0, 60] == logits.argmax() and cache.seen_tokens == 44 + 60 + 4


@torch.no_grad()
def test_embeddings_and_other_caches_are_not_compared():
    model = build("llama")
    cache = make_cache(model, small_policy("strict"))
    model(inputs_embeds=model.get_input_embeddings()(prompt(10)), **with_cache(model, cache))
    answer(model, cache, input_ids=prompt(40).flip(1))
    assert cache.seen_tokens == 44, "the ids of embeddings are not known"
    plain = DynamicCache(config=model.config)
    answer(model, plain, input_ids=prompt(20))
    answer(model, plain, input_ids=prompt(40).flip(1))
    assert plain.get_seq_length() == 44, "another cache is none of our business"


def test_the_model_is_as_it_was_when_the_last_cache_is_gone():
    model = build("llama")
    before = set(vars(model))
    one, two = (make_cache(model, small_policy("strict")) for _ in range(2))
    assert set(vars(model)) != before
    copy = pickle.loads(pickle.dumps(model))
    assert copy.generate(prompt(10), max_new_tokens=3, pad_token_id=PAD).shape == (1, 13)
    one.close()
    with pytest.raises(ValueError, match="at token 0"):
        answer(model, two, input_ids=prompt(30))
        answer(model, two, input_ids=prompt(60).flip(1))
    two.close()
    assert set(vars(model)) == before


@pytest.mark.parametrize("sizes", [[1] * 50, [7, 300], [REMEMBERED], [2 * REMEMBERED + 1], [9_001]])
def test_ids_and_hash_tell_the_first_difference(sizes):
    ids = torch.randint(0, 50_000, (2, 45_000), generator=torch.Generator().manual_seed(1))
    seen, fed = SeenTokens(2, torch.device("cpu")), 0
    held = seen.bytes
    while fed < 30_000 and fed < 800 * max(sizes):
        for size in sizes:
            seen.append(ids[:, fed : fed + size])
            fed += size
    assert seen.bytes == held and seen.first_difference(ids) is None
    for index in (0, fed // 2, fed - REMEMBERED, fed - 1):
        other = ids.clone()
        other[1, max(0, index)] += 1
        found = seen.first_difference(other)
        assert found == max(0, index) or (index <= found < fed - REMEMBERED), (index, found, fed)
    other = ids.clone()
    other[:, fed] += 1
    assert seen.first_difference(other) is None, "a token that was not seen yet"
