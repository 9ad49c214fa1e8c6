"""Prompts through the packed weights against the oracle: chunks of any size, full streams, wrapped rings, streams."""

import pytest
import torch
from oracle.models import FAMILIES, build, token_ids
from streams import TOLERANCE, oracle_run, small_policy

from sinkstream.cache import POSITIONS, StreamingCache
from sinkstream.engine import Engine
from sinkstream.kernels.attention_prefill import Band
from sinkstream.models import load_model
from sinkstream.policies import PRESETS, EvictionPolicy

PLANNED = [name for name in PRESETS if EvictionPolicy.build(window=20, **PRESETS[name]()).plan_known]
POLICIES = {name: small_policy(name) for name in PLANNED} | {
    "overlap+slack+max-drop": {"sink": 3, "window": 17, "compress_every": 11, "overlap": 4, "max_drop": 3, "slack": 8},
    "many sinks": {"sink": 30, "window": 9, "compress_every": 5},
}
SERVED = [f for f in FAMILIES if f != "gpt_neox_sequential"]
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
    sizes, forward = [], e._append._forward
    monkeypatch.setattr(e._append, "_forward", lambda part, *a: sizes.append(len(part)) or forward(part, *a))
    e.prefill(ids)
    assert sizes == [100, 100, 100] and e.stats()["events"] > 200


@pytest.mark.parametrize("value", [0, 2.0, True])
def test_a_chunk_is_a_whole_number_of_tokens(value):
    with pytest.raises(ValueError, match=r"chunk_tokens=.* is not accepted; accepted: a whole number of at least 1"):
        engine(build("llama", layers=1), "strict", chunk_tokens=value)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", ["pythia-160m", "smollm2-135m"])
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
