"""Prompts that cross the prunes at which pinned tokens are chosen, where they might go astray; by steps otherwise."""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import pytest
import torch
from oracle.models import build, token_ids
from streams import TOLERANCE

from sinkstream.cache import choices
from sinkstream.engine import Engine, memory
from sinkstream.engine.memory import MemoryNeed
from sinkstream.engine.prompt import FAR
from sinkstream.engine.prompt_choices import ChoosingChunk
from sinkstream.engine.refresh import live_slots
from sinkstream.policies import EvictionPolicy
from sinkstream.policies.scorers.base import FieldScorer
from sinkstream.policies.triggers import Lazy

SIZES = {"sink": 2, "window": 17, "refresh": 5, "compress_every": 4}
TOKENS = 130


@dataclass(frozen=True)
class Recorded(FieldScorer):
    """Attention added up, by a scorer that has the latest queries kept as well."""

    needs: ClassVar[frozenset[str]] = frozenset({"accumulated"})
    per_head: ClassVar[bool] = True
    observed_queries = 6


@pytest.fixture
def chunks(monkeypatch) -> list[ChoosingChunk]:
    """The chunks that have chosen."""
    made, found = ChoosingChunk.__init__, []
    monkeypatch.setattr(ChoosingChunk, "__init__", lambda chunk, *a: found.append(chunk) or made(chunk, *a))
    return found


def stepped(e: Engine, ids: torch.Tensor) -> torch.Tensor:
    e.score(ids)
    e.state.settle()
    return e.state.logits[0]


def worst(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def test_queries_that_are_kept_beside_added_attention_are_not_added_again(chunks):
    policy = EvictionPolicy(sink=2, window=17, refresh=5, triggers=(Lazy(4),), scorer=Recorded())
    ids, (prompted, by_steps) = token_ids(TOKENS), (Engine(build("llama", layers=2), policy) for _ in range(2))
    for part in ids.split(50):
        assert worst(prompted.prefill(part), stepped(by_steps, part)) < TOLERANCE
    slots = live_slots(prompted.state, 0)[2:]  # sinks are no candidates
    found, wanted = (e.state.channels["accumulated"][..., slots] for e in (prompted, by_steps))
    assert worst(found, wanted) < TOLERANCE and len(chunks) == 3


def test_sets_of_pinned_tokens_take_no_more_memory_however_many_prunes_a_chunk_has(chunks, monkeypatch):
    model, ids, options = build("llama", layers=2), token_ids(TOKENS), SIZES | {"scorer": "window-attention"}
    expected = stepped(Engine(model, **options), ids)
    for module in (choices, memory):
        monkeypatch.setattr(module, "SET_TOKENS", 40)
    e = Engine(model, **options)
    assert worst(e.prefill(ids), expected) < TOLERANCE and e.stats()["events"] > 20
    sizes = [1 + chunk.groups.prunes for chunk in chunks]
    assert max(sizes) == 8 and sum(sizes) > 20, "40 pinned tokens, 5 in a set"
    needs = [MemoryNeed.of(model, e.spec, EvictionPolicy.build(**options), 1, n) for n in (400, 500, 600)]
    one, other = (b.prompt - a.prompt for a, b in pairwise(needs))
    assert one == other, "control: a chunk of a hundred more tokens has 25 more prunes"
    most = EvictionPolicy.build(**options | {"refresh": 30})
    assert choices.most_prunes(most) == 0
    Engine(model, most).prefill(ids)
    assert len(sizes) == len(chunks), "one set alone is too large: cut at the prunes"


@pytest.mark.parametrize("more", [{}, {"refresh": 5, "scorer": "window-attention", "observation": 6}], ids=str)
def test_a_stream_past_the_integers_of_32_bits_goes_on(more):
    model, ids, options = build("llama", layers=2), token_ids(TOKENS), {"sink": 2, "window": 17, "compress_every": 4}
    near, far = (Engine(model, **options, **more) for _ in range(2))
    for e in (near, far):
        e.prefill(ids[:60])
        e.state.settle()
    counters, period = far.state.counters[0], far.state.geometry.ring * 6  # slots and places of queries come back
    by = period * (2**31 // period + 1)
    counters.seen, counters.first_window, counters.base = (
        n + by for n in (counters.seen, counters.first_window, counters.base)
    )
    far.state.schedules[0].seen += by
    far.state.pinned_positions += by
    for part in ids[60:].split(35):
        assert torch.equal(far.prefill(part), near.prefill(part))
    assert torch.equal(far.score(ids[:9]), near.score(ids[:9])) and far.stats()["seen"] > 2**31 > FAR
    assert torch.equal(far.state.pinned_positions, near.state.pinned_positions + by)
