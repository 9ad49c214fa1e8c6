"""Streams that join, write together and leave: each writes what it would write alone, whatever comes and goes."""

import pytest
import torch
from oracle.models import build, token_ids
from streams import small_policy

from sinkstream.cache import POSITIONS
from sinkstream.engine import Engine
from sinkstream.engine.batch import StreamBatch
from sinkstream.engine.sampling import Sampler, StreamSampler
from sinkstream.engine.span import block_of

BACKENDS = ("ring", "kernels")
KNOWN = ("strict", "lazy", "overlap", "max-drop", "slack")  # policies that know every prune beforehand
OTHERS = ("refresh-uniform", "refresh-window-attention", "adaptive-entropy")


def engine(policy: str = "lazy", *, family: str = "llama", streams: int = 1, **more) -> Engine:
    options = small_policy(policy) | {k: more.pop(k) for k in ("sink", "window") if k in more}
    return Engine(build(family, layers=2), streams=streams, **options, **more)


def sampler(seed: int, **options) -> StreamSampler:
    return StreamSampler(Sampler(**options), seed)


DRAWS = [{}, {"temperature": 1.0}, {"temperature": 1.3, "top_p": 0.8}, {"repetition_penalty": 1.5}]
# stream, prompt, seed, options of the draw, step at which it joins, tokens that it writes
VISITS = [
    (2, 31, 1, 0, 0, 60),
    (0, 7, 2, 1, 0, 13),
    (1, 90, 3, 2, 9, 40),
    (0, 45, 4, 3, 21, 30),  # in the place of one that has left
    (3, 3, 5, 1, 22, 5),
    (3, 18, 6, 2, 33, 20),
]


def alone(policy: str, visit: tuple, **more) -> list[int]:
    """What a visitor writes in an engine of its own, written by `generate`."""
    _, length, seed, draw, _, tokens = visit
    e = engine(policy, **more)
    ids = token_ids(length, seed=seed)
    return e.generate(ids, max_new_tokens=tokens, stop_tokens=(), seed=seed, **DRAWS[draw]).tokens


def together(e: Engine, visits: list[tuple]) -> list[list[int]]:
    """What visitors write beside each other."""
    batch, written, step = StreamBatch(e), [[] for _ in visits], 0
    inside: dict[int, int] = {}
    while inside or any(visit[4] >= step for visit in visits):
        for i, (stream, length, seed, draw, at, _) in enumerate(visits):
            if at == step:
                ids = token_ids(length, seed=seed)
                assert e.join(ids, stream=stream) == stream
                batch.join(stream, StreamSampler(Sampler(**DRAWS[draw]), seed, torch.as_tensor(ids)))
                inside[stream] = i
        if inside:
            for stream, token in batch.step().items():
                i = inside[stream]
                written[i].append(token)
                if len(written[i]) == visits[i][5]:
                    batch.leave(stream)
                    e.leave(stream)
                    del inside[stream]
        step += 1
    assert not e.active and not batch.members
    return written


JOBS = [(policy, "ring") for policy in (*KNOWN, *OTHERS)]
JOBS += [(policy, "kernels") for policy in ("strict", "lazy", "refresh-uniform")]


@pytest.mark.parametrize(("policy", "backend"), JOBS)
def test_each_stream_writes_what_it_writes_alone(policy, backend):
    e = engine(policy, streams=4, backend=backend, rebase_at=60)
    found = together(e, VISITS)
    expected = [alone(policy, visit, backend=backend, rebase_at=60) for visit in VISITS]
    assert found == expected
    assert len({tuple(tokens[:5]) for tokens in found}) == len(VISITS), "control: the texts differ"


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_streams_have_sinks_of_their_own(family, positions):
    """Sinks and window share the slots: a stream of 11 sinks is one of an engine whose policy has 11."""
    sinks = {0: 4, 1: 11, 2: 7, 3: 15}
    for backend in BACKENDS:
        shared = dict(family=family, positions=positions, backend=backend, rebase_at=60)
        e = engine("lazy", streams=4, max_sink=15, **shared)
        batch = StreamBatch(e)
        for s, sink in sinks.items():
            e.join(token_ids(20 + 30 * s, seed=s), stream=s, sink=sink)
            batch.join(s)
        rows = [batch.step() for _ in range(70)]
        for s, sink in sinks.items():
            one = engine("lazy", sink=sink, window=24 - sink, **shared)
            expected = one.generate(token_ids(20 + 30 * s, seed=s), max_new_tokens=70, stop_tokens=()).tokens
            assert [row[s] for row in rows] == expected
            counts = {k: v for k, v in e.stats(stream=s).items() if k not in ("bytes", "weight_bytes")}
            assert counts.items() <= one.stats().items() and counts["evicted"] and counts["rebases"]
            assert torch.allclose(e.state.logits[s], one.state.logits[0], atol=1e-4)
        other = engine("lazy", sink=4, window=20, **shared)
        other.generate(token_ids(50, seed=1), max_new_tokens=70, stop_tokens=())
        assert not torch.allclose(e.state.logits[1], other.state.logits[0], atol=1e-2), "control"


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stream_moves_to_another_place_while_others_write(backend, tmp_path):
    path = tmp_path / "stream.safetensors"
    e = engine("lazy", streams=3, max_sink=9, backend=backend)
    batch = StreamBatch(e)
    e.join(token_ids(40, seed=1), stream=0, sink=9)
    e.join(token_ids(25, seed=2), stream=1)
    for s in (0, 1):
        batch.join(s, sampler(s, temperature=0.8))
    written = [batch.step() for _ in range(12)]
    batch.leave(0)
    e.snapshot(path, stream=0)
    data = e.dump(stream=0)
    e.leave(0)
    written += [batch.step() for _ in range(9)]
    e.join(token_ids(12, seed=3), stream=0)  # somebody else is in its place
    e.restore(path, stream=2)
    assert e.stats(stream=2)["seen"] == 52
    batch.join(2, sampler(0, temperature=0.8))
    written += [batch.step() for _ in range(30)]
    first = [row.get(0, row.get(2)) for row in written if 0 in row or 2 in row]
    one = engine("lazy", sink=9, window=15, backend=backend)
    expected = one.generate(token_ids(40, seed=1), max_new_tokens=42, stop_tokens=(), seed=0, temperature=0.8)
    assert first == expected.tokens
    other = engine("lazy", backend=backend)
    expected = other.generate(token_ids(25, seed=2), max_new_tokens=51, stop_tokens=(), seed=1, temperature=0.8)
    assert [row[1] for row in written] == expected.tokens
    one.undump(data)
    assert one.stats()["seen"] == 52, "an engine whose policy has as many sinks takes the stream too"
    with pytest.raises(ValueError, match="under another policy: window=15; accepted: window=20"):
        other.undump(data)


def test_a_stream_that_pauses_keeps_its_logits_and_entries():
    """It is neither stepped nor copied while others write, and goes on as if nothing had been."""
    for policy in ("lazy", "refresh-window-attention", "refresh-accumulated-attention"):
        e = engine(policy, streams=2)
        for s in (0, 1):
            e.join(token_ids(30, seed=s), stream=s)
        batch = StreamBatch(e)
        for s in (0, 1):
            batch.join(s)
        written = [batch.step([0, 1][: 1 + (i % 7 < 3)]) for i in range(80)]
        for s in (0, 1):
            tokens = [row[s] for row in written if s in row]
            expected = engine(policy).generate(token_ids(30, seed=s), max_new_tokens=len(tokens), stop_tokens=())
            assert tokens == expected.tokens


def test_log_probs_are_told_to_those_that_ask():
    e = engine("lazy", streams=3)
    batch = StreamBatch(e)
    for s, count in enumerate((None, 2, 5)):
        e.join(token_ids(20, seed=s), stream=s)
        batch.join(s, log_probs=count)
    for i in range(300):
        tokens = batch.step()
        if i == 150:
            batch.leave(0)
        found = [batch.latest_log_probs(s, tokens[s]) for s in (1, 2)]
        assert [len(top) for _, top in found] == [2, 5]
        assert [top[0][0] for _, top in found] == [tokens[1], tokens[2]] and found[0][0] == found[0][1][0][1]
    whole = engine("lazy").generate(token_ids(20, seed=1), max_new_tokens=300, stop_tokens=(), log_probs=2)
    assert found[0][0] == pytest.approx(whole.log_probs[-1], abs=1e-4)
    batch.leave(2)
    batch.step()
    for stream in (0, 2):
        with pytest.raises(ValueError, match=rf"stream={stream} has no log-probabilities; accepted, .*, \[1\]"):
            batch.latest_log_probs(stream, 0)


def test_a_stream_beside_others_costs_no_step_of_theirs():
    """Only the smallest block with all active streams is computed; an absent one is not."""
    assert [block_of(active, 8)[:2] for active in ([5], [0, 1], [1, 2], [4, 6], [0, 7])] == [
        (5, 1), (0, 2), (0, 4), (4, 4), (0, 8),
    ]  # fmt: skip
    found = [block_of(active, streams)[:2] for active, streams in (([4], 5), ([3, 4], 5), ([2, 6], 7))]
    assert found == [(4, 1), (0, 5), (0, 7)]


def test_a_batch_that_was_dropped_leaves_no_way_to_draw():
    e, written = engine("lazy"), []
    for options in ({}, {"temperature": 3.0}, {}):
        e.reset()
        e.prefill(token_ids(20))
        batch = StreamBatch(e)
        batch.join(0, sampler(1, **options) if options else None)
        written.append([batch.step()[0] for _ in range(20)])  # and nothing leaves
    assert written[0] == written[2] != written[1]


def test_what_joins_must_fit():
    e = engine("lazy", streams=2, max_sink=9)
    with pytest.raises(ValueError, match="sink=10 is not accepted for a stream of this engine; accepted: 4 to 9"):
        e.join(token_ids(5), sink=10)
    assert e.join(token_ids(5)) == 0 and e.join(token_ids(5)) == 1 and e.active == [0, 1]
    with pytest.raises(ValueError, match="all 2 streams hold tokens"):
        e.join(token_ids(5))
    with pytest.raises(ValueError, match="stream 1 holds 5 tokens"):
        e.join(token_ids(5), stream=1)
    e.leave(1)
    with pytest.raises(ValueError, match="has not begun"):
        StreamBatch(e).join(1)
    batch = StreamBatch(e)
    batch.join(0)
    with pytest.raises(ValueError, match="stream 0 is a member"):
        batch.join(0)
    for streams in ([1], [0, 0], 0):
        with pytest.raises(ValueError, match=r"accepted: members of the batch, \[0\], each once"):
            batch.step(streams)
    assert e.stats(stream=0)["seen"] == 5
    e.join(token_ids(5))
    with pytest.raises(ValueError, match="sampler=Sampler is not accepted; accepted: a StreamSampler"):
        batch.join(1, Sampler(temperature=1.0))
    for options, message in (
        ({"max_sink": 3}, "max_sink=3 is not accepted; accepted: a whole number from sink=4"),
        ({"max_sink": 24}, "sink=24 leaves no window"),
    ):
        with pytest.raises(ValueError, match=message):
            engine("lazy", **options)
    for policy in OTHERS:
        with pytest.raises(ValueError, match="with refresh or adaptive eviction"):
            engine(policy, max_sink=9)


# ---- on a GPU ----


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_captured_blocks_of_streams(family):
    """New blocks and draws are captured while others hold tokens; a stream alone is stepped as in an engine of one."""
    model, shared = build(family, torch.float16, layers=2).cuda(), small_policy("lazy") | {"backend": "fused"}
    e = Engine(model, streams=4, max_sink=9, **shared)
    batch, texts = StreamBatch(e), [token_ids(30 + s, seed=s).cuda() for s in range(3)]
    for s, text in enumerate(texts):
        e.join(text, stream=s, sink=4 + s)
    assert len(e._step._graphs) == 1
    rows = []
    for s in (0, 1, 2):
        batch.join(s, sampler(s, temperature=0.7) if s == 2 else None)
        rows += [batch.step() for _ in range(10)]
    batch.leave(0)
    batch.leave(2)
    e.step(torch.tensor([5]), streams=[3])
    rows += [batch.step() for _ in range(30)]
    blocks = {(block.first, block.streams) for block, _ in e._step._graphs}
    assert blocks == {(0, 1), (0, 2), (0, 4), (1, 1), (3, 1)}
    e.state.settle()
    rest = {k: v for k, v in shared.items() if k not in ("sink", "window")}
    for s, text in enumerate(texts):  # the same tokens in an engine of one stream: logits agree but for rounding
        one = Engine(model, sink=4 + s, window=20 - s, **rest)
        one.prefill(text)
        for token in (row[s] for row in rows if s in row):
            logits = one.step([token])[0]
        assert (e.state.logits[s] - logits).abs().mean() < 0.02
        assert (e.state.logits[(s + 1) % 3] - logits).abs().mean() > 0.2, "control: the streams differ"
    alone = Engine(model, streams=4, **shared)
    alone.join(texts[0], stream=2)
    one = Engine(model, **shared)
    one.prefill(texts[0])
    for token in token_ids(60, seed=8).cuda().split(1):
        assert torch.equal(alone.step(token, streams=[2]), one.step(token))
