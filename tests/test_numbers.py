"""Numbers out of numpy: an integer is one, whatever its width; a float, a bool or a tensor is no whole number."""

import numpy as np
import pytest
import tiny_model
import torch
from oracle.models import token_ids

from sinkstream import Engine, StreamingCache

IDS = token_ids(60).flatten()
WHOLE = [np.int64, np.int16, np.uint8]
WRONG = [np.float64, float, np.bool_, bool, torch.tensor, str]
ENGINE = {"cap": 24, "sink": 3, "compress_every": 4, "max_drop": 2, "chunk_tokens": 16, "rebase_at": 100, "max_sink": 5}
RECALL = {"recall_slots": 4, "recall_every": 4, "recall_block": 2, "recall_query_tokens": 8}
DRAW = {"max_new_tokens": 6, "seed": 5, "top_k": 7, "log_probs": 2, "stream": 0}


@pytest.fixture(scope="module")
def model():
    return tiny_model.tiny_model("llama")


def replies(model, number):
    """A reply of an engine and a step of a cache all of whose whole numbers are made by `number`."""
    made = {name: number(value) for name, value in ENGINE.items()}
    engine = Engine(model, streams=number(1), backend="ring", **made)
    engine.reset(stream=number(0), sink=number(4))
    draw = {name: number(value) for name, value in DRAW.items()}
    reply = engine.generate(IDS, temperature=0.9, logit_bias={number(3): np.float32(0.5)}, **draw)
    cached = {name: made[name] for name in ("cap", "sink", "compress_every", "rebase_at")}
    cache = StreamingCache.for_model(model, **cached, block_tokens=number(8))
    logits = [cache.prefill(model, IDS[None], chunk_tokens=number(16))]
    recalled = {name: number(value) for name, value in RECALL.items()}
    cache = StreamingCache.for_model(model, cap=number(24), recall="recent", recall_gate=np.float32(0), **recalled)
    cache.recall_ask = number(2)
    cache.recall_ask = number(0)
    return reply.tokens, torch.stack([*logits, cache.prefill(model, IDS[None])])


@pytest.mark.parametrize("number", WHOLE, ids=lambda one: one.__name__)
def test_an_integer_of_numpy_is_a_whole_number(model, number):
    tokens, logits = replies(model, int)
    found = replies(model, number)
    assert found[0] == tokens and torch.equal(found[1], logits)


@pytest.mark.parametrize("wrong", WRONG, ids=lambda one: one.__name__)
def test_anything_else_is_refused_by_name(model, wrong):
    engine = Engine(model, cap=24, backend="ring", max_sink=5)
    calls = [
        *((name, lambda name=name: Engine(model, **{"cap": 24, name: wrong(1)})) for name in (*ENGINE, "streams")),
        *(
            (name, lambda name=name: StreamingCache.for_model(model, recall="recent", **{"cap": 24, name: wrong(1)}))
            for name in (*RECALL, "block_tokens")
        ),
        *(
            (name, lambda name=name: engine.generate(IDS, **({"max_new_tokens": 1} | {name: wrong(1)})))
            for name in DRAW
        ),
        ("sink", lambda: engine.reset(stream=0, sink=wrong(4))),
    ]
    for name, call in calls:
        with pytest.raises(ValueError, match=rf"\b{name}=.* is not accepted"):
            call()


def test_a_number_of_few_bits_does_not_overflow(model):
    """The window is the cap less all other parts, here computed with 8 bits."""
    cache = StreamingCache.for_model(model, cap=np.uint8(250), sink=np.uint8(4), compress_every=np.uint8(200))
    assert cache.policy.window == 47 and type(cache.policy.sink) is type(cache.policy.triggers[0].compress_every) is int
