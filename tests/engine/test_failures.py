"""Generating that fails: the reader of a streamer gets an end, and logits that are not numbers are an error."""

import gc

import pytest
from oracle.models import build, token_ids
from transformers.generation.streamers import BaseStreamer

from sinkstream.engine import Engine
from sinkstream.engine.graphs import nothing_collected
from sinkstream.engine.prompt import PromptForward


class Ends(BaseStreamer):
    """Counts how often it is ended."""

    def __init__(self):
        self.ended, self.tokens = 0, []

    def put(self, value):
        assert not self.ended
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended += 1


def engine(model=None, **options) -> Engine:
    return Engine(model or build("llama"), sink=4, window=20, backend="ring", **options)


def fail(*_):
    raise MemoryError("the prompt does not fit")


FAILURES = {
    "option": ({"temperature": -1}, ValueError),
    "unknown option": ({"top_q": 1}, ValueError),
    "length": ({"max_new_tokens": 0}, ValueError),
    "prompt": ({"prompt": [5000]}, ValueError),
    "forward": ({"fails": True}, MemoryError),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_streamer_is_ended_once_whatever_fails(failure, monkeypatch):
    options, error = FAILURES[failure]
    options = {"prompt": token_ids(30), "max_new_tokens": 5} | options
    e, streamer = engine(), Ends()
    if options.pop("fails", False):
        monkeypatch.setattr(PromptForward, "append", fail)
    with pytest.raises(error):
        e.generate(options.pop("prompt"), streamer=streamer, stop_tokens=(), **options)
    assert streamer.ended == 1


def test_a_streamer_is_ended_once_when_all_is_well_and_through_transformers():
    e, streamer = engine(), Ends()
    out = e.generate(token_ids(30), max_new_tokens=5, stop_tokens=(), streamer=streamer)
    assert streamer.ended == 1 and streamer.tokens[30:] == out.tokens
    for more, ok in (({}, True), ({"guidance_scale": 3.0}, False)):
        streamer = Ends()
        given = {"custom_generate": e.custom_generate, "streamer": streamer, "max_new_tokens": 3, "pad_token_id": 0}
        if ok:
            e.model.generate(token_ids(30)[None], **given)
        else:
            with pytest.raises(ValueError, match="guidance_scale"):
                e.model.generate(token_ids(30)[None], **given, **more)
        assert streamer.ended == 1


SAMPLED = [
    {"temperature": 1.0},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 0.7, "min_p": 0.1, "repetition_penalty": 1.3},
]


@pytest.mark.parametrize("options", SAMPLED)
def test_the_index_of_the_token_is_told(options):
    e = engine()
    e.prefill(token_ids(30))
    counted = []

    def poison(token: int, stream: int) -> None:
        counted.append(token)
        if len(counted) == 3:
            e.state.logits[0, 5] = float("nan")

    with pytest.raises(ValueError, match="new token 3 of stream 0 cannot be drawn: a logit is NaN or infinite"):
        e.generate([], max_new_tokens=8, stop_tokens=(), callback=poison, **options)
    assert len(counted) == 3
    e.reset(stream=0)
    assert len(e.generate(token_ids(30), max_new_tokens=8, stop_tokens=(), **options).tokens) == 8
    e.state.logits[0, 5] = float("nan")
    with pytest.raises(ValueError, match="new token 0 of stream 0 cannot be drawn"):
        e.generate([], max_new_tokens=8, stop_tokens=(), **options)


def test_no_garbage_is_collected_while_a_graph_is_captured():
    """An engine that nobody holds any more frees its graphs when it is collected, which would end the capture."""
    assert gc.isenabled()
    with pytest.raises(KeyError), nothing_collected():
        assert not gc.isenabled()
        raise KeyError
    assert gc.isenabled()
    gc.disable()
    try:
        with nothing_collected():
            pass
        assert not gc.isenabled(), "who had switched it off finds it so"
    finally:
        gc.enable()
