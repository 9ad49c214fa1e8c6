"""What the engine takes in memory: prompts beside the ring, and refusals of what cannot fit."""

import pytest
import torch
from oracle.models import build, token_ids
from streams import small_policy
from torch.profiler import ProfilerActivity, profile

from sinkstream.cache import StreamingCache
from sinkstream.engine import Engine
from sinkstream.models import load_model

CHUNK = 16


def peak_bytes(call) -> int:
    """The most bytes that a call holds at a time, beyond what was held before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        call()
    events = [e for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def deep_engine(policy: dict) -> Engine:
    """Many layers and a large cache, so that a second copy of the cache would show."""
    e = Engine(build("llama", layers=16), **policy)
    e._cache.chunk_tokens = CHUNK
    return e


def kv_bytes(e: Engine) -> int:
    return e.state.keys.nbytes + e.state.values.nbytes


@pytest.mark.parametrize(
    "policy", [{"cap": 900}, {"cap": 900, "compress_every": 64, "refresh": 16, "scorer": "uniform"}]
)
def test_a_prompt_takes_little_beside_the_ring(policy):
    e = deep_engine(policy)
    assert peak_bytes(lambda: e.prefill(token_ids(950))) < 0.4 * kv_bytes(e)
    assert peak_bytes(lambda: e.prefill(token_ids(40))) < 0.4 * kv_bytes(e), "a stream that has begun"


class CopyingCache(StreamingCache):
    """A cache in buffers of its own."""

    def capacity(self) -> int:
        """What is kept, and one chunk."""
        return self.policy.peak + CHUNK


def test_a_cache_of_its_own_would_show():
    """Control of the test above."""
    e = deep_engine({"cap": 900})
    e.close()
    cache = CopyingCache.for_model(e.model, cap=900)
    assert peak_bytes(lambda: cache.prefill(e.model, token_ids(950)[None], CHUNK)) > kv_bytes(e)


def test_prefilling_moves_no_buffer_and_holds_nothing_afterwards():
    e = Engine(build("llama"), streams=2, **small_policy("lazy"))
    before = {n: t.data_ptr() for n, t in e.state._buffers().items()}
    e.prefill(token_ids(100), stream=1)
    e.prefill(token_ids(30), stream=1)
    assert before == {n: t.data_ptr() for n, t in e.state._buffers().items()}
    assert e._cache.ring is None


def test_an_interrupted_prefill_forgets_its_stream_and_no_other():
    e = Engine(build("llama"), streams=2, **small_policy("lazy"))
    for stream in range(2):
        e.prefill(token_ids(60), stream=stream)
    other = [b.clone() for b in e.state.stream_buffers(1).values()]
    calls = []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    hook = e.model.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        e.prefill(token_ids(600), stream=0)
    hook.remove()
    assert (e.stats(stream=0)["seen"], e.stats(stream=1)["seen"]) == (0, 60)
    assert all(map(torch.equal, e.state.stream_buffers(1).values(), other))
    again = e.prefill(token_ids(60), stream=0)
    assert torch.equal(again, e.state.logits[1])


@pytest.mark.gpu
def test_on_a_gpu_a_prompt_takes_at_most_a_tenth_on_top():
    model = load_model("random:pythia-160m", dtype=torch.float16, device="cuda").model
    e = Engine(model, cap=2048)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    e.prefill(token_ids(3000).cuda())
    weights = sum(p.nbytes for p in model.parameters())
    assert torch.cuda.max_memory_allocated() <= 1.1 * (weights + kv_bytes(e))
