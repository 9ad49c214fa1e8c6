"""Token ids that a model does not know are refused with their place, before anything is fed."""

import pytest
import tiny_model
import torch
from oracle.models import VOCAB, build, token_ids
from streams import TOLERANCE, feed, make_cache, small_policy

from sinkstream.cache.streaming import CHUNK
from sinkstream.cache.vocabulary import check_vocabulary, vocabulary_size
from sinkstream.compat import with_cache
from sinkstream.engine import Engine
from sinkstream.evaluation.run import run, run_interleaved
from sinkstream.evaluation.settings import RunSettings

POLICY = small_policy("strict")


def with_wrong(tokens: int, place: int, wrong: int) -> torch.Tensor:
    ids = token_ids(tokens).clone()
    ids[place] = wrong
    return ids


def message(wrong: int, where: str) -> str:
    return f"token id {wrong} at {where} is not in the vocabulary of {VOCAB} tokens; accepted: 0 to {VOCAB - 1}$"


@pytest.mark.parametrize(("place", "wrong"), [(0, VOCAB), (39, -1), (17, 10**9)])
def test_the_first_wrong_token_of_a_text_is_named(place, wrong):
    with pytest.raises(ValueError, match=message(wrong, f"position {place}")):
        check_vocabulary(with_wrong(40, place, wrong), VOCAB)
    check_vocabulary(with_wrong(40, place, VOCAB - 1), VOCAB)
    check_vocabulary(torch.empty(0, dtype=torch.int64), VOCAB)


@pytest.mark.parametrize("wrong", [VOCAB, -2])
def test_a_prompt_of_the_cache_is_refused_and_the_stream_goes_on(wrong):
    model = build("llama")
    ids = token_ids(60)[None]
    wanted = feed(model, make_cache(model, POLICY), ids)[:, -1]
    cache = make_cache(model, POLICY)
    cache.prefill(model, ids[:, :30])
    with pytest.raises(ValueError, match=message(wrong, "position 25")):
        cache.prefill(model, with_wrong(40, 25, wrong)[None], chunk_tokens=8)
    assert cache.seen_tokens == 30
    torch.testing.assert_close(cache.prefill(model, ids[:, 30:]), wanted, rtol=0, atol=TOLERANCE)


def test_rows_are_named_and_pads_that_are_never_fed_do_not_count():
    model = build("llama")
    cache = make_cache(model, POLICY)
    ids = torch.stack([token_ids(12), with_wrong(12, 9, VOCAB)])
    with pytest.raises(ValueError, match=message(VOCAB, "position 9 of row 1")):
        cache.prefill(model, ids)
    ids, mask = torch.stack([with_wrong(12, 0, -100)] * 2), torch.ones(2, 12, dtype=torch.int64)
    mask[:, 0] = 0
    assert cache.prefill(model, ids, attention_mask=mask).isfinite().all()
    ids[1, 5] = VOCAB
    with pytest.raises(ValueError, match=message(VOCAB, "position 5 of row 1")):
        make_cache(model, POLICY).prefill(model, ids, attention_mask=mask)


@pytest.mark.parametrize("place", [5, 2 * CHUNK - 1])
@pytest.mark.parametrize("policy", ["strict", "adaptive-entropy"])
def test_generate_feeds_no_chunk_of_a_prompt_with_a_wrong_token(policy, place):
    model = build("llama")
    cache, ids = make_cache(model, small_policy(policy)), with_wrong(2 * CHUNK, place, VOCAB)
    with pytest.raises(ValueError, match=message(VOCAB, f"position {place}")):
        model.generate(ids[None], **with_cache(model, cache), max_new_tokens=2)
    assert cache.seen_tokens == 0


def test_a_question_of_the_cache_is_checked():
    model = build("llama")
    cache = make_cache(model, POLICY, recall="lexical", recall_slots=8)
    with pytest.raises(ValueError, match="question_ids: " + message(VOCAB, "position 1")):
        cache.ask(model, torch.tensor([[1, VOCAB]]))


ENGINE = {
    "prefill": lambda e, ids: e.prefill(ids),
    "generate": lambda e, ids: e.generate(ids, max_new_tokens=2),
    "score": lambda e, ids: e.score(ids),
    "join": lambda e, ids: e.join(ids),
}


@pytest.mark.parametrize("call", ENGINE)
@pytest.mark.parametrize("given", [list, torch.Tensor.clone])
def test_the_engine_refuses_prompts(call, given):
    engine = Engine(build("llama"), **POLICY)
    with pytest.raises(ValueError, match=message(VOCAB, "position 3")):
        ENGINE[call](engine, given(with_wrong(9, 3, VOCAB)))
    assert engine.active == []
    engine.close()


def test_a_step_of_the_engine_refuses_a_token_on_the_host():
    engine = Engine(build("llama"), streams=2, **POLICY)
    for stream in range(2):
        engine.prefill(token_ids(5), stream=stream)
    with pytest.raises(ValueError, match=message(VOCAB, "position 1")):
        engine.step([1, VOCAB])
    with pytest.raises(ValueError, match=rf"token id {VOCAB} for stream 1 .*or a negative one for the likeliest"):
        engine.advance(torch.tensor([1, VOCAB]), [0, 1])
    seen = [counters.seen for counters in engine.state.counters]
    engine.advance(torch.tensor([1, VOCAB]), [0])  # the token of a stream that takes no part
    engine.advance(torch.tensor([-1, -1]), [0, 1])
    assert seen == [5, 5] and [counters.seen for counters in engine.state.counters] == [7, 6]
    engine.close()


@pytest.mark.parametrize("backend", ["hf", "ring"])
def test_an_evaluation_refuses_a_text_of_another_tokenizer(backend):
    loaded = tiny_model.loaded()
    settings = RunSettings("strict", 16, backend=backend)
    assert vocabulary_size(loaded.model) == VOCAB
    with pytest.raises(ValueError, match="the text: " + message(VOCAB, "position 39")):
        run(loaded, with_wrong(40, 39, VOCAB), settings)
    with pytest.raises(ValueError, match="the text: " + message(VOCAB, "position 39")):
        run_interleaved(loaded, with_wrong(40, 39, VOCAB), [settings] * 2)
    assert run(loaded, token_ids(40), settings).status == "complete"
