"""A scorer of somebody else's: the oracle works out the candidates in float64 and asks the scorer's own `score`.

So a contributed scorer is checked against choices that the cache had no part in.
"""

from dataclasses import dataclass, fields
from typing import ClassVar

import pytest
import torch
from oracle.models import build, token_ids
from streams import TOLERANCE, FakeTokenizer, feed, make_cache, nll_of, oracle_run, small_policy

from sinkstream.cache import POSITIONS, pinned
from sinkstream.engine import Engine
from sinkstream.policies import PRESETS, SCORERS, Candidates, EvictionPolicy, Scorer, scored_field
from sinkstream.policies.scorers.base import FieldScorer

TOKENS = 160
RULE = {"sink": 3, "window": 12, "refresh": 7, "compress_every": 5}
CPU_BACKENDS = ("ring", "kernels")  # the latter through the kernels' twins
READ = frozenset(f.name for f in fields(Candidates)) - {"position"}


@pytest.fixture(params=["per head", "for all"])
def mixed_scorer(request):
    """A scorer that reads everything, for every head by itself or for all heads together."""
    per_head_choice = request.param == "per head"

    @dataclass(frozen=True)
    class Mixed(Scorer):
        """Reads everything."""

        needs: ClassVar[frozenset[str]] = READ
        per_head: ClassVar[bool] = per_head_choice
        observed_queries = 20

        def score(self, c):
            score = c.accumulated / 3 + 2 * c.attention + 2 * c.nll + 30 * c.entropy  # weights: each of them counts
            score = score - c.key_norm + c.structure + c.position % 5 / 2
            return score if per_head_choice else score.mean((0, 2), keepdim=True)

    SCORERS.register("mixed")(Mixed)
    yield RULE | {"scorer": "mixed"}
    del SCORERS._entries["mixed"]


def worst(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def by_cache(model, ids: torch.Tensor, options: dict, positions: str = "cache") -> torch.Tensor:
    """NLL of all but the first token through a `StreamingCache`."""
    cache = make_cache(model, options, positions=positions)
    return nll_of(feed(model, cache, ids[None], cache.chunks(len(ids))), ids[None])[0]


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("family", ["gpt_neox", "qwen3", "llama_yarn"])
def test_a_scorer_may_mix_everything_that_is_known(family, positions, mixed_scorer):
    model, ids = build(family, layers=2), token_ids(TOKENS)
    expected = oracle_run(model, ids, mixed_scorer, positions)
    assert sum(step.event for step in expected.steps) >= 6
    assert worst(by_cache(model, ids, mixed_scorer, positions), expected.nll) < TOLERANCE
    for backend in CPU_BACKENDS:
        e = Engine(model, tokenizer=FakeTokenizer(), positions=positions, backend=backend, **mixed_scorer)
        assert worst(e.score(ids)[1:].double(), expected.nll) < TOLERANCE, backend


@pytest.mark.parametrize("field", sorted(READ | {"position"}))
def test_a_wrong_candidate_would_show(field, mixed_scorer, monkeypatch):
    """Control: with any one quantity given to the wrong tokens the cache chooses what the oracle does not."""

    def wrong(**known):
        return Candidates(**known | {field: known[field].flip(-1)})

    model, ids = build("llama", layers=2), token_ids(TOKENS)
    monkeypatch.setattr(pinned, "Candidates", wrong)
    found = by_cache(model, ids, mixed_scorer)
    monkeypatch.undo()
    assert worst(found, oracle_run(model, ids, mixed_scorer).nll) > 1e-2


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("refresh-")])
def test_what_the_oracle_tells_a_scorer_is_what_its_own_choosers_read(name):
    model, ids, options = build("llama_yarn"), token_ids(TOKENS), small_policy(name)
    asked, own = oracle_run(model, ids, options, ask=True), oracle_run(model, ids, options)
    assert sum(step.event for step in own.steps) >= 6
    for one, other in zip(asked.steps, own.steps):
        assert torch.equal(one.visible, other.visible)


@pytest.mark.parametrize(
    ("per_head_choice", "axes", "words"),
    [
        (False, (2, 1, 2), r"per_head=False gave scores of shape \(2, 1, 2, 12\); accepted: \(1, batch or 1, 1, 12\)"),
        (True, (), r"gave scores of shape \(12,\); accepted: \(layers or 1, batch or 1, kv_heads or 1, 12\)"),
    ],
)
def test_scores_of_a_wrong_shape_are_refused(per_head_choice, axes, words, monkeypatch):
    monkeypatch.setattr(SCORERS["uniform"], "per_head", per_head_choice)
    monkeypatch.setattr(SCORERS["uniform"], "score", lambda self, c: c.position[0, 0, 0].expand(*axes, -1))
    options = RULE | {"scorer": "uniform"}
    with pytest.raises(ValueError, match=words):
        by_cache(build("llama", layers=2), token_ids(60), options)
    with pytest.raises(ValueError, match=words):
        Engine(build("llama", layers=2), **options).score(token_ids(60))


def test_a_scorer_that_changes_the_scores_of_another_is_asked():
    """A prompt chooses inside a chunk by the field alone; a subclass with scores of its own must not be passed over."""
    window = SCORERS["window-attention"]

    class Reversed(window):
        def score(self, candidates):
            return -super().score(candidates)

    fields_of = {name: scored_field(SCORERS[name]()) for name in SCORERS.names()}
    assert {name: field for name, field in fields_of.items() if field} == {
        "window-attention": "attention",
        "last-query": "attention",
        "accumulated-attention": "accumulated",
    }
    assert scored_field(Reversed()) is None and scored_field(None) is None


def test_what_a_scorer_of_somebody_else_lacks_is_said_when_it_is_made():
    @dataclass(frozen=True)
    class Unasked(FieldScorer):
        needs: ClassVar[frozenset[str]] = frozenset({"attention"})

    @dataclass(frozen=True)
    class Torn(FieldScorer):
        needs: ClassVar[frozenset[str]] = frozenset({"nll", "entropy"})

    @dataclass(frozen=True)
    class Nameless(FieldScorer):
        needs: ClassVar[frozenset[str]] = frozenset({"nll"})

    with pytest.raises(ValueError, match=r"Unasked needs attention, .*observed_queries is 0; accepted: at least 1"):
        Unasked()
    with pytest.raises(ValueError, match=r"Torn is .* needs are \['entropy', 'nll'\]; accepted: one field"):
        Torn()
    policy = EvictionPolicy(sink=3, window=12, refresh=7, scorer=Nameless())
    with pytest.raises(ValueError, match=r"Nameless has no name .* accepted: a class that @SCORERS.register"):
        policy.record()
