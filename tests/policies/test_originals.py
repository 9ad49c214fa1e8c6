"""Scorers beside the definitions of their originals, computed from the attention that transformers itself reports.

At the first prune nothing was evicted before: every position is the stream's own, and each original is a line of
arithmetic on the attention matrices (layers, heads, queries, keys) or on the keys. From the second prune on streaming
forces a difference, because the evicted keys are gone and the others stand elsewhere; the oracle covers that.
"""

import dataclasses

import pytest
import torch
from oracle.models import build, token_ids
from streams import make_cache
from transformers import DynamicCache

from sinkstream.compat import with_cache
from sinkstream.policies import SCORERS, Candidates

SINK, KEPT, OBSERVED = 2, 6, 5
OPTIONS = {"sink": SINK, "refresh": KEPT, "window": 30, "compress_every": 12}


def first_candidates(name, monkeypatch, **options):
    """What the scorer is given at the first prune, (layers, kv_heads, candidates) each, its scores, and the prefix."""
    model, ids, seen = build("llama", torch.float64), token_ids(120), []
    scorer = SCORERS[name]
    original = scorer.score

    def spy(self, candidates: Candidates):
        scores = original(self, candidates)
        fields = {field.name: getattr(candidates, field.name) for field in dataclasses.fields(Candidates)}
        found = {name: value[:, 0].clone() for name, value in fields.items() if value is not None}  # views of the cache
        seen.append((found, scores[:, 0].clone()))
        return scores

    monkeypatch.setattr(scorer, "score", spy)
    cache = make_cache(model, {**OPTIONS, "scorer": name, **options})
    for t in range(len(ids)):
        with torch.no_grad():
            model(ids[None, t : t + 1], **with_cache(model, cache))
        if seen:
            break
    return *seen[0], model, ids[:t]  # a prune comes before the token that needs the room


def attentions(model, ids):
    """The attention of a plain forward, (layers, kv_heads, group, queries, keys), and the keys before rotation."""
    eager = build("llama", torch.float64)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        out = eager(ids[None], output_attentions=True)
    stacked = torch.stack(out.attentions)[:, 0]
    return stacked.unflatten(1, (eager.config.num_key_value_heads, -1))


def test_window_attention_is_snapkv_without_pooling(monkeypatch):
    """SnapKV: attention of the latest queries, summed over them; heads of a group averaged, as its authors advise."""
    fields, scores, model, ids = first_candidates("window-attention", monkeypatch, observation=OBSERVED)
    received = attentions(model, ids)[..., -OBSERVED:, :].sum(-2).mean(2)
    at = fields["position"].flatten()
    torch.testing.assert_close(scores, received[..., at].to(scores.dtype), atol=1e-5, rtol=1e-4)
    fewer = attentions(model, ids)[..., -OBSERVED + 1 :, :].sum(-2).mean(2)
    assert not torch.allclose(scores, fewer[..., at].to(scores.dtype), atol=1e-5), "one query less would show"


def test_last_query_is_tova_for_each_kv_head(monkeypatch):
    """TOVA: attention of the newest query, which TOVA averages over all heads of a layer; ours keeps kv heads apart."""
    fields, scores, model, ids = first_candidates("last-query", monkeypatch)
    received = attentions(model, ids)[..., -1, :].mean(2)
    at = fields["position"].flatten()
    torch.testing.assert_close(scores, received[..., at].to(scores.dtype), atol=1e-5, rtol=1e-4)
    of_layer = received.mean(1, keepdim=True).expand_as(received)[..., at]
    assert not torch.allclose(scores, of_layer.to(scores.dtype), atol=1e-5), "TOVA's own choice is one a layer"


def test_accumulated_attention_is_h2o(monkeypatch):
    """H2O: attention that a token received from every query since it was written."""
    fields, scores, model, ids = first_candidates("accumulated-attention", monkeypatch)
    received = attentions(model, ids).sum(-2).mean(2)
    at = fields["position"].flatten()
    torch.testing.assert_close(scores, received[..., at].to(scores.dtype), atol=1e-5, rtol=1e-4)
    recent = attentions(model, ids)[..., len(ids) // 2 :, :].sum(-2).mean(2)
    assert not torch.allclose(scores, recent[..., at].to(scores.dtype), atol=1e-2), "the early queries count"


def test_key_norm_keeps_the_smallest_norms(monkeypatch):
    """Devoto et al.: the keys of smallest L2 norm, in steps of 0.1 % here."""
    fields, scores, model, ids = first_candidates("key-norm", monkeypatch)
    plain, cache = build("llama", torch.float64), DynamicCache(config=model.config)
    with torch.no_grad():
        plain(ids[None], **with_cache(plain, cache))
    norms = torch.stack([layer.keys[0].norm(dim=-1) for layer in cache.layers])[..., fields["position"].flatten()]
    best, ours = norms.topk(KEPT, largest=False).values, norms.gather(-1, scores.topk(KEPT).indices)
    torch.testing.assert_close(ours.sort(-1).values, best.sort(-1).values, rtol=2e-3, atol=0)
    worst = norms.topk(KEPT).values
    assert not torch.allclose(worst.sort(-1).values, best.sort(-1).values, rtol=0.05), "the largest norms are others"


@pytest.mark.parametrize("name", ["window-attention", "last-query", "accumulated-attention", "key-norm"])
def test_sinks_and_window_do_not_compete(name, monkeypatch):
    """The originals let recent tokens stay; here the sinks do as well, which only StreamingLLM asks for."""
    fields, *_ = first_candidates(name, monkeypatch)
    assert fields["position"].min() == SINK
