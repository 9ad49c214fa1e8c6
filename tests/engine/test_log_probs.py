"""Log-probabilities of what an engine writes, against the module's own forward in float64."""

import pytest
import torch
from oracle.models import build, token_ids
from streams import small_policy

from sinkstream.engine import Engine
from sinkstream.engine import log_probs as module
from sinkstream.engine.generation import SamplingWriter, StopRule, write


@pytest.mark.parametrize("backend", ["ring", "kernels"])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "top_k": 9, "repetition_penalty": 1.3}])
def test_they_are_those_of_the_module(options, backend, monkeypatch):
    """While nothing is evicted; room is made several times."""
    monkeypatch.setattr(module, "BLOCK", 3)
    model, prompt = build("llama"), token_ids(6)
    e = Engine(model, backend=backend, streams=2, **small_policy("strict"))
    e.prefill(token_ids(5, seed=9), stream=0)
    found = e.generate(prompt, max_new_tokens=10, stream=1, stop_tokens=(), log_probs=4, **options)
    ids = torch.cat([torch.as_tensor(prompt), torch.tensor(found.tokens)])
    with torch.no_grad():
        expected = model(ids[None]).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
    drawn = expected.gather(1, torch.tensor(found.tokens)[:, None])[:, 0]
    assert torch.allclose(torch.tensor(found.log_probs).double(), drawn, atol=1e-4)
    assert not torch.allclose(torch.tensor(found.log_probs).double(), expected.mean(-1), atol=1e-2), "control"
    best = expected.topk(4, -1)
    assert [[token for token, _ in row] for row in found.top_log_probs] == best.indices.tolist()
    values = torch.tensor([[value for _, value in row] for row in found.top_log_probs])
    assert torch.allclose(values.double(), best.values, atol=1e-4)
    if not options:
        assert found.log_probs == pytest.approx(values[:, 0].tolist()), "greedy takes the likeliest"


def test_each_stream_has_its_own_and_nothing_else_changes():
    prompts = [token_ids(n, seed=n) for n in (3, 30, 11)]
    options = {"temperature": 1.0, "max_new_tokens": 40, "seed": 5, "stop_tokens": [7, 8, 9, 10, 11]}

    def engine(streams: int) -> Engine:
        return Engine(build("llama"), streams=streams, **small_policy("lazy"))

    together = engine(3).generate_batch(prompts, log_probs=0, **options)
    plain = engine(3).generate_batch(prompts, **options)
    assert [g.tokens for g in together] == [g.tokens for g in plain]
    assert all(g.log_probs is None and g.top_log_probs is None for g in plain)
    assert len({len(g.tokens) for g in together}) > 1, "streams end one by one"
    for i, (prompt, found) in enumerate(zip(prompts, together)):
        assert found.top_log_probs == [[]] * len(found.tokens)
        alone = engine(1).generate(prompt, log_probs=0, **options | {"seed": 5 + i})
        assert alone.log_probs == pytest.approx(found.log_probs, abs=1e-5)


def test_the_latest_are_those_of_the_end():
    e, seen = Engine(build("llama"), **small_policy("lazy")), []
    e.prefill(token_ids(9))
    with e.state.recording(looks=True) as recorder:
        noted = module.LogProbs(e.state, 3)
        rule = StopRule((), (), lambda token, stream: seen.append(noted.latest(stream, token)), None)
        writer = SamplingWriter([0], recorder, rule, None, noted)
        write(e, writer, [0], 12)
        found = writer.finish()[0]
    assert [value for value, _ in seen] == found.log_probs and [top for _, top in seen] == found.top_log_probs


def test_a_wrong_count_is_refused_before_anything_is_fed():
    e = Engine(build("llama"), **small_policy("lazy"))
    for count in (-1, 21, True, "2", 1.0):
        with pytest.raises(ValueError, match=r"log_probs=.*accepted: a whole number from 0 to 20"):
            e.generate([1], max_new_tokens=3, log_probs=count)
    assert e.stats()["seen"] == 0


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_p": 0.9, "presence_penalty": 2.0}])
def test_a_graph_notes_what_its_logits_say(options):
    """Together as one by one, where the logits before each token are at hand."""
    e = Engine(build("llama", torch.float16).cuda(), backend="fused", **small_policy("lazy"))
    prompt = token_ids(15)
    e.prefill(prompt)
    together = e.generate([], max_new_tokens=30, stop_tokens=(), log_probs=3, **options)
    e.reset()
    e.prefill(prompt)
    for i, token in enumerate(together.tokens):
        expected = e.state.logits[0].double().log_softmax(-1)
        best = expected.topk(3)
        assert together.log_probs[i] == pytest.approx(float(expected[token]), abs=1e-5)
        assert [value for _, value in together.top_log_probs[i]] == pytest.approx(best.values.tolist(), abs=1e-5)
        assert [float(expected[one]) for one, _ in together.top_log_probs[i]] == pytest.approx(best.values.tolist())
        e.advance(torch.tensor([token], device="cuda"), [0])
