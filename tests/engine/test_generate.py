"""Generating: the engine writes what transformers writes through the streaming cache, and stops when it should."""

import numpy as np
import pytest
import torch
from oracle.models import build, token_ids
from streams import FakeTokenizer, likeliest, make_cache, small_policy
from tiny_model import tokenizer
from transformers import TextIteratorStreamer

from sinkstream.compat import with_cache
from sinkstream.engine import Engine
from sinkstream.engine.generation import StopRule
from sinkstream.policies import PRESETS


class Speller(FakeTokenizer):
    """Spells every id as one letter or sign."""

    def decode(self, tokens: list[int]) -> str:
        """One character a token."""
        return "".join(chr(33 + t) for t in tokens)

    def __call__(self, text: str) -> dict:
        return {"input_ids": [ord(c) - 33 for c in text]}


def engine(family: str = "llama", policy: str = "lazy", **more) -> Engine:
    return Engine(build(family), tokenizer=Speller(), **small_policy(policy), **more)


@pytest.mark.parametrize("policy", PRESETS)
def test_greedy_is_greedy_of_transformers(policy):
    family = "gpt_neox" if len(policy) % 2 else "qwen2"
    prompt = token_ids(45)
    expected = cache_text(build(family), small_policy(policy), prompt, 120)
    found = engine(family, policy).generate(prompt, max_new_tokens=120)
    assert found.tokens == expected and found.reason == "length"
    assert len(set(expected)) > 3, "control: the text is not one token"


def cache_text(model, options: dict, prompt: torch.Tensor, tokens: int) -> list[int]:
    """What transformers' greedy generate() writes through a streaming cache."""
    cache = make_cache(model, options)
    cache.prefill(model, prompt[None, :-1])
    out = model.generate(
        prompt[None],
        attention_mask=torch.ones_like(prompt[None]),
        **with_cache(model, cache),
        max_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return likeliest(torch.stack(out.logits, 1))[0].tolist()


def test_a_stream_goes_on_where_it_stopped():
    whole = engine().generate([3, 4, 5], max_new_tokens=90).tokens
    e = engine()
    parts = [e.generate([3, 4, 5], max_new_tokens=30).tokens]
    parts += [e.generate([], max_new_tokens=n).tokens for n in (1, 25, 34)]
    assert [t for part in parts for t in part] == whole
    assert e.stats()["seen"] == 93


def test_a_batch_writes_what_each_prompt_writes_alone():
    prompts = [token_ids(n, seed=n) for n in (60, 3, 24)]
    alone = [engine(policy="refresh-uniform").generate(p, max_new_tokens=50) for p in prompts]
    together = engine(policy="refresh-uniform", streams=3).generate_batch(prompts, max_new_tokens=50)
    assert [g.tokens for g in together] == [g.tokens for g in alone]
    ends = [alone[0].tokens[20]]
    alone = [engine(policy="refresh-uniform").generate(p, max_new_tokens=50, stop_tokens=ends) for p in prompts]
    e = engine(policy="refresh-uniform", streams=3)
    together = e.generate_batch(prompts, max_new_tokens=50, stop_tokens=ends)
    assert [g.tokens for g in together] == [g.tokens for g in alone]
    assert together[0].reason == "stop token"
    assert [e.stats(stream=i)["seen"] for i in range(3)] == [len(p) + len(g.tokens) for p, g in zip(prompts, alone)]


def test_stops():
    free = engine().generate([7], max_new_tokens=60)
    assert free.text == Speller().decode(free.tokens)
    word = free.text[10:13]
    at = free.text.find(word)
    stopped = engine().generate([7], max_new_tokens=60, stop=["never there", word])
    assert (stopped.text, stopped.reason) == (free.text[:at], "stop string")
    assert stopped.tokens == free.tokens[: at + 3]
    seen = []
    called = engine().generate([7], max_new_tokens=60, callback=lambda t, s: seen.append((t, s)) or len(seen) == 5)
    assert called.reason == "callback" and [t for t, _ in seen] == free.tokens[:5] == called.tokens


class Pieces:
    """Byte-level pieces as of a real tokenizer: a character may take several tokens, a token several characters."""

    pieces = (b"ab", b"c", b"\xe2\x82", b"\xac", b"\xe2", b"\x82", b"d ", b" e", b"\xf0\x9f", b"\x98", b"\x80")

    def decode(self, tokens: list[int]) -> str:
        """What a byte-level decoder makes of them: incomplete characters become U+FFFD."""
        return b"".join(self.pieces[t] for t in tokens).decode(errors="replace")


@pytest.mark.parametrize(
    ("tokens", "stop", "ends_at", "text"),
    [
        ([0, 1, 0], "bc", 2, "a"),  # across tokens
        ([6, 2, 3, 0], "€", 3, "d "),  # a character of two tokens
        ([1, 4, 5, 3, 0], "c€", 4, ""),  # of three
        ([8, 9, 10, 0], "😀", 3, ""),
        ([0, 6, 7, 0], "d  e", 3, "ab"),
        ([0, 0, 1, 1], "cc", 4, "abab"),
        ([2, 3, 0], "b", 3, "€a"),  # the stop ends in the middle of a token
        ([0, 1, 0], "x", None, "abcab"),
        ([*[8, 9, 10] * 40, 0, 1], "😀😀a", 121, "😀" * 38),  # far on in a long text
    ],
)
def test_stop_strings_across_tokens_and_parts_of_characters(tokens, stop, ends_at, text):
    rule = StopRule((), [stop], None, Pieces())
    ends = next((n for n in range(1, len(tokens) + 1) if rule.reason(tokens[:n], 0)), None)
    assert ends == ends_at and rule.text(tokens[:ends]) == text


def test_a_streamer_is_given_the_text_as_it_comes():
    streamer = TextIteratorStreamer(tokenizer(), timeout=10)
    e = Engine(build("llama"), tokenizer=tokenizer(), **small_policy("lazy"))
    out = e.generate("Once upon", max_new_tokens=40, streamer=streamer)
    assert "".join(streamer) == "Once upon" + out.text
    streamer = TextIteratorStreamer(tokenizer(), skip_prompt=True, timeout=10)
    more = e.generate([], max_new_tokens=15, streamer=streamer, stop=[out.text[:1] * 9])
    assert "".join(streamer) == more.text
    two = engine(streams=2)
    with pytest.raises(ValueError, match="streamer= takes the text of one stream, and there are 2 prompts"):
        two.generate_batch([[1], [2]], max_new_tokens=3, streamer=streamer)


def test_a_callback_that_fails_leaves_what_was_drawn_in_the_stream_and_ends_the_streamer():
    e, streamer = engine(), TextIteratorStreamer(tokenizer(), timeout=10)

    def fail(token: int, stream: int) -> None:
        seen.append(token)
        if len(seen) == 4:
            raise KeyboardInterrupt

    seen = []
    with pytest.raises(KeyboardInterrupt):
        e.generate([3, 4, 5], max_new_tokens=30, callback=fail, streamer=streamer)
    list(streamer)
    whole = engine().generate([3, 4, 5], max_new_tokens=30).tokens
    assert seen == whole[:4] and e.stats()["seen"] == 7
    assert e.generate([], max_new_tokens=26).tokens == whole[4:]


def test_the_end_of_text_token_of_the_model_ends_the_stream():
    free = engine().generate([7], max_new_tokens=40).tokens
    e = engine()
    e.model.generation_config.eos_token_id = free[8]
    assert e.generate([7], max_new_tokens=40).tokens == free[: free.index(free[8]) + 1]
    e.reset()
    assert e.generate([7], max_new_tokens=40, stop_tokens=()).tokens == free
    e.reset()
    ends = np.array([free[8]])
    assert e.generate([7], max_new_tokens=40, stop_tokens=ends).tokens == free[: free.index(free[8]) + 1]


def test_sampling_repeats_with_its_seed_and_text_can_be_the_prompt():
    options = {"max_new_tokens": 40, "temperature": 0.9, "top_p": 0.9, "repetition_penalty": 1.1}
    a, b, c = (engine().generate("abc", seed=s, **options).tokens for s in (1, 1, 2))
    assert a == b != c


ENCODED = tokenizer()("ab", return_tensors="pt")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"ids": [1], "max_new_tokens": 0}, "max_new_tokens=0"),
        ({"ids": [], "max_new_tokens": 3}, "has not begun"),
        ({"ids": [1], "max_new_tokens": 3, "temprature": 1.0}, "unknown option 'temprature'"),
        ({"ids": [1], "max_new_tokens": 3, "stop": [""]}, "not empty"),
        ({"ids": [1], "max_new_tokens": 3, "stream": 1}, "stream=1"),
        ({"ids": None, "max_new_tokens": 3}, "ids are NoneType; accepted: a tensor"),
        ({"ids": ENCODED, "max_new_tokens": 3}, "ids are BatchEncoding; accepted: .*of what a tokenizer returns, its"),
        ({"ids": b"ab", "max_new_tokens": 3}, "ids are bytes; accepted: a tensor"),
        ({"ids": ["a", "b"], "max_new_tokens": 3}, "ids are list of other things; accepted: a tensor"),
        ({"ids": [[1, 2], [3]], "max_new_tokens": 3}, "ids are list of other things; accepted: a tensor"),
        ({"ids": [1], "max_new_tokens": 3, "stop": 5}, "stop=5 is not accepted; accepted: a string"),
        ({"ids": [1], "max_new_tokens": 3, "stop_tokens": 5}, "stop_tokens=5 is not accepted; .*ids from 0 to 96"),
        ({"ids": [1], "max_new_tokens": 3, "stop_tokens": "a"}, "stop_tokens='a' is not accepted"),
        ({"ids": [1], "max_new_tokens": 3, "stop_tokens": [97]}, r"stop_tokens=\[97\] is not accepted"),
        ({"ids": [1], "max_new_tokens": 3, "stop_tokens": torch.tensor([5])}, "stop_tokens=tensor.* is not accepted"),
        ({"ids": [1], "max_new_tokens": 3, "callback": 5}, "callback=5 is not accepted; accepted: a callable"),
        ({"ids": [1], "max_new_tokens": 3, "streamer": 5}, "streamer=5 is not accepted; accepted: a streamer"),
    ],
)
def test_wrong_arguments_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        engine().generate(**arguments)


def test_text_without_a_tokenizer_is_refused():
    e = Engine(build("llama"), window=20)
    with pytest.raises(ValueError, match="needs a tokenizer"):
        e.generate("abc", max_new_tokens=3)
    with pytest.raises(ValueError, match="stop strings"):
        e.generate([1], max_new_tokens=3, stop="x")
    with pytest.raises(ValueError, match="2 prompts; accepted: 1 to 1"):
        e.generate_batch([[1], [2]], max_new_tokens=3)
