"""Capturing beforehand: no later step captures anything, and no stream notices."""

from itertools import chain, combinations

import pytest
import torch
from fake_graphs import without_gpu
from oracle.models import build, token_ids
from streams import small_policy

from sinkstream.engine import Engine
from sinkstream.engine.batch import StreamBatch
from sinkstream.engine.capturing import blocks_of, chunks_of
from sinkstream.engine.foreseen_chunks import ForeseenChunks
from sinkstream.engine.graphs import GraphCaptures
from sinkstream.engine.sampling import Sampler, StreamSampler
from sinkstream.engine.short_chunks import ShortChunks

STREAMS = 5


def engine(backend: str = "graph", streams: int = STREAMS, **more) -> Engine:
    return Engine(build("llama", layers=1), backend=backend, streams=streams, **small_policy("lazy"), **more)


def some(streams: int) -> list[tuple[int, ...]]:
    return list(chain(*(combinations(range(streams), count) for count in range(1, streams + 1))))


def written(e: Engine, samplers: dict[int, Sampler], steps: int = 3) -> list[dict[int, int | None]]:
    """What some streams write together, and then each of them alone."""
    batch = StreamBatch(e)
    for stream, sampler in samplers.items():
        batch.join(stream, StreamSampler(sampler, seed=stream))
    found = [batch.step() for _ in range(steps)] + [batch.step([stream]) for stream in samplers]
    for stream in samplers:
        batch.leave(stream)
    return found


@pytest.mark.parametrize("streams", [1, 2, 5, 7, 8])
def test_the_blocks_are_those_of_all_sets_of_streams(streams):
    state = engine("ring", streams).state
    assert set(blocks_of(state)) == {state.block_of(active) for active in some(streams)}
    assert all(state.block_of(pair) == block for block, pair in blocks_of(state).items())


@pytest.mark.parametrize(
    ("policy", "kinds"),
    [
        ("lazy", [ShortChunks]),
        ("refresh-uniform", [ShortChunks]),
        ("refresh-window-attention", [ShortChunks, ShortChunks]),
        ("adaptive-entropy", [ForeseenChunks]),
    ],
)
def test_the_chunks_that_are_captured_are_found_under_every_kind_of_policy(policy, kinds):
    e = Engine(build("llama", layers=1), backend="ring", **small_policy(policy))
    assert [type(chunks) for chunks in chunks_of(e._append)] == kinds


def test_no_step_captures_after_it_and_every_token_is_the_same(monkeypatch):
    without_gpu(monkeypatch)
    e, plain = engine(), engine("ring")
    for one in (e, plain):
        for stream in range(3):
            one.join(token_ids(30 + stream, seed=stream))
    seen = []
    e.capture([Sampler(temperature=1.0)], lambda done, total: seen.append((done, total)))
    blocks = len(blocks_of(e.state))
    assert seen == [(done, 2 * blocks) for done in range(1, 2 * blocks + 1)]
    assert e.captures.count == 2 * blocks and e.captures.seconds > 0
    for one in (e, plain):
        one.join(token_ids(40))
        one.join(token_ids(9))
    greedy, warm, top = Sampler(), Sampler(temperature=0.7), Sampler(temperature=1.0, top_k=4)
    for active in some(STREAMS)[::3]:
        samplers = {stream: warm if stream % 2 else greedy for stream in active}
        assert written(e, samplers) == written(plain, samplers)
    assert e.captures.count == 2 * blocks
    assert written(e, {1: warm, 2: top}) == written(plain, {1: warm, 2: top})
    assert e.captures.count == 2 * blocks + 3, "control: another kind of draw, stepped together and alone"
    assert torch.equal(e.state.logits, plain.state.logits)


def test_what_draws_is_not_captured_under(monkeypatch):
    without_gpu(monkeypatch)
    e = engine(streams=1)
    drawing = e.state.sampling.using({0: StreamSampler(Sampler(temperature=1.0), 0)})
    with drawing, pytest.raises(ValueError, match="a stream draws at present"):
        e.capture()
    e.capture()
    assert e.captures.count == 1, "the step of one stream was captured when the engine was made"


def test_backends_that_capture_nothing_have_nothing_to_do():
    e = engine("ring", 2)
    e.capture([Sampler(temperature=1.0)], lambda done, total: pytest.fail("nothing is to be captured"))
    assert e.captures.count == 0


@pytest.mark.gpu
def test_on_a_gpu_nothing_is_captured_after_it():
    """Also short chunks of prompts; what streams hold meanwhile stays, and all graphs share their memory."""
    model = build("llama", torch.float16, layers=2).cuda()
    shared = small_policy("lazy") | {"backend": "fused", "streams": 4}
    e, lazily = Engine(model, **shared), Engine(model, **shared)
    texts = [token_ids(30 + 100 * s, seed=s).cuda() for s in range(4)]
    for one in (e, lazily):
        one.join(texts[0])
    e.capture([Sampler(temperature=1.0)])
    count = e.captures.count
    for one in (e, lazily):
        for text in texts[1:]:
            one.join(text)
    for active in some(4):
        samplers = {s: Sampler(temperature=0.7 * (s % 2)) for s in active}
        assert written(e, samplers) == written(lazily, samplers)
    assert e.captures.count == count > lazily.captures.count
    assert torch.equal(e.state.logits, lazily.state.logits)


@pytest.mark.gpu
def test_on_a_gpu_nothing_runs_on_the_stream_of_captures():
    """A few kernels on a second stream would make later steps slower for good; what ran wrote what a capture would."""
    ran, x = [], torch.zeros(4, device="cuda")

    def run():
        x.add_(1)
        ran.append((torch.cuda.current_stream() == present, torch.cuda.is_current_stream_capturing()))

    present = torch.cuda.current_stream()
    graph = GraphCaptures(x.device)(run, name="one addition", warmups=2)
    assert ran == [(True, False), (True, False), (False, True)] and x.tolist() == [2.0] * 4
    graph.replay()
    assert x.tolist() == [3.0] * 4
