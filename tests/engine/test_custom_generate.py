"""transformers' generate() on the engine: it writes what it writes with a streaming cache of the same policy."""

import pytest
import torch
from oracle.models import build
from streams import PAD, Collect, make_cache, prompt_of, small_policy
from tiny_model import tokenizer
from transformers import LogitsProcessor, StoppingCriteria, StopStringCriteria

from sinkstream.compat import with_cache
from sinkstream.engine import Engine
from sinkstream.policies import PRESETS

FAMILIES = ("gpt_neox", "llama")
NEW = 120  # tokens: many prunes


def engine(model, policy: str = "lazy", **more) -> Engine:
    return Engine(model, tokenizer=tokenizer(), **small_policy(policy), **more)


def options(**more) -> dict:
    return {"do_sample": False, "pad_token_id": PAD, "max_new_tokens": NEW} | more


def both(family: str, policy: str, ids: torch.Tensor, **more) -> tuple:
    """What generate() returns with a streaming cache, and on the engine; then the engine."""
    model = build(family)
    results = []
    for use in ("cache", "engine"):
        given = more | {k: v() for k, v in more.items() if k in ("logits_processor", "stopping_criteria")}
        torch.manual_seed(5)
        if use == "cache":
            given |= with_cache(model, make_cache(model, small_policy(policy)))
        else:
            e = engine(model, policy, streams=len(ids) * more.get("num_return_sequences", 1))
            given |= {"custom_generate": e.custom_generate}
        results.append(model.generate(ids, **options(**given)))
    return (*results, e)


def jobs() -> list[tuple[str, str]]:
    """Every policy on one family in turn, two policies on both."""
    turns = [(FAMILIES[i % 2], p) for i, p in enumerate(PRESETS) if p != "refresh-structural"]
    return sorted({*turns, *((f, p) for f in FAMILIES for p in ("strict", "lazy"))})


@pytest.mark.parametrize(("family", "policy"), jobs())
def test_greedy_writes_what_the_streaming_cache_writes(family, policy):
    ids = prompt_of(45)
    expected, found, e = both(family, policy, ids)
    assert torch.equal(found, expected) and found.shape == (1, 45 + NEW)
    assert e.stats()["seen"] == 45 + NEW and e.stats()["events"] >= 5
    assert len(set(found[0, 45:].tolist())) > 3, "control: the text is not one token"


def test_the_policy_matters():
    """Control of the test above: it would notice the wrong policy."""
    ids = prompt_of(45)
    assert not torch.equal(both("llama", "lazy", ids)[1], both("llama", "strict", ids)[1])


def test_a_long_prompt_needs_no_long_cache():
    ids = prompt_of(700)
    expected, found, e = both("llama", "strict", ids, max_new_tokens=40)
    assert torch.equal(found, expected) and e.stats()["kept"] <= e.policy.peak


@pytest.mark.parametrize(
    "more",
    [
        {"do_sample": True, "temperature": 0.8, "top_k": 30, "top_p": 0.9},
        {"do_sample": True, "min_p": 0.05, "repetition_penalty": 1.2},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
        {"do_sample": True, "num_return_sequences": 3, "temperature": 1.2},
    ],
)
def test_sampling_draws_the_same_tokens(more):
    family = "gpt_neox" if "top_k" in more else "llama"
    expected, found, _ = both(family, "lazy", prompt_of(20), **more)
    assert torch.equal(found, expected)
    assert not torch.equal(found[:1], both(family, "lazy", prompt_of(20))[1]), "control: not plain greedy"


class Forbid(LogitsProcessor):
    """Makes one token impossible."""

    def __init__(self, token: int):
        self.token = token

    def __call__(self, input_ids, scores):
        scores[:, self.token] = float("-inf")
        return scores


class Until(StoppingCriteria):
    """Ends every row at a length."""

    def __init__(self, length: int):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


def test_processors_and_criteria_of_the_callers_own():
    free = both("llama", "lazy", prompt_of(20))[1]
    often = int(free[0, 20:].mode().values)
    more = {"logits_processor": lambda: [Forbid(often)], "stopping_criteria": lambda: [Until(77)]}
    expected, found, e = both("llama", "lazy", prompt_of(20), **more)
    assert torch.equal(found, expected) and found.shape == (1, 77) and often not in found[0, 20:]
    assert e.stats()["seen"] == 77


def test_a_stop_string_ends_it():
    text = tokenizer().decode(both("llama", "lazy", prompt_of(20))[1][0, 20:])
    criteria = {"stopping_criteria": lambda: [StopStringCriteria(tokenizer(), [text[50:54]])]}
    expected, found, _ = both("llama", "lazy", prompt_of(20), **criteria)
    assert torch.equal(found, expected) and found.shape[1] <= 74
    assert tokenizer().decode(found[0]).endswith(text[50:54])


def test_rows_end_one_by_one_and_are_padded():
    ids = prompt_of(20, batch=3)
    free = both("llama", "lazy", ids)[1]
    ends = [int(free[0, 60]), int(free[1, 90])]
    expected, found, e = both("llama", "lazy", ids, eos_token_id=ends)
    assert torch.equal(found, expected) and (found == PAD).any()
    lengths = [int((row != PAD).sum()) for row in found]
    assert [e.stats(stream=i)["seen"] for i in range(3)] == lengths and len(set(lengths)) > 1


def padded(rows: list[torch.Tensor]) -> dict:
    """Rows (tokens,) of any length, left-padded, as inputs of generate()."""
    ids = torch.full((len(rows), max(map(len, rows))), PAD)
    for i, row in enumerate(rows):
        ids[i, ids.shape[1] - len(row) :] = row
    return {"ids": ids, "attention_mask": (ids != PAD).long()}


@pytest.mark.parametrize(("family", "policy"), jobs())
def test_padded_rows_write_what_each_writes_alone(family, policy):
    rows = [prompt_of(n, seed=n)[0] for n in (20, 66, 45)]
    expected, found, e = both(family, policy, **padded(rows), max_new_tokens=40)
    assert torch.equal(found, expected)
    alone = engine(e.model, policy)
    for i, row in enumerate(rows):
        single = e.model.generate(row[None], custom_generate=alone.custom_generate, **options(max_new_tokens=40))
        assert torch.equal(found[i, 66:], single[0, len(row) :])
        assert e.stats(stream=i)["seen"] == len(row) + 40


def test_padded_rows_end_one_by_one():
    rows = [prompt_of(n, seed=n)[0] for n in (20, 66, 45)]
    more = padded(rows) | {"logits_processor": lambda: [Forbid(PAD)]}
    free = both("llama", "lazy", **more)[1]
    expected, found, e = both("llama", "lazy", **more, eos_token_id=[int(free[0, 80]), int(free[1, 130])])
    assert torch.equal(found, expected)
    lengths = [int((row != PAD).sum()) for row in found]
    assert [e.stats(stream=i)["seen"] for i in range(3)] == lengths and len(set(lengths)) > 1


def test_rows_that_end_without_a_token_for_padding_go_on():
    ids = prompt_of(20, batch=2)
    texts = [tokenizer().decode(row) for row in both("llama", "lazy", ids)[1][:, 20:]]
    stops = [texts[0][30:34], texts[1][60:64]]
    more = {"pad_token_id": None, "stopping_criteria": lambda: [StopStringCriteria(tokenizer(), stops)]}
    mask = torch.ones_like(ids)
    expected, found, _ = both("llama", "lazy", ids, attention_mask=mask, **more)
    assert torch.equal(found, expected) and found.shape[1] < 20 + NEW


def test_a_streamer_gets_every_token_and_an_end():
    model, ids, streamer = build("gpt_neox"), prompt_of(20), Collect()
    found = model.generate(ids, custom_generate=engine(model).custom_generate, streamer=streamer, **options())
    assert streamer.tokens == found[0].tolist() and streamer.ended


def test_a_dictionary_is_returned_if_asked_for():
    more = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "repetition_penalty": 1.3}
    expected, found, _ = both("llama", "lazy", prompt_of(20), max_new_tokens=60, **more)
    assert torch.equal(found.sequences, expected.sequences) and len(found.scores) == len(found.logits) == 60
    torch.testing.assert_close(torch.stack(found.scores), torch.stack(expected.scores), rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=0, atol=1e-4)


def test_a_call_starts_over_and_leaves_other_streams_alone():
    model, ids = build("llama"), prompt_of(30)
    e = engine(model, streams=2)
    e.prefill(ids[0, :11], stream=1)
    first, again = (model.generate(ids, custom_generate=e.custom_generate, **options()) for _ in range(2))
    assert torch.equal(first, again)
    assert (e.stats(stream=0)["seen"], e.stats(stream=1)["seen"]) == (30 + NEW, 11)
    more = e.generate([], max_new_tokens=10, stream=0).tokens  # the stream can go on from here
    longer = model.generate(ids, custom_generate=e.custom_generate, **options(max_new_tokens=NEW + 10))
    assert longer[0, -10:].tolist() == more


def test_an_engine_itself_is_not_passed_over_in_silence():
    model = build("llama")
    with pytest.raises(TypeError, match=r"custom_generate=engine\.custom_generate"):
        model.generate(prompt_of(20), custom_generate=engine(model), **options())


REFUSED = {
    "beams": ({"num_beams": 2}, "beam search: .*accepted: greedy decoding and sampling"),
    "prompt lookup": ({"prompt_lookup_num_tokens": 3}, "assisted generation: "),
    "contrastive": ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive search: "),
    "a mask to be added": (
        lambda ids: {"attention_mask": torch.zeros(ids.shape).index_fill(1, torch.tensor([0]), -1e9)},
        "attention_mask holds -1000000000.0",
    ),
    "pads alone": (lambda ids: {"attention_mask": torch.zeros_like(ids)}, "a row of pads alone"),
    "positions": (lambda ids: {"position_ids": torch.arange(3, 3 + ids.shape[1])[None]}, "position_ids of the caller"),
    "rows": (lambda ids: {"num_return_sequences": 3}, "3 rows: .*accepted: at most 2, the engine's streams"),
    "no cache": ({"use_cache": False}, "use_cache=False: "),
    "static cache": ({"cache_implementation": "static"}, "cache_implementation='static': "),
    "attentions": ({"return_dict_in_generate": True, "output_attentions": True}, "output_attentions=True: "),
    "negative prompt": (lambda ids: {"negative_prompt_ids": ids, "guidance_scale": 1.0}, "negative_prompt_ids: "),
    "guidance": ({"guidance_scale": 1.5}, "guidance_scale=1.5: "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_engine_cannot_do_is_refused_by_name(name):
    more, words = REFUSED[name]
    model, ids = build("llama"), prompt_of(20)
    e = engine(model, streams=2)
    e.prefill(ids[0])
    more = {"do_sample": name == "rows"} | (more(ids) if callable(more) else more)
    with pytest.raises(ValueError, match=words):
        model.generate(ids, custom_generate=e.custom_generate, **options(**more))
    assert e.stats()["seen"] == 20


def test_a_cache_an_assistant_and_another_model_are_refused():
    model, other, ids = build("llama"), build("llama", seed=1), prompt_of(20)
    e = engine(model)
    cache = make_cache(model, small_policy("lazy"))
    with pytest.raises(ValueError, match=r"a cache of the caller's own: .*the engine holds the streams itself"):
        model.generate(ids, custom_generate=e.custom_generate, **with_cache(model, cache), **options())
    with pytest.raises(ValueError, match="assist"):
        model.generate(ids, custom_generate=e.custom_generate, assistant_model=other, **options())
    with pytest.raises(ValueError, match="given another model"):
        other.generate(ids, custom_generate=e.custom_generate, **options())
    with pytest.raises(ValueError, match="inputs_embeds"):
        embeds = model.get_input_embeddings()(ids)
        model.generate(inputs_embeds=embeds, custom_generate=e.custom_generate, **options())
    assert e.stats()["seen"] == 0
