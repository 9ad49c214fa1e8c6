"""The decode step through the kernels: it says what the plain step says, on the twins, in the interpreter, on a GPU.

That the twins agree with the oracle under every policy is in test_engine.py.
"""

from dataclasses import replace

import pytest
import torch
from ops_cases import NEEDS_TRITON
from oracle.models import build, token_ids
from streams import FakeTokenizer, feed, make_cache, small_policy

from sinkstream.cache import POSITIONS, ModelSpec
from sinkstream.cache.families import describe
from sinkstream.engine import Engine, fused, plain
from sinkstream.engine.fused import FusedDecode, check_kernels, default_plan
from sinkstream.engine.geometry import Geometry
from sinkstream.engine.persistent import persistent_plan
from sinkstream.engine.span import Block
from sinkstream.kernels import set_implementation
from sinkstream.kernels.config import PersistentConfig, PersistentNeoxConfig
from sinkstream.kernels.layout import TOKEN
from sinkstream.kernels.plans import PERSISTENT_LLAMA_PLANS, PERSISTENT_NEOX_PLANS, OpLaunch
from sinkstream.policies import EvictionPolicy

GPU = torch.device("cuda")
HALF_TOLERANCE = 0.02  # nats per token, on average: two orders of rounding in float16
ONE_KERNEL = [  # policies under which one kernel may serve all layers
    pytest.param({"policy": "lazy"}, id="lazy"),
    pytest.param({"policy": "refresh-uniform"}, id="refresh"),
    pytest.param({"policy": "strict", "recall": "random", "recall_slots": 9, "recall_hold": 2}, id="recall"),
]
PERSISTENT = {  # measured plans by hidden size, and a configuration
    "llama": (PERSISTENT_LLAMA_PLANS, PersistentConfig()),
    "gpt_neox": (PERSISTENT_NEOX_PLANS, PersistentNeoxConfig()),
}
SERVED_ON_GPU = ("gpt_neox", "llama", "qwen2")  # head_dim 16; the tiny qwen3 has 24


def engine(family: str = "gpt_neox", policy: str | dict = "lazy", *, model=None, **more) -> Engine:
    options = small_policy(policy) if isinstance(policy, str) else policy
    return Engine(
        model or build(family, layers=2), tokenizer=FakeTokenizer(), **{"backend": "kernels"} | more, **options
    )


def worst(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


# ---- the twins ----


@pytest.mark.parametrize(
    ("family", "policy"),
    [("gpt_neox", "refresh-accumulated-attention"), ("qwen3", "refresh-window-attention"), ("llama", "adaptive-top1")],
)
def test_streams_are_independent(family, policy):
    """Streams of different lengths say, together, what each says alone through the plain step."""
    texts = [token_ids(90, seed=s) for s in range(3)]
    e, fed = engine(family, policy, streams=3), [0, 30, 60]
    for s, text in enumerate(texts):
        e.score(text[: fed[s]], stream=s) if fed[s] else None
    together = [e.step([int(text[n + i]) for text, n in zip(texts, fed)]) for i in range(30)]
    for s, text in enumerate(texts):
        alone = engine(family, policy, backend="ring")
        alone.score(text[: fed[s]]) if fed[s] else None
        for i, logits in enumerate(together):
            assert worst(logits[s], alone.step([int(text[fed[s] + i])])[0]) < 1e-4
    assert e.stats(stream=2)["events"] >= 3
    assert worst(together[-1][0], together[-1][1]) > 0.1, "control: the streams differ"


@pytest.mark.parametrize("policy", ["refresh-accumulated-attention", "refresh-uncertainty"])
def test_a_snapshot_goes_on_in_another_backend(policy, tmp_path):
    ids, path = token_ids(150), tmp_path / "stream.safetensors"
    ring = engine("qwen2", policy, backend="ring")
    ring.score(ids[:70])
    ring.snapshot(path)
    kernels = engine("qwen2", policy)
    kernels.restore(path)
    assert worst(kernels.score(ids[70:]), ring.score(ids[70:])) < 1e-5
    assert kernels.stats() == ring.stats()


def one_kernel(e: Engine, family: str) -> Engine:
    """The engine, its layers in the persistent kernel of a family, with and without recalled tokens."""
    plan = default_plan(e.weights, e.state.span()) | {"layers": OpLaunch(PERSISTENT[family][1])}
    for block in (Block(0, 1), Block(0, 1, framed=True))[: 1 + (e.state.geometry.framed > 0)]:
        e._step.decodes[block] = FusedDecode(e.weights, e.state.span(block), plan)
    return e


@pytest.mark.parametrize("family", PERSISTENT)
@pytest.mark.parametrize("options", ONE_KERNEL)
def test_all_layers_in_one_op_say_what_their_ops_say(family, options, monkeypatch):
    steps, op = [], fused.persistent_layers
    monkeypatch.setattr(fused, "persistent_layers", lambda *given, **more: steps.append(1) or op(*given, **more))
    model, ids = build(family, layers=3), token_ids(120)
    ring, one = engine(model=model, **options, backend="ring"), one_kernel(engine(model=model, **options), family)
    assert worst(ring.score(ids)[1:], one.score(ids)[1:]) < 1e-4
    assert one.stats() == ring.stats() | {"persistent_layers": 1} and one.stats()["events"] >= 3
    assert one.recall_events == ring.recall_events and one.stats().get("recalls", 4) >= 4
    assert len(steps) == len(ids)


@pytest.mark.parametrize(
    ("family", "options", "kind", "words"),
    [
        ("gpt_neox", {}, "llama", "PersistentConfig for the layers of gpt_neox; accepted"),
        ("llama", {}, "gpt_neox", "PersistentNeoxConfig for the layers of llama; accepted"),
        ("qwen2", {}, "llama", "qwen2 with biases or norms of queries and keys; accepted"),
        ("llama", {"policy": "refresh-window-attention"}, "llama", "observes queries or attention; accepted"),
        ("gpt_neox", {"policy": "refresh-window-attention"}, "gpt_neox", "observes queries or attention; accepted"),
    ],
)
def test_what_the_persistent_kernel_does_not_serve(family, options, kind, words, monkeypatch):
    e, own = engine(family, **options), "gpt_neox" if family == "gpt_neox" else "llama"
    with pytest.raises(ValueError, match=words):
        one_kernel(e, kind)
    measured = OpLaunch(PERSISTENT[kind][1], prefetch=5)
    monkeypatch.setitem(PERSISTENT[own][0], e.weights.embedding.shape[1], measured)
    assert persistent_plan(e.weights, e.state.span()) == {}
    other = engine(kind)
    assert persistent_plan(other.weights, other.state.span()) == ({"layers": measured} if kind == own else {})


def check_scalars(e: Engine, tokens: int) -> None:
    """Step through a text; the device's scalars are those that the host's counters say, the token's id included."""
    for token in token_ids(tokens).tolist():
        e.step([token])
        expected = e.state.counters[0].row(e.state.observed_queries)
        expected[TOKEN] = token
        assert e.state.scalars[0].tolist() == expected


@pytest.mark.parametrize("positions", POSITIONS)
def test_scalars_follow_the_host_across_rebases(positions):
    e = engine("llama", "refresh-window-attention", positions=positions, rebase_at=50)
    check_scalars(e, 180)
    assert e.stats()["rebases"] >= 2


def test_observing_keeps_what_the_plain_step_keeps():
    """Queries and attention, before anything has been chosen by them."""
    for policy in ("refresh-accumulated-attention", "refresh-window-attention"):
        states = []
        for backend in ("ring", "kernels"):
            e = engine("llama", policy, backend=backend)
            e.score(token_ids(22))
            states.append(e.state)
        ring, kernels = (s.stream_buffers(0) for s in states)
        assert any(name == "queries" or name.startswith("channel_") for name in ring)
        for name in ring:
            assert worst(ring[name].float(), kernels[name].float()) < 1e-4, name
            assert name in ("pinned_keys", "pinned_positions") or ring[name].abs().max() > 0, name


@pytest.mark.parametrize(
    "policy", ["lazy", "refresh-window-attention", "refresh-accumulated-attention", "refresh-uncertainty"]
)
def test_only_policies_that_read_more_pay_for_it(policy, monkeypatch):
    """The scalars are unpacked for PyTorch functions only, and these run only for scorers that read what they keep."""
    e, unpacked = engine(policy=policy), []
    scalars = property(lambda row: unpacked.append(row) or row.state.scalars.long())
    monkeypatch.setattr(plain.Row, "scalars", scalars)
    e.score(token_ids(60))
    assert bool(unpacked) == (policy == "refresh-uncertainty")


# ---- the kernels in the interpreter ----


@pytest.fixture
def kernels_only():
    """Ops that cannot run their kernels raise."""
    set_implementation("triton")
    yield
    set_implementation("auto")


@NEEDS_TRITON
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the tests marked gpu do more")
@pytest.mark.parametrize(
    ("family", "policy"),
    [
        ("llama", "refresh-window-attention"),
        ("gpt_neox", "refresh-accumulated-attention"),
        ("llama", "adaptive-entropy"),
    ],
)
def test_kernels_in_the_interpreter(family, policy, kernels_only):
    model = build(family, torch.float16, layers=1)
    options = small_policy(policy) | {"sink": 2, "window": 3}
    options |= {"refresh": 2, "compress_every": 1} if "refresh" in policy else {}  # it observes more than the window
    options |= {"adaptive_min": 2, "adaptive_every": 3, "adaptive_max": 4} if "adaptive" in policy else {}
    ring, kernels = (engine(model=model, policy=options, backend=b) for b in ("ring", "kernels"))
    cached = feed(model, make_cache(model, options), token_ids(10)[None])[0]
    for token, by_cache in zip(token_ids(10).tolist(), cached):
        expected, found = ring.step([token]), kernels.step([token])
        assert worst(expected, found) < 0.02 and worst(by_cache, found[0]) < 0.02
    assert kernels.stats()["events"] >= 1
    assert expected.std() > 0.3, "control: logits are of another size than the tolerance"


# ---- what is refused ----


def spec_of(**changes) -> ModelSpec:
    return replace(describe(build("llama").half()), **changes)


def slots_of(**options) -> Geometry:
    return Geometry.of(EvictionPolicy.build(**{"sink": 4, "window": 20} | options), "cache")


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({"dtype": torch.float32}, {}, "dtype torch.float32; accepted by the kernels: float16, bfloat16"),
        ({"head_dim": 72}, {}, "head_dim=72; accepted by the kernels: multiples of 16"),
        ({"query_heads": 34}, {}, "17 query heads a kv head; accepted by the kernels: at most 16"),
        ({}, {"sink": 600, "window": 1}, "600 pinned slots beside a ring of 1; accepted by the kernels: at most"),
    ],
)
def test_what_the_kernels_do_not_serve_is_refused(changes, options, words):
    with pytest.raises(ValueError, match=rf"{words}.*backend='graph' or 'ring'"):
        check_kernels(spec_of(**changes), slots_of(**options), GPU)


def test_odd_widths_are_refused():
    model = build("llama").half()
    model.config.intermediate_size = 100
    with pytest.raises(ValueError, match="intermediate_size=100; accepted by the kernels: multiples of 8"):
        check_kernels(describe(model), slots_of(), GPU)


@pytest.fixture(autouse=True)
def triton_is_there(monkeypatch):
    """For `check_kernels`; whether the kernels run is not decided by this name."""
    monkeypatch.setattr(fused, "triton", object())


def test_a_missing_triton_is_refused(monkeypatch):
    check_kernels(spec_of(), slots_of(), GPU)
    monkeypatch.setattr(fused, "triton", None)
    with pytest.raises(ValueError, match="need the triton package"):
        check_kernels(spec_of(), slots_of(), GPU)


def test_a_cpu_serves_everything():
    unserved = spec_of(dtype=torch.float32, head_dim=24)
    with pytest.raises(ValueError, match="accepted by the kernels"):
        check_kernels(unserved, slots_of(), GPU)
    assert check_kernels(unserved, slots_of(), torch.device("cpu")) is None


# ---- on a GPU ----

GPU_POLICIES = ["strict", "lazy", "refresh-uniform", "refresh-window-attention", "refresh-accumulated-attention"]
GPU_POLICIES += ["refresh-uncertainty", "adaptive-entropy"]
SAME_CHOICES = ("strict", "lazy", "refresh-uniform")  # a rounding error cannot change what is kept


@pytest.mark.gpu
@pytest.mark.parametrize("family", SERVED_ON_GPU)
@pytest.mark.parametrize("policy", GPU_POLICIES)
def test_the_graph_says_what_kernels_say_one_by_one(family, policy):
    """Bit for bit: with dependent launch, prefetching and a graph, or without any of them."""
    model, ids = build(family, torch.float16).cuda(), token_ids(400).cuda()
    replayed = engine(policy=policy, model=model, rebase_at=60, backend="fused").score(ids)[1:]
    launched = engine(policy=policy, model=model, rebase_at=60).score(ids)[1:]
    apart = engine(policy=policy, model=model, rebase_at=60)
    plan = {op: replace(p, prefetch=0, pdl=False) for op, p in default_plan(apart.weights, apart.state).items()}
    apart._step.decodes[Block(0, 1)] = FusedDecode(apart.weights, apart.state.span(), plan)
    assert torch.equal(replayed, launched) and torch.equal(replayed, apart.score(ids)[1:])
    assert replayed.isfinite().all()
    if policy in SAME_CHOICES:
        ring = engine(policy=policy, model=model, rebase_at=60, backend="ring").score(ids)[1:]
        other = engine(policy="window-only", model=model, backend="ring").score(ids)[1:]
        assert (ring - replayed).abs().mean() < HALF_TOLERANCE < (ring - other).abs().mean()


@pytest.mark.gpu
@pytest.mark.parametrize("family", PERSISTENT)
@pytest.mark.parametrize("options", ONE_KERNEL)
def test_all_layers_in_one_kernel(family, options, monkeypatch):
    """The plan chooses the persistent kernel; with it a graph says, bit for bit, what single launches say."""
    model, ids = build(family, torch.float16).cuda(), token_ids(400).cuda()
    apart = engine(**options, model=model, rebase_at=60, backend="fused-ops").score(ids)[1:]
    plans, config = PERSISTENT[family]
    monkeypatch.setitem(plans, model.config.hidden_size, OpLaunch(config, prefetch=4096))
    replayed, launched = (engine(**options, model=model, rebase_at=60, backend=b) for b in ("fused", "kernels"))
    found = replayed.score(ids)[1:]
    assert torch.equal(found, launched.score(ids)[1:]) and replayed.stats()["persistent_layers"] == 1
    assert replayed.recall_events == launched.recall_events and replayed.stats().get("recalls", 9) >= 9
    other = engine(policy="window-only", model=model, backend="ring").score(ids)[1:]
    assert (apart - found).abs().mean() < HALF_TOLERANCE < (apart - other).abs().mean()


@pytest.mark.gpu
@pytest.mark.parametrize("family", SERVED_ON_GPU)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_several_streams_on_a_gpu(family, dtype):
    model, texts = build(family, dtype).cuda(), [token_ids(120, seed=s).cuda() for s in range(3)]
    together = engine(policy="refresh-uniform", model=model, streams=3, backend="fused")
    together.prefill(texts[1][:40], stream=1)
    logits = torch.stack(
        [together.step(torch.stack([t[i + 40 * (s == 1)] for s, t in enumerate(texts)])) for i in range(80)]
    )
    for s, text in enumerate(texts):
        alone, first = engine(policy="refresh-uniform", model=model, backend="fused"), 40 * (s == 1)
        if first:
            alone.prefill(text[:first])
        expected = torch.stack([alone.step(text[i : i + 1])[0] for i in range(first, first + 80)])
        assert (logits[:, s] - expected).abs().mean() < (0.02 if dtype == torch.float16 else 0.1)
    assert (logits[:, 0] - logits[:, 2]).abs().mean() > 0.2, "control: the streams differ"


@pytest.mark.gpu
@pytest.mark.parametrize("positions", POSITIONS)
def test_scalars_follow_the_host_in_a_graph(positions):
    model = build("llama", torch.float16).cuda()
    e = engine(policy="refresh-window-attention", model=model, positions=positions, rebase_at=50, backend="fused")
    check_scalars(e, 180)
    assert e.stats()["rebases"] >= 2


@pytest.mark.gpu
def test_more_tokens_than_a_plan_holds():
    """The cursor starts anew with every plan; nothing is captured again."""
    model, ids = build("gpt_neox", torch.float16).cuda(), token_ids(700).cuda()
    e = engine(policy="strict", model=model, backend="fused")
    graphs, ring = dict(e._step._graphs), engine(policy="strict", model=model, backend="ring")
    assert (e.score(ids)[1:] - ring.score(ids)[1:]).abs().mean() < HALF_TOLERANCE
    assert e._step._graphs == graphs


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["kernels", "fused"])
def test_float32_is_refused_on_a_gpu(backend):
    with pytest.raises(ValueError, match="float32; accepted by the kernels"):
        engine(model=build("llama").cuda(), backend=backend)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "policy", ["adaptive-entropy", "refresh-uniform", "refresh-window-attention", "refresh-accumulated-attention"]
)
def test_no_step_and_no_prune_waits_for_the_device(policy):
    model = build("llama", torch.float16).cuda()
    e = engine(policy=policy, model=model, backend="fused")
    e.score(token_ids(100).cuda())
    events = e.stats()["events"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(60):
            e.advance(None, [0])
        with pytest.raises(RuntimeError, match="synchroniz"):
            e.state.logits.sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert e.stats()["events"] > events + 2, "control: there were prunes"
