"""Prompts and blocks that cross prunes at which attention chooses, in the model's own layers; by steps otherwise."""

import importlib

import pytest
import torch
from oracle.models import build, token_ids
from streams import TOLERANCE, feed, make_cache, nll_of, oracle_run

from sinkstream.cache import StreamingCache, choices
from sinkstream.cache.chosen_frames import ChosenFrames
from sinkstream.cache.stream import Stream
from sinkstream.compat import with_cache
from sinkstream.engine import Engine

SIZES = {"sink": 3, "window": 31}
CROSSING = {  # several queries and no sinks at once; staged drops and overlap; attention added up
    "window-attention": SIZES | {"compress_every": 5, "refresh": 6, "observation": 14},
    "last-query": SIZES | {"compress_every": 11, "overlap": 4, "max_drop": 3, "slack": 8, "refresh": 9},
    "accumulated-attention": SIZES | {"compress_every": 4, "max_drop": 2, "refresh": 13},
}
FAMILIES = ("llama", "gpt_neox", "qwen3")
TOKENS = 200


def small_cache(model, scorer: str, **more) -> StreamingCache:
    return make_cache(model, CROSSING[scorer] | {"scorer": scorer}, **more)


@pytest.fixture
def chunks(monkeypatch) -> list[int]:
    """Prunes within each chunk that has chosen."""
    made, found = ChosenFrames.__init__, []

    def counted(frames, ring, steps, observer):
        found.append(int((steps.drop[1:] > 0).sum()))
        made(frames, ring, steps, observer)

    monkeypatch.setattr(ChosenFrames, "__init__", counted)
    return found


@pytest.mark.parametrize(("scorer", "family"), list(zip(CROSSING, FAMILIES)))
def test_a_prompt_crosses_its_prunes(scorer, family, chunks, monkeypatch):
    """In pieces, with a rebase between them and steps behind; then wrong choices, which would show."""
    monkeypatch.setattr(Stream, "capacity", lambda stream: stream.policy.peak + 75)
    model, ids = build(family, layers=2), token_ids(TOKENS)
    expected = oracle_run(model, ids, CROSSING[scorer] | {"scorer": scorer}).nll

    def worst() -> float:
        cache, found = small_cache(model, scorer, rebase_at=60), []
        for first, end in ((0, 20), (20, 110), (110, 165)):
            logits = cache.prefill(model, ids[None, first:end], chunk_tokens=70)[0]
            found.append(-logits.double().log_softmax(-1)[ids[end]] - expected[end - 1])
        assert cache.stats()["rebases"]
        logits = feed(model, cache, ids[None, 165:])
        return max(worst_of(found), (nll_of(logits, ids[None, 165:])[0] - expected[165:]).abs().max().item())

    assert worst() < TOLERANCE and len(chunks) <= 4 and sum(chunks) >= 15
    best = importlib.import_module("sinkstream.kernels.pinned_sets")._best
    monkeypatch.setattr("sinkstream.kernels.pinned_sets._best", lambda scores, keep: best(-scores, keep))
    assert worst() > 1e-3


def worst_of(found: list[torch.Tensor]) -> float:
    return torch.stack(found).abs().max().item()


@pytest.mark.parametrize("scorer", ["window-attention", "accumulated-attention"])
def test_a_chunk_that_fails_never_came(scorer, chunks):
    model, ids = build("llama", layers=2), token_ids(TOKENS)
    logits = []
    for fails in (False, True):
        cache = small_cache(model, scorer)
        cache.prefill(model, ids[None, :90])
        if fails:
            handle = model.lm_head.register_forward_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(ids[None, 130:170], **with_cache(model, cache))
            handle.remove()
        logits.append(cache.prefill(model, ids[None, 90:130]))
    assert len(chunks) >= 5 and (logits[0] - logits[1]).abs().max() < TOLERANCE


def test_chunks_that_cannot_choose_on_the_way_are_cut(chunks, monkeypatch):
    """Rows, original positions, and sets that are too large, those of an engine too."""
    model, ids = build("llama", layers=2), token_ids(TOKENS)
    small_cache(model, "window-attention").prefill(model, ids[None].expand(2, -1))
    small_cache(model, "window-attention", positions="original").prefill(model, ids[None])
    monkeypatch.setattr(choices, "SET_TOKENS", 5)
    expected = small_cache(model, "window-attention").prefill(model, ids[None])
    assert chunks == []
    logits = Engine(model, scorer="window-attention", **CROSSING["window-attention"]).prefill(ids.tolist())
    assert (logits - expected).abs().max() < TOLERANCE


def test_a_chunk_has_no_more_prunes_than_its_sets_have_room(chunks, monkeypatch):
    model, ids = build("llama", layers=2), token_ids(TOKENS)
    expected = small_cache(model, "window-attention").prefill(model, ids[None])
    monkeypatch.setattr(choices, "SET_TOKENS", 30)
    before = len(chunks)
    assert (small_cache(model, "window-attention").prefill(model, ids[None]) - expected).abs().max() < TOLERANCE
    assert max(chunks[:before]) > 20 and max(chunks[before:]) == 4, "6 pinned tokens, 5 sets"


def test_no_graph_grows_along_with_the_stream(chunks):
    model, ids = build("llama", layers=2), token_ids(TOKENS)
    cache = small_cache(model, "accumulated-attention")
    cache.prefill(model, ids[None, :100])
    logits = model(ids[None, 100:140], **with_cache(model, cache)).logits
    ring = cache.stream.ring
    kept = [ring.keys, ring.values, ring.pinned_keys, ring.pinned_values, *ring.channels.values()]
    assert chunks and logits.requires_grad and not any(t.requires_grad for t in kept)
