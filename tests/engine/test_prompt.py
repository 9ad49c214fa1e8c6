"""Prompts through the packed weights against the oracle: chunks of any size, full streams, wrapped rings, streams."""

import importlib
import weakref

import pytest
import torch
from fake_graphs import without_gpu
from oracle.models import ENGINE, build, token_ids
from streams import TOLERANCE, FakeTokenizer, oracle_run, small_policy

from sinkstream.cache import POSITIONS, StreamingCache
from sinkstream.engine import Engine
from sinkstream.engine.foreseen_chunks import ForeseenChunk, ForeseenChunks
from sinkstream.engine.graphs import GraphCaptures
from sinkstream.engine.prompt import PromptForward
from sinkstream.engine.prompt_choices import ChoosingChunk
from sinkstream.engine.prompt_events import EventPrompts
from sinkstream.engine.short_chunks import SHORT_SIZES, short_chunk_sizes
from sinkstream.kernels.band import Band
from sinkstream.models import load_model
from sinkstream.policies import PRESETS, EvictionPolicy, PruneSchedule

LOOKING = [name for name in PRESETS if not EvictionPolicy.build(window=20, **PRESETS[name]()).plan_known]
PLANNED = [name for name in PRESETS if name not in LOOKING]
POLICIES = {name: small_policy(name) for name in PLANNED} | {
    "overlap+slack+max-drop": {"sink": 3, "window": 17, "compress_every": 11, "overlap": 4, "max_drop": 3, "slack": 8},
    "many sinks": {"sink": 30, "window": 9, "compress_every": 5},
}
SCORED = ("window-attention", "accumulated-attention", "uncertainty")  # what is kept for them
SERVED = [f for f in ENGINE if f != "gpt_neox_sequential"]
TOKENS = 230
PARTS = [(230,), (2, 1, 97, 3, 50, 77), (19, 211)]  # prompts that follow each other; the first is shorter than the cap
CHUNKS = (1, 7, 60, 2048)
CASES = [
    (policy, SERVED[(i + j) % len(SERVED)], POSITIONS[(i + j) % 2], PARTS[(i + j) % len(PARTS)], chunk)
    for i, policy in enumerate(POLICIES)
    for j, chunk in enumerate(CHUNKS)
]


def engine(model, policy: str, **more) -> Engine:
    return Engine(model, **POLICIES[policy], **more)


@pytest.mark.parametrize(("policy", "family", "positions", "parts", "chunk"), CASES)
def test_the_next_token_is_that_of_the_oracle(policy, family, positions, parts, chunk):
    """After every prompt, and of every token that is stepped behind the last one."""
    model, ids = build(family, layers=1), token_ids(TOKENS + 40)
    expected = oracle_run(model, ids, POLICIES[policy], positions)
    e, fed = engine(model, policy, positions=positions, rebase_at=60, chunk_tokens=chunk), 0
    for size in parts:
        logits = e.prefill(ids[fed : fed + size])
        fed += size
        found = -logits.double().log_softmax(-1)[ids[fed]]
        assert (found - expected.nll[fed - 1]).abs() < TOLERANCE, fed
    assert (e.score(ids[fed:]).double() - expected.nll[fed - 1 :]).abs().max() < TOLERANCE
    stats = e.stats()
    assert stats["events"] == sum(step.event for step in expected.steps)
    assert stats["kept"] == expected.steps[-1].visible.shape[-1]


def at_fixed_addresses(e: Engine, sizes: tuple[int, ...], chunk_tokens: int = 2048) -> Engine:
    """The engine, its short chunks padded as for a CUDA graph, but run as they are."""
    forward = PromptForward(e.weights, e.state, chunk_tokens, sizes, capture=False)
    e._append = forward if e.policy.plan_known else EventPrompts(forward)
    return e


# what a chunk at fixed addresses keeps for a scorer, beside what any policy needs
KEPT = ("refresh-window-attention", "refresh-accumulated-attention", "refresh-uncertainty", "refresh-structural")


@pytest.mark.parametrize(
    ("policy", "family", "positions"),
    [(policy, SERVED[i % len(SERVED)], POSITIONS[i % 2]) for i, policy in enumerate([*POLICIES, *KEPT])],
)
def test_short_chunks_at_fixed_addresses_are_exact(policy, family, positions):
    """Two streams in turn through the same addresses, with chunks of their own, one of them longer than all sizes."""
    model, texts = build(family, layers=2), [token_ids(270, seed=s) for s in range(2)]
    options = POLICIES.get(policy) or small_policy(policy)
    expected = [oracle_run(model, ids, options, positions) for ids in texts]
    more = {"positions": positions, "rebase_at": 60, "streams": 2, "tokenizer": FakeTokenizer()}
    e = at_fixed_addresses(Engine(model, **options, **more), (8, 32, 64))
    fed = [0, 0]
    for sizes in ((2, 40), (1, 8), (97, 3), (3, 33), (50, 61), (64, 32), (5, 5)):
        for s, size in enumerate(sizes):
            ids, first = texts[s], fed[s]
            logits = e.prefill(ids[first : first + size], stream=s)
            fed[s] += size
            found = -logits.double().log_softmax(-1)[ids[fed[s]]]
            assert (found - expected[s].nll[fed[s] - 1]).abs() < TOLERANCE, (s, fed)
    for s, ids in enumerate(texts):
        nll = e.score(ids[fed[s] :], stream=s).double()
        assert (nll - expected[s].nll[fed[s] - 1 :]).abs().max() < TOLERANCE
        assert e.stats(stream=s)["events"] == sum(step.event for step in expected[s].steps)


@pytest.mark.parametrize("wrong", ["row", "position", "past", "slot"])
def test_a_wrong_scalar_in_the_table_would_show(wrong, monkeypatch):
    model, ids = build("llama", layers=2), token_ids(200)
    expected, made, found = oracle_run(model, ids, POLICIES["strict"]).nll, Band.__init__, []
    change = {"row": lambda row: 1 - row, "position": lambda value: 2 * value}.get(wrong, lambda value: value + 3)
    monkeypatch.setattr(
        Band,
        "__init__",
        lambda band, *a, **k: made(band, *a, **(k | ({wrong: change(k[wrong])} if wrong in k else {}))),
    )
    e = at_fixed_addresses(engine(model, "strict", streams=2), (16, 64))
    for first in range(0, 180, 30):
        logits = e.prefill(ids[first : first + 30])
        found.append(abs(float(-logits.double().log_softmax(-1)[ids[first + 30]] - expected[first + 29])))
    assert max(found) > 1e-2


def test_chunks_are_padded_to_the_next_size_and_only_where_steps_are_captured():
    model = build("llama", layers=1)
    e = at_fixed_addresses(engine(model, "strict"), (16, 64))
    assert [e._append.short.size(tokens) for tokens in (1, 16, 17, 64, 65)] == [16, 16, 64, 64, None]
    assert all(engine(model, "strict", backend=b)._append.short.size(9) is None for b in ("ring", "kernels"))
    assert short_chunk_sizes(2048) == SHORT_SIZES and short_chunk_sizes(40) == (16, 32, 64)
    assert short_chunk_sizes(1) == (16,)


def test_a_capture_that_fails_says_what_was_captured():
    with pytest.raises(ValueError) as caught:
        GraphCaptures(torch.device("cpu"))(lambda: None, name="nothing at all", warmups=1)
    assert "while nothing at all was captured in a CUDA graph" in caught.value.__notes__[0]


@pytest.mark.parametrize("policy", ["strict", "max-drop"])
def test_streams_do_not_disturb_each_other(policy):
    model, texts = build("llama", layers=2), [token_ids(150, seed=s) for s in range(3)]
    e = engine(model, policy, streams=3, chunk_tokens=64)
    for part in range(3):
        for s in (2, 0, 1):
            logits = e.prefill(texts[s][50 * part : 50 * part + 49], stream=s)
            e.step(texts[s][50 * part + 49 : 50 * part + 50], streams=[s])
    for s, text in enumerate(texts):
        alone = oracle_run(model, text, POLICIES[policy])
        found = -logits.double().log_softmax(-1)[text[149]] if s == 1 else None
        if found is not None:
            assert (found - alone.nll[148]).abs() < TOLERANCE
        assert e.stats(stream=s)["seen"] == 150


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_as_exact_as_steps(dtype):
    model, ids = build("llama", dtype), token_ids(200)
    policy = POLICIES["strict"]
    exact = oracle_run(model, ids, policy).nll
    stepped = engine(model, "strict").score(ids)[1:].double() - exact
    e, worst_found = engine(model, "strict"), []
    for at in range(30, 200, 17):
        e.reset()
        worst_found.append(float(-e.prefill(ids[:at]).double().log_softmax(-1)[ids[at]] - exact[at - 1]))
    found = torch.tensor(worst_found)
    assert found.square().mean().sqrt() < 2 * stepped.square().mean().sqrt()


@pytest.mark.parametrize("wrong", ["turn", "no turn", "first"])
def test_a_frame_or_a_band_off_by_one_would_show(wrong, monkeypatch):
    model, ids = build("llama", layers=2), token_ids(200)
    expected = oracle_run(model, ids, POLICIES["strict"]).nll
    made = Band.__init__
    change = {
        "turn": lambda first, turn: (first, turn + 1),
        "no turn": lambda first, turn: (first, None),
        "first": lambda first, turn: (first + 1, turn),
    }[wrong]
    monkeypatch.setattr(Band, "__init__", lambda band, first, turn, *a, **k: made(band, *change(first, turn), *a, **k))
    found = []
    for at in (60, 101, 150, 199):
        e = engine(model, "strict")
        found.append(abs(float(-e.prefill(ids[:at]).double().log_softmax(-1)[ids[at]] - expected[at - 1])))
    assert max(found) > 1e-2


def test_no_module_is_called_and_no_forward_is_cut_at_a_prune(monkeypatch):
    model, ids = build("llama", layers=2), token_ids(300)
    e = engine(model, "strict", chunk_tokens=100)
    monkeypatch.setattr(e._cache, "begin_forward", lambda *_: pytest.fail("the module is called"))
    sizes, forward = [], e._append.append
    monkeypatch.setattr(e._append, "append", lambda part, *a: sizes.append(len(part)) or forward(part, *a))
    e.prefill(ids)
    assert sizes == [100, 100, 100] and e.stats()["events"] > 200


def forwards(e: Engine, monkeypatch) -> list[tuple[int, int]]:
    """Tokens of every forward of the prompts of an engine, and how many the stream had seen before."""
    sizes, layers = [], PromptForward.layers

    def counted(forward, ids, chunk):
        sizes.append((len(ids), e.state.counters[0].seen))
        return layers(forward, ids, chunk)

    monkeypatch.setattr(PromptForward, "layers", counted)
    return sizes


@pytest.mark.parametrize("policy", LOOKING)
def test_a_policy_that_looks_takes_a_forward_a_prune_at_the_most(policy, monkeypatch):
    """A scorer of anything but attention is asked between two forwards; the others cross prunes, many in a forward."""
    ids, options = token_ids(600), small_policy(policy)
    e = Engine(build("llama", layers=2), **options, tokenizer=FakeTokenizer())
    sizes = forwards(e, monkeypatch)
    e.prefill(ids)
    events = e.stats()["events"]
    assert events > 30
    if "attention" in policy or "last-query" in policy:
        assert len(sizes) < 5 and sum(tokens for tokens, _ in sizes) == 600
        return
    if "adaptive" not in policy:
        assert len(sizes) == events + 1 and sum(tokens for tokens, _ in sizes) == 600
        return
    assert len(sizes) < events / 2, "foreseen, not met"
    assert sum(tokens for tokens, _ in sizes) > 600, "control: a forward that was foreseen wrongly is done again"


def test_what_was_foreseen_wrongly_is_seen_by_no_token(monkeypatch):
    """Risks that are foreseen as badly as can be cost forwards and nothing else; without a check they would show."""
    ids, options = token_ids(260), small_policy("adaptive-entropy")
    expected = oracle_run(build("llama", layers=2), ids, options).nll
    foresee, follow = PruneSchedule.foresee, PruneSchedule.follow

    def worst(e) -> float:
        return (e.score(ids[250:]).double() - expected[249:]).abs().max().item()

    monkeypatch.setattr(PruneSchedule, "foresee", lambda s, risks, tokens: foresee(s, {}, tokens))
    e = Engine(build("llama", layers=2), **options)
    sizes = forwards(e, monkeypatch)
    e.prefill(ids[:250])
    assert worst(e) < TOLERANCE and len(sizes) > e.stats()["events"] / 2

    def unchecked(schedule, planned, risks):
        kept = follow(schedule, planned, risks)
        while kept < len(planned):
            schedule.step()
            kept += 1
        return kept

    monkeypatch.setattr(PruneSchedule, "follow", unchecked)
    e = Engine(build("llama", layers=2), **options)
    e.prefill(ids[:250])
    assert worst(e) > 1e-3


@pytest.mark.parametrize("value", [0, 2.0, True])
def test_a_chunk_is_a_whole_number_of_tokens(value):
    with pytest.raises(ValueError, match=r"chunk_tokens=.* is not accepted; accepted: a whole number of at least 1"):
        engine(build("llama", layers=1), "strict", chunk_tokens=value)


CROSSING = {  # refresh by attention: queries of several prunes; staged drops and overlap; more pinned than leave
    "many queries": {"compress_every": 5, "refresh": 6, "scorer": "window-attention", "observation": 14},
    "staged": {"compress_every": 11, "overlap": 4, "max_drop": 3, "slack": 8, "refresh": 9, "scorer": "last-query"},
    "accumulated": {"compress_every": 4, "max_drop": 2, "refresh": 13, "scorer": "accumulated-attention"},
}


@pytest.mark.parametrize(("policy", "family"), list(zip(CROSSING, ("llama", "gpt_neox", "qwen3"))))
def test_chunks_cross_prunes_at_which_pinned_tokens_are_chosen(policy, family, monkeypatch):
    """Two streams in pieces, with a rebase and steps between them; then wrong choices, which would show."""
    model, texts = build(family, layers=2), [token_ids(180, seed=s) for s in range(2)]
    options = {"sink": 3, "window": 31, **CROSSING[policy]}
    expected = [oracle_run(model, ids, options).nll for ids in texts]
    crossed, made = [], ChoosingChunk.__init__
    monkeypatch.setattr(ChoosingChunk, "__init__", lambda chunk, *a: crossed.append(a[2]) or made(chunk, *a))

    def worst() -> float:
        e, found = Engine(model, **options, streams=2, rebase_at=60, chunk_tokens=70), []
        for first, end in ((0, 20), (20, 110), (111, 165)):
            for stream, ids in enumerate(texts):
                logits = e.prefill(ids[first:end], stream=stream)
                found.append(-logits.double().log_softmax(-1)[ids[end]] - expected[stream][end - 1])
                if end == 110:
                    e.step(ids[end : end + 1], streams=[stream])
        for stream, ids in enumerate(texts):
            found += list(e.score(ids[165:], stream=stream).double() - expected[stream][164:])
        return torch.stack(found).abs().max().item()

    assert worst() < TOLERANCE and len(crossed) >= 4
    best = importlib.import_module("sinkstream.kernels.pinned_sets")._best
    monkeypatch.setattr("sinkstream.kernels.pinned_sets._best", lambda scores, keep: best(-scores, keep))
    assert worst() > 1e-3


@pytest.mark.parametrize(("family", "signal"), [("llama", "entropy"), ("gpt_neox", "top1")])
def test_foreseen_chunks_at_fixed_addresses_are_exact(family, signal, monkeypatch):
    """Padded as for a CUDA graph, but run as they are; two streams in turn through the same addresses."""
    monkeypatch.setattr(ForeseenChunks, "captures", lambda chunks: True)
    monkeypatch.setattr(ForeseenChunk, "capture", lambda chunk: None)
    model, texts = build(family, layers=2), [token_ids(180, seed=s) for s in range(2)]
    options = small_policy("adaptive-entropy") | {"adaptive": signal}
    expected = [oracle_run(model, ids, options).nll for ids in texts]
    e = Engine(model, **options, streams=2, rebase_at=60, chunk_tokens=96)
    for first, end in ((0, 30), (30, 150), (150, 170)):
        for stream, ids in enumerate(texts):
            logits = e.prefill(ids[first:end], stream=stream)
            found = -logits.double().log_softmax(-1)[ids[end]]
            assert (found - expected[stream][end - 1]).abs() < TOLERANCE
    assert e._append.foreseen.due() == [], "control: each size has been used"


def test_a_foreseen_chunk_holds_the_keys_of_one_forward(monkeypatch):
    """Warm-ups and capture: what the forward before has held is gone when the next one begins."""
    without_gpu(monkeypatch)
    monkeypatch.setattr(ForeseenChunks, "captures", lambda chunks: True)
    e = Engine(build("llama", layers=2), backend="graph", chunk_tokens=96, **small_policy("adaptive-entropy"))
    held, alive, layers = [], [], PromptForward.layers

    def watched(forward, ids, chunk):
        alive.append([keys() is not None for keys in held])
        found = layers(forward, ids, chunk)
        held.append(weakref.ref(chunk.held[0][1]))
        return found

    monkeypatch.setattr(PromptForward, "layers", watched)
    e._append.foreseen.ready(96)
    assert len(alive) > 1 and not any(map(any, alive))
    assert held[-1]() is not None, "control: the last one is there"


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "dtype"), [("pythia-160m", torch.float16), ("smollm2-135m", torch.bfloat16)])
def test_on_a_gpu_the_engine_and_the_cache_predict_the_same(shape, dtype):
    """Kernels in both: chunks of a full stream against single steps of the engine's own."""
    model = load_model(f"random:{shape}", dtype=dtype, device="cuda").model
    ids = token_ids(1500).cuda()
    cache = StreamingCache.for_model(model, cap=300)
    cached = cache.prefill(model, ids[None, :1450])[0].float()
    cache.close()
    e = Engine(model, cap=300, chunk_tokens=400, backend="fused")
    prompted = e.prefill(ids[:1450])
    e.reset()
    e.prefill(ids[:1])
    for token in ids[1:1450].split(1):
        stepped = e.step(token)[0]
    bound = 0.02 if dtype == torch.float16 else 0.1
    for found in (cached, prompted):
        assert (found - stepped).norm() < bound * stepped.norm()
    e.reset()
    other = e.prefill(ids[:1450].flip(0))
    assert (other - stepped).norm() > 5 * (prompted - stepped).norm(), "control: another text"


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "policy"),
    [
        ("pythia-160m", {}),
        ("smollm2-135m", {}),
        *(
            (shape, {"compress_every": 40, "refresh": 40, "scorer": scorer})
            for shape, scorer in zip(("pythia-160m", "smollm2-135m", "smollm2-135m"), SCORED)
        ),
    ],
    ids=str,
)
def test_on_a_gpu_captured_short_chunks_are_those_that_are_not_captured(shape, policy):
    """Beginnings, turns behind a full stream, two streams, in sizes that are captured in any order."""
    model = load_model(f"random:{shape}", dtype=torch.float16, device="cuda").model
    ids, logits, held = token_ids(2400).cuda(), {}, {}
    for backend in ("kernels", "fused"):
        e, fed, logits[backend] = Engine(model, cap=300, backend=backend, streams=2, **policy), [0, 600], []
        for sizes in ((2, 300), (1, 50), (600, 17), (50, 100), (50, 50), (33, 50), (512, 1)):
            for s, size in enumerate(sizes):
                logits[backend].append(e.prefill(ids[fed[s] : fed[s] + size], stream=s))
                fed[s] += size
                logits[backend].append(e.step(ids[fed[s] : fed[s] + 1], streams=[s])[0])
                fed[s] += 1
        held[backend] = e.state.keys[..., e.state.geometry.pinned_slots :, :].float()
        across = getattr(e._append, "choosing", None)
        plain = [16, 32, 64, 128, 320, 512] if not policy else [16, 32, 64] if across is None else [16, 32, 320]
        for short, expected in (
            ((e._append.forward if policy else e._append).short, plain),
            *([] if across is None else [(across.short, [64, 128, 320, 512])]),
        ):
            found = [size for size in sorted(short._graphs) if size in expected]
            assert found == ([] if backend == "kernels" else expected)
        e.close()
    bound = 0.04 if policy else 0.02  # of equally good tokens rounding may keep another
    for plain, graphed in zip(*logits.values()):
        assert (graphed - plain).norm() < bound * plain.norm()
    plain, graphed = held.values()
    assert (graphed - plain).norm() < bound * plain.norm()
    control = torch.stack([a - b for a, b in zip(logits["fused"][2:], logits["fused"])])
    assert control.norm(dim=-1).median() > 0.05 * logits["fused"][0].norm(), "control: other tokens, other logits"


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["adaptive-entropy", "refresh-window-attention", "refresh-accumulated-attention"])
def test_on_a_gpu_a_prompt_under_a_policy_that_looks_ends_where_its_steps_end(policy):
    model = load_model("random:smollm2-135m", dtype=torch.float16, device="cuda").model
    ids, e = token_ids(900).cuda(), Engine(model, cap=300, backend="fused", **PRESETS[policy]())
    prompted, stats = e.prefill(ids[:850]), e.stats()
    e.reset()
    e.prefill(ids[:1])
    for token in ids[1:850].split(1):
        stepped = e.step(token)[0]
    assert abs(e.stats()["events"] - stats["events"]) <= (1 if "adaptive" in policy else 0)
    assert (prompted - stepped).norm() < 0.05 * stepped.norm()
    e.reset()
    assert (e.prefill(ids[:850].flip(0)) - stepped).norm() > 5 * (prompted - stepped).norm(), "control: another text"


@pytest.mark.gpu
def test_on_a_gpu_a_capture_changes_no_stream_and_a_failing_one_is_said():
    model = load_model("random:smollm2-135m", dtype=torch.float16, device="cuda").model
    ids, e = token_ids(900).cuda(), Engine(model, cap=300, backend="fused", streams=2)
    e.prefill(ids[:700], stream=0)
    before = {name: part.clone() for name, part in e.state.stream_buffers(0).items()}
    e.prefill(ids[:50], stream=1)
    assert all(torch.equal(part, before[name]) for name, part in e.state.stream_buffers(0).items())
    forward = e._append.short.forward

    def fails(padded, band):
        forward(padded, band)
        if torch.cuda.is_current_stream_capturing():
            raise MemoryError("in the middle of a capture")

    e._append.short.forward = fails
    with pytest.raises(MemoryError) as caught:
        e.prefill(ids[:20], stream=1)
    assert any("the forward of a chunk of 32 tokens" in note for note in caught.value.__notes__)
    assert e.stats(stream=1)["seen"] == 0
    e._append.short.forward = forward
    again, other = e.prefill(ids[:20], stream=1), Engine(model, cap=300, backend="kernels").prefill(ids[:20])
    assert (again - other).norm() < 0.02 * other.norm()
    assert all(torch.equal(part, before[name]) for name, part in e.state.stream_buffers(0).items())
