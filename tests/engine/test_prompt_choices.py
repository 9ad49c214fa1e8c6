"""Prompts that cross the prunes at which pinned tokens are chosen, where they might go astray; by steps otherwise."""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import pytest
import torch
from fake_graphs import without_gpu
from ops_cases import NEEDS_TRITON
from oracle.models import build, token_ids
from streams import TOLERANCE

from sinkstream.cache import choices
from sinkstream.engine import Engine, short_chunks
from sinkstream.engine.memory import MemoryNeed
from sinkstream.engine.prompt import FAR, PromptForward
from sinkstream.engine.prompt_choices import ChoiceSizes, ChoosingChunk, choosing_chunks, most_prunes_within
from sinkstream.engine.prompt_events import EventPrompts
from sinkstream.engine.refresh import live_slots
from sinkstream.kernels import pinned_sets, set_implementation
from sinkstream.models import load_model
from sinkstream.policies import EvictionPolicy, PruneSchedule
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
    monkeypatch.setattr(choices, "SET_TOKENS", 40)
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


# ---- at fixed addresses ----

STAGED = {"compress_every": 11, "overlap": 4, "max_drop": 3, "slack": 8, "refresh": 9}
LOOKING = {  # queries of several prunes; staged drops; more pinned than leave; a prune at every token
    "window": SIZES | {"scorer": "window-attention", "observation": 14},
    "staged": {"sink": 3, "window": 31, "scorer": "last-query", **STAGED},
    "accumulated": SIZES | {"scorer": "accumulated-attention"},
    "strict": {"sink": 2, "window": 17, "refresh": 5, "scorer": "accumulated-attention"},
}


def captured(e: Engine, sizes: tuple[int, ...], monkeypatch) -> EventPrompts:
    """What feeds prompts to an engine, as where chunks are captured: a graph does not see what the host has written."""
    without_gpu(monkeypatch)
    monkeypatch.setattr(short_chunks, "computed_by_kernels", lambda state: True)
    e._append = EventPrompts(PromptForward(e.weights, e.state, 64, sizes))
    return e._append


@pytest.mark.parametrize("policy", LOOKING)
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_padded_chunks_that_choose_are_those_of_steps(family, policy, chunks):
    """Two streams in turn through the same addresses, in chunks that begin and end anywhere between two prunes."""
    model, texts = build(family, layers=2), [token_ids(TOKENS, seed=s) for s in range(2)]
    padded, steps = (Engine(model, **LOOKING[policy], streams=2, rebase_at=60) for _ in range(2))
    padded._append = EventPrompts(PromptForward(padded.weights, padded.state, 40, (8, 24, 64), capture=False))
    for stream, ids in enumerate(texts):
        steps.score(ids[:45], stream=stream)
        padded.prefill(ids[:45], stream=stream)
    fed = [45, 45]
    for sizes in ((7, 1), (20, 6), (5, 24), (11, 13), (39, 8), (3, 30)):
        for stream, size in enumerate(sizes):
            part = texts[stream][fed[stream] : fed[stream] + size]
            found = padded.prefill(part, stream=stream)
            steps.score(part, stream=stream)
            steps.state.settle()
            assert worst(found, steps.state.logits[stream]) < TOLERANCE, (stream, fed)
            fed[stream] += size
    assert torch.equal(padded.state.pinned_positions, steps.state.pinned_positions)
    assert {chunk.band.rows for chunk in chunks} == {8, 24, 64}
    counts = {chunk.groups.prunes for chunk in chunks}
    assert len(counts) > 2 and min(counts) == {"strict": 2, "staged": 2}.get(policy, 1), (
        "one forward, however many prunes"
    )
    assert any(chunk.band.tokens < chunk.band.rows for chunk in chunks), "control: some are padded"
    assert all(chunk.sizes == ChoiceSizes.most(padded.policy, chunk.band.rows) for chunk in chunks), "as for a graph"


@NEEDS_TRITON
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the tests marked gpu do more")
@pytest.mark.parametrize(("family", "policy"), [("llama", "window"), ("gpt_neox", "accumulated")])
def test_kernels_of_a_captured_chunk_read_all_they_need_on_the_device(family, policy, monkeypatch):
    """The forward is that of an idle band of stream 0, replayed after other tables were written."""
    model, texts = build(family, torch.float16, layers=2), [token_ids(TOKENS, seed=s) for s in range(2)]
    e, steps = (Engine(model, **LOOKING[policy], streams=2) for _ in range(2))
    for stream, ids in enumerate(texts):
        for one in (e, steps):
            one.score(ids[: 40 + stream], stream=stream)
    prompts, before = captured(e, (16,), monkeypatch), e.state.pinned_positions.clone()
    held = {name: part.clone() for name, part in e.state.stream_buffers(0).items()}
    set_implementation("triton")
    try:
        prompts.choosing.short.ready(16)
        assert all(torch.equal(part, held[name]) for name, part in e.state.stream_buffers(0).items()), (
            "no stream notices"
        )
        for first, end in ((0, 11), (11, 25)):
            found = [e.prefill(ids[40 + s + first : 40 + s + end], stream=s) for s, ids in enumerate(texts)]
    finally:
        set_implementation("auto")
    for stream, ids in enumerate(texts):
        steps.score(ids[40 + stream : 65 + stream], stream=stream)
        steps.state.settle()
        assert worst(found[stream], steps.state.logits[stream]) < 0.02
    assert torch.equal(e.state.pinned_positions, steps.state.pinned_positions)
    assert not torch.equal(e.state.pinned_positions, before) and worst(*found) > 0.5, (
        "control: other tokens, other text"
    )
    assert list(prompts.choosing.short._graphs) == [16] and e.captures.count == 1


@pytest.mark.parametrize("policy", LOOKING)
def test_room_for_chunks_of_a_full_stream_is_as_large_as_they_need(policy):
    policy = EvictionPolicy.build(**LOOKING[policy])
    schedule, room = PruneSchedule(policy), most_prunes_within(policy, 16)
    schedule.advance(policy.peak)
    drops = schedule.advance(400).drop > 0
    counts = [int(drops[first : first + 16].sum()) for first in range(384)]
    assert max(counts) == room and most_prunes_within(policy, 27) > room > 1


def test_a_chunk_with_more_than_there_is_room_for_is_not_padded(chunks, monkeypatch):
    model, ids, options = build("llama", layers=2), token_ids(TOKENS), LOOKING["window"]
    expected = stepped(Engine(model, **options), ids)
    monkeypatch.setattr(pinned_sets.GroupSizes, "hold", lambda sizes, other: False)
    e = Engine(model, **options)
    e._append = EventPrompts(PromptForward(e.weights, e.state, 40, (64,), capture=False))
    assert worst(e.prefill(ids), expected) < TOLERANCE and chunks
    assert all(chunk.band.rows == chunk.band.tokens for chunk in chunks if not chunk.band.fixed)
    assert not any(chunk.band.fixed for chunk in chunks)


@pytest.mark.gpu
@pytest.mark.parametrize("scorer", ["window-attention", "accumulated-attention", "last-query"])
@pytest.mark.parametrize("shape", ["pythia-160m", "smollm2-135m"])
def test_on_a_gpu_captured_chunks_that_choose_are_those_that_are_not_captured(shape, scorer):
    """Turns of two full streams; and the captures are made beforehand, so that no turn waits for one."""
    model = load_model(f"random:{shape}", dtype=torch.float16, device="cuda").model
    options = {"cap": 300, "streams": 2, "compress_every": 40, "refresh": 40, "scorer": scorer}
    ids, logits, chosen = token_ids(2400).cuda(), {}, {}
    for backend in ("kernels", "fused"):
        e, fed, logits[backend] = Engine(model, backend=backend, **options), [0, 700], []
        for stream in range(2):
            e.prefill(ids[fed[stream] : fed[stream] + 330 + stream], stream=stream)
            fed[stream] += 330 + stream
        if backend == "fused":
            held = {name: part.clone() for name, part in e.state.stream_buffers(0).items()}
            e.capture()
            assert all(torch.equal(part, held[name]) for name, part in e.state.stream_buffers(0).items())
        count = e.captures.count
        for sizes in ((50, 33), (41, 300), (300, 50), (50, 128)):
            for stream, size in enumerate(sizes):
                logits[backend].append(e.prefill(ids[fed[stream] : fed[stream] + size], stream=stream))
                fed[stream] += size
        chosen[backend] = e.state.pinned_positions.clone()
        assert e.captures.count == count and bool(e._append.choosing.short._graphs) == (backend == "fused")
        e.close()
    plain, graphed = (torch.stack(found) for found in logits.values())
    assert ((graphed - plain).norm(dim=-1) < 0.04 * plain.norm(dim=-1)).all()
    control = (graphed[2:] - plain[:-2]).norm(dim=-1)
    assert control.median() > 0.05 * plain[0].norm(), "control: other tokens, other logits"
    same = torch.isin(*chosen.values()).float().mean()
    assert same > 0.8, "rounding chooses otherwise among equals only"


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


def test_a_captured_chunk_that_chooses_has_a_size_that_fits_and_no_policy_a_larger_chunk_than_without():
    scorers = "window-attention", "accumulated-attention", "uniform"
    looks, adds, blind = (EvictionPolicy.build(**SIZES, scorer=scorer) for scorer in scorers)
    for chunk in (1, 16, 100, 512, 600, 2048):
        short = short_chunks.short_chunk_sizes(chunk)
        for policy, most in ((looks, 1024), (adds, 512)):
            tokens, sizes = choosing_chunks(policy, chunk, short)
            assert tokens == min(chunk, most) and sizes[-1] >= tokens and all(size < tokens for size in sizes[:-1])
            assert choosing_chunks(policy, chunk, ())[0] == (chunk if policy is looks else min(chunk, 512)), "whole"
        assert choosing_chunks(blind, chunk, short) == (0, ()), "control"


def test_room_is_made_for_no_more_sets_than_a_chunk_may_hold(monkeypatch):
    policy = EvictionPolicy.build(sink=2, window=30, refresh=8, compress_every=1, scorer="window-attention")
    assert ChoiceSizes.most(policy, 16).groups.groups == 16, "control: as many as there are prunes"
    monkeypatch.setattr(choices, "SET_TOKENS", 8 * 5)
    tokens, within = choices.tokens_across(full(policy), 16)
    assert ChoiceSizes.most(policy, 16).groups.groups == within + 1 == 5 and tokens < 16


def full(policy: EvictionPolicy) -> PruneSchedule:
    """Of a stream that drops a token at every step."""
    schedule = PruneSchedule(policy)
    schedule.advance(policy.peak)
    return schedule
