"""`StreamingCache` under generate(): greedy, sampling, streamers, long prompts, turns, and what is refused."""

import pickle

import pytest
import torch
import transformers
from oracle.models import build
from packaging.version import Version
from streams import PAD, TOLERANCE, Collect, FakeTokenizer, feed, likeliest, make_cache, prompt_of, small_policy

from sinkstream.cache import StreamingCache
from sinkstream.compat import with_cache
from sinkstream.policies import PRESETS

POLICIES = list(PRESETS)


def generate(model, ids: torch.Tensor, cache=None, new: int = 40, **options) -> torch.Tensor:
    """Greedy generate() unless the options say otherwise: prompt and new tokens, (batch, T)."""
    given = {"do_sample": False, "pad_token_id": PAD, "max_new_tokens": new, **with_cache(model, cache), **options}
    return model.generate(ids, **given)


@torch.no_grad()
def greedy(model, ids: torch.Tensor, cache: StreamingCache, new: int) -> torch.Tensor:
    """The same by hand, token by token."""
    last = likeliest(feed(model, cache, ids)[:, -1:])
    for _ in range(new - 1):
        ids = torch.cat([ids, last], 1)
        last = likeliest(model(last, **with_cache(model, cache)).logits)
    return torch.cat([ids, last], 1)


@pytest.mark.parametrize("policy", POLICIES)
def test_greedy_generation_equals_the_loop_by_hand(policy):
    model, ids, options = build("llama"), prompt_of(9), small_policy(policy)
    cache, other = make_cache(model, options), make_cache(model, options)
    written = generate(model, ids, cache, new=90)
    assert torch.equal(written, greedy(model, ids, other, new=90))
    assert cache.stats()["seen"] == 98 and cache.stats()["events"] > 0
    assert cache.stats() | {"bytes": 0} == other.stats() | {"bytes": 0} and len(set(written[0, 9:].tolist())) > 5


def test_what_is_evicted_changes_what_is_written():
    """Control of the test above: it would notice the wrong cache."""
    model, ids = build("llama"), prompt_of(9)
    texts = [
        generate(model, ids, make_cache(model, small_policy(p)), new=90) for p in ("strict", "window-only", "lazy")
    ]
    assert not torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])


@pytest.mark.parametrize("family", ["gpt_neox", "llama_yarn", "mistral", "qwen2", "qwen3"])
def test_while_nothing_is_evicted_generation_is_the_plain_one(family):
    model, ids = build(family), prompt_of(30, batch=2)
    cache = StreamingCache.for_model(model, cap=100)
    assert torch.equal(generate(model, ids, cache, new=70), generate(model, ids, new=70))
    assert cache.stats()["events"] == 0
    assert generate(model, ids, cache=StreamingCache.for_model(model, cap=60), new=70).shape == (2, 100)


def test_sampling_with_a_seed():
    model, ids = build("llama"), prompt_of(9)
    options = {"do_sample": True, "temperature": 0.8, "top_k": 20, "new": 80}
    texts = []
    for seed, cap in [(3, 200), (3, None), (4, 200), (3, 30)]:
        torch.manual_seed(seed)
        texts.append(generate(model, ids, cap and StreamingCache.for_model(model, cap=cap), **options))
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2]) and not torch.equal(texts[0], texts[3])
    several = generate(model, ids, StreamingCache.for_model(model, cap=30), num_return_sequences=3, **options)
    assert several.shape == (3, 89) and len(set(map(tuple, several.tolist()))) == 3


def test_a_streamer_gets_every_token_as_it_comes():
    model, ids, streamer = build("gpt_neox"), prompt_of(9), Collect()
    written = generate(model, ids, make_cache(model, small_policy("lazy")), streamer=streamer)
    assert streamer.tokens == written[0].tolist() and streamer.ended


def test_hundreds_of_tokens_past_the_cap():
    model, ids = build("llama"), prompt_of(9)
    cache = StreamingCache.for_model(model, cap=40, compress_every=8)
    written = generate(model, ids, cache, new=450)
    stats = cache.stats()
    assert written.shape == (1, 459) and stats["seen"] == 458 and stats["kept"] <= 40 and stats["events"] > 50


@pytest.mark.parametrize("policy", ["strict", "lazy", "max-drop", "refresh-window-attention", "adaptive-top1"])
def test_long_prompts_come_in_chunks(policy):
    model, ids, options = build("llama"), prompt_of(700), small_policy(policy)
    expected = generate_after(model, ids, make_cache(model, options), chunk=1)
    assert torch.equal(generate_after(model, ids, make_cache(model, options), chunk=200), expected)
    cache = make_cache(model, options)
    if cache.policy.plan_known:
        assert torch.equal(generate(model, ids, cache, prefill_chunk_size=130), expected)
        assert cache.stats()["seen"] == 739
    cache = make_cache(model, options)  # and by itself, whatever the policy: generate() asks for the last logits only
    assert torch.equal(generate(model, ids, cache), expected) and cache.stats()["seen"] == 739
    with pytest.raises(ValueError, match=r"700 tokens in one call.*cache.prefill"):
        model(ids, **with_cache(model, make_cache(model, options)))


def generate_after(model, ids: torch.Tensor, cache: StreamingCache, chunk: int) -> torch.Tensor:
    """All of the prompt but its last token through prefill, the rest through generate()."""
    cache.prefill(model, ids[:, :-1], chunk_tokens=chunk)
    return generate(model, ids, cache)


@pytest.mark.parametrize("policy", ["lazy", "refresh-accumulated-attention", "adaptive-entropy"])
def test_turns_pass_the_whole_conversation_again(policy):
    model, options = build("llama"), small_policy(policy)
    cache, talk = make_cache(model, options), prompt_of(9)
    for turn in range(4):
        before, seen = talk, cache.stats()["seen"]
        if not cache.policy.plan_known:  # such a cache takes a few tokens at a time
            cache.prefill(model, talk[:, seen:-1])
        talk = generate(model, talk, cache, new=25, attention_mask=torch.ones_like(talk))
        assert torch.equal(talk[:, : before.shape[1]], before)
        assert cache.stats()["seen"] == talk.shape[1] - 1
        talk = torch.cat([talk, prompt_of(2, seed=turn)], 1)
    alone = make_cache(model, options)
    logits = feed(model, alone, talk[:, :-2])  # the conversation in one go predicts every answer of it
    assert torch.equal(likeliest(logits[0, 8:33]), talk[0, 9:34])
    assert torch.equal(likeliest(logits[0, -26:-1]), talk[0, -27:-2])


def test_a_turn_in_chunks_is_right_or_refused():
    """Older releases of transformers feed the whole conversation again if they feed it in chunks."""
    model, options = build("llama"), small_policy("lazy")
    cache, twin = make_cache(model, options), make_cache(model, options)
    talk = torch.cat([generate(model, prompt_of(9), cache), prompt_of(20, seed=1)], 1)
    generate(model, prompt_of(9), twin)
    expected = generate(model, talk, twin)
    if Version(transformers.__version__) >= Version("5.23"):
        assert torch.equal(generate(model, talk, cache, prefill_chunk_size=6), expected)
        return
    with pytest.raises(ValueError, match="position_ids"):
        generate(model, talk, cache, prefill_chunk_size=6)
    assert cache.stats()["seen"] == 48
    assert torch.equal(generate(model, talk, cache), expected)


# ---- what is refused, with nothing lost ----


def assisted(model, ids, cache):
    generate(model, ids, cache, prompt_lookup_num_tokens=3)


def crop(model, ids, cache):
    cache.crop(-1)


def beams(model, ids, cache):
    generate(model, ids, cache, num_beams=2)


def own_positions(model, ids, cache):
    model(ids[:, :3], position_ids=torch.arange(3)[None], **with_cache(model, cache))


def own_mask(model, ids, cache):
    model(ids[:, :3], attention_mask=torch.ones(1, 1, 3, 3, dtype=torch.bool), **with_cache(model, cache))


def nothing_new(model, ids, cache):
    generate(model, ids[:, : cache.stats()["seen"]], cache)


def too_long(model, ids, cache):
    model(prompt_of(900), **with_cache(model, cache))


def no_tokens(model, ids, cache):
    model(ids[:, :0], **with_cache(model, cache))


def other_batch(model, ids, cache):
    model(ids.repeat(2, 1), **with_cache(model, cache))


def other_model(model, ids, cache):
    build("llama", seed=1)(ids[:, :3], **with_cache(model, cache))


def pickled(model, ids, cache):
    pickle.dumps(cache)


def without_cache(model, ids, cache):
    model.generate(ids[:, :60], **with_cache(model, cache), use_cache=False, max_new_tokens=3)


REFUSED = {
    assisted: "assisted decoding",
    crop: "cannot be rolled back",
    beams: "batch of 2",
    own_positions: "the next 3 tokens take 50 to 52",
    own_mask: "attention_mask of 4 dimensions",
    nothing_new: "has 50 tokens, and the cache has seen 50: none is new; .*50 tokens seen and at least one new one",
    too_long: "logits_to_keep=1",
    no_tokens: "0 tokens",
    other_batch: "batch of 2, but this cache holds 1 streams",
    other_model: "not attached to the model",
    pickled: r"cannot be pickled; accepted: cache.save\(path\)",
    without_cache: "use_cache=False and a streaming cache exclude each other",
}


@pytest.mark.parametrize("attempt", REFUSED, ids=lambda attempt: attempt.__name__)
def test_a_refusal_is_clear_and_loses_nothing(attempt):
    model, ids, options = build("llama"), prompt_of(80), small_policy("lazy")
    cache = make_cache(model, options)
    start = feed(model, cache, ids[:, :50])
    before = cache.stats()
    with pytest.raises(ValueError, match=REFUSED[attempt]):
        attempt(model, ids, cache)
    assert cache.stats() == before
    whole = feed(model, make_cache(model, options), ids)
    torch.testing.assert_close(torch.cat([start, feed(model, cache, ids[:, 50:])], 1), whole, rtol=0, atol=TOLERANCE)


def test_hidden_states_of_a_prompt_in_chunks_are_refused_and_those_of_new_tokens_are_right():
    model, ids = build("llama"), prompt_of(90)
    asked = {"output_hidden_states": True, "return_dict_in_generate": True}
    cache = make_cache(model, small_policy("adaptive-entropy"))
    with pytest.raises(ValueError, match=r"output_hidden_states of 90 tokens, .*cache.prefill\(model, ids\[:, :-1\]\)"):
        generate(model, ids, cache, **asked)
    assert cache.stats()["seen"] == 0
    cache.prefill(model, ids[:, :-1])
    found = generate(model, ids, cache, **asked)
    assert [states[-1].shape[1] for states in found.hidden_states] == [1] * 40
    whole = generate(model, ids, make_cache(model, small_policy("adaptive-entropy")))
    assert torch.equal(found.sequences, whole), "control: without them the prompt is fed in chunks"
    strict = generate(model, ids, make_cache(model, small_policy("strict")), **asked)
    assert strict.hidden_states[0][-1].shape[1] == 90, "control: a chunk that needs no cut has all of them"


def test_beam_search_on_a_fresh_cache_is_refused_and_says_to_reset():
    model, ids = build("llama"), prompt_of(9)
    cache = make_cache(model, small_policy("lazy"))
    with pytest.raises(ValueError, match=r"beam search is not supported.*reset\(\)"):
        generate(model, ids, cache, num_beams=2)
    cache.reset()
    assert torch.equal(generate(model, ids, cache), generate(model, ids, make_cache(model, small_policy("lazy"))))


@pytest.mark.parametrize("policy", ["adaptive-entropy", "adaptive-top1", "refresh-uncertainty"])
def test_policies_that_read_logits_need_the_causal_model(policy):
    model, ids = build("llama"), prompt_of(60)
    with pytest.raises(ValueError, match="LlamaModel has none, give the causal language model"):
        make_cache(model.model, small_policy(policy))
    cache = make_cache(model, small_policy(policy))
    feed(model, cache, ids[:, :40])
    with pytest.raises(ValueError, match="not its decoder alone"):
        model.model(ids[:, 40:41], **with_cache(model, cache))
    expected = feed(model, make_cache(model, small_policy(policy)), ids)
    torch.testing.assert_close(feed(model, cache, ids[:, 40:]), expected[:, 40:], rtol=0, atol=TOLERANCE)


def test_the_decoder_alone_will_do_for_other_policies():
    model, ids = build("llama"), prompt_of(60)
    cache = make_cache(model.model, small_policy("lazy"))
    with torch.no_grad():
        hidden = torch.cat(
            [model.model(part, **with_cache(model, cache)).last_hidden_state for part in ids.split(7, 1)], 1
        )
        whole = feed(model, make_cache(model, small_policy("lazy")), ids, [7] * 9)
        torch.testing.assert_close(model.lm_head(hidden), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("policy", "allowed"), [("structural", False), ("uncertainty", False), ("uniform", True)])
def test_embeddings_will_do_unless_the_scorer_reads_tokens(policy, allowed):
    model, ids = build("llama"), prompt_of(60)
    cache = StreamingCache.for_model(model, tokenizer=FakeTokenizer(), **small_policy(f"refresh-{policy}"))
    embedded = model.get_input_embeddings()(ids)
    with torch.no_grad():
        if not allowed:
            with pytest.raises(ValueError, match="reads token ids; inputs_embeds are not supported"):
                model(inputs_embeds=embedded[:, :5], **with_cache(model, cache))
            return
        logits = torch.cat([model(inputs_embeds=e, **with_cache(model, cache)).logits for e in embedded.split(1, 1)], 1)
    expected = feed(model, make_cache(model, small_policy(f"refresh-{policy}")), ids)
    torch.testing.assert_close(logits, expected, rtol=0, atol=TOLERANCE)


def test_embeddings_of_a_conversation_go_past_what_was_seen():
    model, ids = build("llama"), prompt_of(60)
    embedded, expected = (
        model.get_input_embeddings()(ids).detach(),
        generate(model, ids, make_cache(model, small_policy("lazy"))),
    )
    cache = make_cache(model, small_policy("lazy"))
    cache.prefill(model, ids[:, :40])
    for new in (10, 20, 40):
        for columns in (new, 40 + new):
            with pytest.raises(ValueError, match=rf"inputs_embeds of {new} tokens, and the cache has seen 40: none is"):
                generate(
                    model, None, cache, inputs_embeds=embedded[:, :new], attention_mask=torch.ones(1, columns).long()
                )
    assert torch.equal(generate(model, None, cache, inputs_embeds=embedded), expected[:, 60:]), "control"


def test_embeddings_are_not_told_to_come_in_chunks_of_ids():
    model = build("llama")
    embedded = model.get_input_embeddings()(prompt_of(900)).detach()
    cache = make_cache(model, small_policy("strict"))
    with pytest.raises(ValueError, match=r"900 tokens .*embeddings are fed in calls of at most cache.max_chunk_tokens"):
        generate(model, None, cache, inputs_embeds=embedded)


def test_the_constructor_says_who_makes_a_cache():
    model = build("llama")
    for call in (lambda: StreamingCache(), lambda: StreamingCache(model, cap=20), lambda: StreamingCache(model)):
        with pytest.raises(
            TypeError, match=r"StreamingCache\(…\) makes no cache; accepted: StreamingCache.for_model\(model"
        ):
            call()
    assert StreamingCache.for_model(model, cap=20).stats()["seen"] == 0, "control"


def test_structure_needs_a_tokenizer():
    with pytest.raises(ValueError, match="give tokenizer=TOKENIZER"):
        StreamingCache.for_model(build("llama"), **small_policy("refresh-structural"))
