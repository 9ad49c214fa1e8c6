"""What the engine takes in memory: prompts beside the ring, and refusals of what cannot fit."""

import pytest
import torch
from oracle.models import build, token_ids
from streams import TOLERANCE, small_policy
from tiny_model import save_model
from torch.profiler import ProfilerActivity, profile

from sinkstream.cache import StreamingCache, describe
from sinkstream.cache.stream import Stream
from sinkstream.engine import Engine, memory
from sinkstream.engine.prompt import CHUNK_TOKENS, PromptForward
from sinkstream.engine.reading import TILE as READ_TILE
from sinkstream.models import load_model, resolve_dtype, weight_bytes
from sinkstream.policies import EvictionPolicy

CHUNK = 16


@pytest.fixture(autouse=True)
def one_thread():
    """PyTorch's attention on a CPU takes a buffer for every thread: the figures would be those of the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
    return Engine(build("llama", layers=16), chunk_tokens=CHUNK, **policy)


def kv_bytes(e: Engine) -> int:
    return e.state.keys.nbytes + e.state.values.nbytes


class CopyingStream(Stream):
    """A stream in buffers of its own."""

    def capacity(self) -> int:
        """What is kept, and one chunk."""
        return self.policy.peak + CHUNK


class CopyingCache(StreamingCache):
    """A cache in buffers of its own."""

    stream_class = CopyingStream


@pytest.mark.parametrize(
    "policy",
    [
        {"cap": 450},
        {"cap": 450, "compress_every": 64, "refresh": 16, "scorer": "uniform"},
        {"cap": 450, "adaptive": "entropy"},
    ],
)
def test_a_prompt_takes_little_beside_the_ring(policy):
    """A copy of the cache would be a whole one more. What attention itself takes is the machine's: it cancels."""
    e = deep_engine(policy)
    fresh = peak_bytes(lambda: e.prefill(token_ids(500)))
    begun = peak_bytes(lambda: e.prefill(token_ids(40)))
    one = kv_bytes(e)
    e.close()
    cache = CopyingCache.for_model(e.model, **policy)
    copying = peak_bytes(lambda: cache.prefill(e.model, token_ids(500)[None], CHUNK))
    assert max(fresh, begun) + 0.9 * one < copying
    assert max(fresh, begun) < 0.8 * one, "fused attention takes 0.3, unfused attention 0.4"


def test_prefilling_moves_no_buffer_and_holds_nothing_afterwards():
    e = Engine(build("llama"), streams=2, **small_policy("lazy"))
    before = {n: t.data_ptr() for n, t in e.state._buffers().items()}
    e.prefill(token_ids(100), stream=1)
    e.prefill(token_ids(30), stream=1)
    assert before == {n: t.data_ptr() for n, t in e.state._buffers().items()}
    assert e._cache.stream.ring is None


@pytest.mark.parametrize("policy", ["lazy", "refresh-uniform", "adaptive-entropy"])
def test_an_interrupted_prefill_forgets_its_stream_and_no_other(policy, monkeypatch):
    e = Engine(build("llama"), streams=2, chunk_tokens=50, **small_policy(policy))
    for stream in range(2):
        e.prefill(token_ids(60), stream=stream)
    other = [b.clone() for b in e.state.stream_buffers(1).values()]
    calls = []

    def interrupt():
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    rebase = PromptForward.rebase  # the first thing in every chunk
    monkeypatch.setattr(PromptForward, "rebase", lambda *a: interrupt() or rebase(*a))
    with pytest.raises(KeyboardInterrupt):
        e.prefill(token_ids(600), stream=0)
    monkeypatch.undo()
    assert (e.stats(stream=0)["seen"], e.stats(stream=1)["seen"]) == (0, 60)
    assert all(map(torch.equal, e.state.stream_buffers(1).values(), other))
    again = e.prefill(token_ids(60), stream=0)
    torch.testing.assert_close(again, e.state.logits[1], rtol=0, atol=TOLERANCE)


def tight(monkeypatch, count: int) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: count)


@pytest.mark.parametrize("policy", ["strict", "refresh-accumulated-attention", "adaptive-entropy"])
def test_the_need_of_the_streams_is_what_they_take(policy):
    model = build("llama")
    e = Engine(model, streams=3, **small_policy(policy))
    need = memory.MemoryNeed.of(model, e.spec, e.policy, 3, CHUNK_TOKENS)
    assert need.streams == e.state.bytes and need.prompt > 0 and need.workspace == 0


@pytest.mark.parametrize(
    ("policy", "reads"), [("adaptive-entropy", True), ("refresh-uncertainty", True), ("lazy", False)]
)
def test_what_is_read_of_a_chunk_is_counted_in_the_pool_of_graphs_too(policy, reads):
    """The same need with and without logits to read: the difference is three tiles of them, and twice that captured."""
    model = build("llama")
    policy = EvictionPolicy.build(**small_policy(policy))
    spec = describe(model)

    def prompt(captures, vocab):
        model.get_output_embeddings().weight.data = torch.empty(vocab, 1)
        return memory.MemoryNeed.of(model, spec, policy, 1, CHUNK_TOKENS, captures=captures).prompt

    more = [prompt(captures, 2000) - prompt(captures, 1000) - 2 * 1000 * 4 for captures in (False, True)]
    assert more == [reads * 3 * READ_TILE * 1000 * 4, reads * 2 * 3 * READ_TILE * 1000 * 4]


def test_streams_that_cannot_fit_are_refused_before_anything_is_packed(monkeypatch):
    model = build("llama")
    addresses = [p.data_ptr() for p in model.parameters()]
    e = Engine(build("llama"), cap=1000, streams=2)
    need = memory.MemoryNeed.of(model, e.spec, e.policy, 2, CHUNK_TOKENS).total
    tight(monkeypatch, need - 1)
    with pytest.raises(
        ValueError, match=r"2 streams of 1000 slots need \d\.\d\d GB of memory on cpu.*GB are free; accep"
    ):
        Engine(model, cap=1000, streams=2)
    assert addresses == [p.data_ptr() for p in model.parameters()]
    tight(monkeypatch, need)
    Engine(model, cap=1000, streams=2)


def test_a_model_that_cannot_fit_is_refused_before_it_is_loaded(monkeypatch, tmp_path):
    folder = save_model(tmp_path / "tiny")
    expected = sum(p.nbytes for p in build("gpt_neox").parameters())
    assert weight_bytes(str(folder), torch.float32) == expected == 2 * weight_bytes(str(folder), torch.float16)
    assert weight_bytes("random:pythia-2.8b", torch.float16) == 2 * 2_775_208_960
    assert weight_bytes("builtin", torch.float16) is None
    tight(monkeypatch, expected - 1)
    monkeypatch.setattr("sinkstream.engine.engine.load_model", lambda *a, **k: pytest.fail("loaded"))
    for spec in (str(folder), "random:pythia-2.8b"):
        with pytest.raises(
            ValueError, match=r"the weights of model .* need .* GB of memory on cpu, and 0\.00 GB are free"
        ):
            Engine.from_pretrained(spec, cap=100, device="cpu", dtype=torch.float32)


@pytest.mark.gpu
def test_on_a_gpu_a_prompt_takes_at_most_15_percent_on_top():
    square = torch.ones(8, 8, dtype=torch.float16, device="cuda")
    square @ square
    before = torch.cuda.memory_allocated()  # by earlier tests in this process, and cuBLAS's workspace of 32 MiB
    model = load_model("random:pythia-160m", dtype=torch.float16, device="cuda").model
    e = Engine(model, cap=2048)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    e.prefill(token_ids(3000).cuda())
    weights = sum(p.nbytes for p in model.parameters())
    assert torch.cuda.max_memory_allocated() - before <= 1.15 * (weights + kv_bytes(e))


@pytest.mark.parametrize(("device", "dtype"), [("cuda", torch.float16), ("cpu", torch.float32)])
def test_a_model_is_loaded_in_the_dtype_of_the_commands(device, dtype, monkeypatch):
    class Loaded(Exception):
        pass

    def load(spec, **how):
        assert how == {"dtype": dtype, "device": torch.device(device)}
        raise Loaded

    monkeypatch.setattr("sinkstream.engine.engine.resolve_device", lambda name: torch.device(device))
    monkeypatch.setattr("sinkstream.engine.engine.check_weights", lambda *a: None)
    monkeypatch.setattr("sinkstream.engine.engine.load_model", load)
    with pytest.raises(Loaded):
        Engine.from_pretrained("random:pythia-14m", cap=100)
    assert resolve_dtype(None, device) is dtype


def test_very_many_streams_are_refused_before_an_object_is_made_for_each(monkeypatch):
    monkeypatch.setattr(memory.MemoryNeed, "of", lambda *_, **__: pytest.fail("it was counted by making them"))
    with pytest.raises(ValueError, match=r"1000000000 streams of 32 slots need at least .* accepted: fewer streams"):
        Engine(build("llama"), cap=32, streams=10**9)


def test_a_dtype_that_is_a_name_is_refused(tmp_path):
    save_model(tmp_path, "llama")
    with pytest.raises(ValueError, match=r"dtype='float16' is not accepted; accepted: a torch.dtype"):
        Engine.from_pretrained(str(tmp_path), cap=16, dtype="float16")
