"""A chooser of a user's own that does not keep the contract: said by name, in the cache and in the engine."""

import numpy as np
import pytest
import torch
from oracle.models import build
from recall_case import SMALL, STRICT, repetitive

from sinkstream import Engine, StreamingCache
from sinkstream.archive import Chooser, Hits, Index

OPTIONS = {name: value for name, value in SMALL.items() if name != "recall_block"}


class Given(Index):
    """An index whose scores are what a function of the number of blocks gives."""

    def __init__(self, scores):
        self.given = scores

    def scores(self, query):
        return self.given(len(query.blocks(16)))


class GivenHits(Given):
    def hits(self, query, blocks):
        return Hits(np.arange(blocks.start, blocks.stop), np.asarray(self.given(len(blocks))))


class Own(Chooser):
    def begins_with(self, index):
        object.__setattr__(self, "index", index)
        return self

    def start(self):
        return self.index


def fed(kind, index):
    """Feed a text with a chooser of one's own; returns how often something came back."""
    chooser, ids, model = Own().begins_with(index), repetitive().flatten(), build("llama")
    if kind == "cache":
        recalled = StreamingCache.for_model(model, **STRICT, recall=chooser, **OPTIONS)
        recalled.prefill(model, ids[None])
    else:
        recalled = Engine(model, backend="ring", **STRICT, recall=chooser, **OPTIONS)
        recalled.prefill(ids)
    return recalled.stats()["recalls"]


@pytest.mark.parametrize("kind", ["cache", "engine"])
@pytest.mark.parametrize(
    ("index", "words"),
    [
        (
            Given(lambda n: np.where(np.arange(n) == 0, np.nan, 2.0)),
            "Given gave a score that is NaN; accepted: numbers",
        ),
        (GivenHits(lambda n: np.full(n, np.nan)), "GivenHits gave a score that is NaN"),
        (Given(lambda n: np.ones(n + 1)), r"Given gave scores of shape \(\d+,\); accepted: \(\d+,\), one for each"),
        (
            Given(lambda n: ["much"] * n),
            r"Given gave scores that are no numbers \(could not.*; accepted: \(\d+,\) numbers",
        ),
        (Given(lambda n: None), r"Given gave scores of shape \(\)"),
        (None, r"Own.start\(\) gave None; accepted: an Index, a new one for each stream"),
    ],
)
def test_what_a_chooser_must_not_do_is_said_by_name(kind, index, words):
    with pytest.raises(ValueError, match=words):
        fed(kind, index)


@pytest.mark.parametrize(("name", "value"), [("block", 0), ("block", 2.5), ("query_tokens", -1), ("alarms", -1)])
def test_numbers_that_an_own_chooser_sets_anew_are_checked(name, value):
    own = type("Own", (Own,), {name: value})().begins_with(Given(lambda n: [2.0] * n))
    object.__setattr__(own, name, value)
    with pytest.raises(ValueError, match=rf"Own\.{name}={value} is not accepted; accepted: a whole number of at least"):
        StreamingCache.for_model(build("llama"), **STRICT, recall=own)


@pytest.mark.parametrize("make", [list, np.asarray, torch.tensor, lambda x: torch.tensor(x, dtype=torch.bfloat16)])
def test_scores_may_be_a_list_an_array_or_a_tensor(make):
    assert fed("cache", Given(lambda n: make([2.0] * n))) == fed("cache", Given(lambda n: np.full(n, 2.0))) > 0


@pytest.mark.parametrize("make", [StreamingCache.for_model, Engine], ids=["cache", "engine"])
def test_what_is_no_tokenizer_and_a_window_of_one_token_are_refused(make):
    with pytest.raises(ValueError, match="tokenizer='gpt2' is not accepted; accepted: a tokenizer of transformers"):
        make(build("llama"), **STRICT, recall="lexical", tokenizer="gpt2")
    with pytest.raises(ValueError, match="a window of one token; accepted: a larger cap, or fewer sinks"):
        make(build("llama"), cap=5, recall="lexical")
