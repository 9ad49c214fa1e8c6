"""The engine against the brute-force oracle: every policy, family and position frame, stepped and prefilled.

Also: streams that share the weights and nothing else, positions that are rebased, and inputs that are refused.
"""

import copy
import pickle

import pytest
import torch
from oracle.models import ENGINE, VOCAB, build, token_ids
from streams import (
    TOLERANCE,
    FakeTokenizer,
    full_cache_error,
    one_too_far,
    oracle_run,
    root_mean_square,
    rounding_bound,
    small_policy,
)

from sinkstream.cache import POSITIONS
from sinkstream.engine import STEPS, Engine
from sinkstream.policies import PRESETS

TOKENS = 168
TOKENS_PAST_A_PLAN = 304  # adaptive policies plan 256 tokens ahead and rebase between plans
SERVED = [f for f in ENGINE if f != "gpt_neox_sequential"]
THOROUGH = ("gpt_neox", "llama")
OTHERS = [f for f in SERVED if f not in THOROUGH]
POLICIES = {name: small_policy(name) for name in PRESETS} | {
    "max-drop+overlap+slack": {"sink": 3, "window": 17, "compress_every": 11, "overlap": 4, "max_drop": 3, "slack": 8},
    "refresh-uniform+max-drop": small_policy("refresh-uniform", max_drop=3, overlap=3),
    "refresh-window-attention+adaptive": small_policy("adaptive-top1")
    | {"refresh": 6, "scorer": "window-attention", "observation": 5},
    "refresh-uncertainty+entropy": small_policy("refresh-uncertainty", uncertainty="entropy"),
    "refresh-key-norm+no-sink": small_policy("refresh-key-norm", sink=0),
}


CPU_BACKENDS = ("ring", "kernels")  # the latter through the kernels' twins
PARTS = ((1, 20, 129, 10), (25, 1, 25, 1, 80, 20), (164, 1, 1))  # prefilled, stepped, prefilled …


def small(family: str):
    """The tiny model of a family, with two layers in two families and one in the others."""
    return build(family, layers=2 if family in ("gpt_neox", "llama") else 1)


def engine(family: str = "gpt_neox", policy: str | dict = "lazy", **more) -> Engine:
    options = POLICIES[policy] if isinstance(policy, str) else policy
    model = small(family) if isinstance(family, str) else family
    return Engine(model, tokenizer=FakeTokenizer(), **options, **more)


def jobs() -> list:
    """(policy, family, positions, parts): every policy in both frames, on two families, and on one that takes turns.

    `parts` are the sizes prefilled and stepped in turn after the run that is stepped only; None: no such second run.
    """
    found = []
    for i, policy in enumerate(POLICIES):
        for j, family in enumerate(THOROUGH):
            found.append((policy, family, POSITIONS[(i + j) % 2], PARTS[(i // 2 + j) % len(PARTS)]))
        turn = i // len(OTHERS) + i
        parts = PARTS[turn % len(PARTS)] if turn % 2 else None
        found.append((policy, OTHERS[i % len(OTHERS)], POSITIONS[turn % 2], parts))
    return found


def tokens_of(policy: str) -> int:
    """Tokens of a text that brings prunes, rebases and the end of a plan."""
    return TOKENS_PAST_A_PLAN if policy.startswith("adaptive") else TOKENS


def worst(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def fed_by_parts(e: Engine, ids: torch.Tensor, parts: tuple[int, ...]) -> torch.Tensor:
    """NLL of all but the first token, (T - 1,); parts are prefilled and stepped in turn, NaN inside a prefill."""
    nll, fed = torch.full((len(ids),), float("nan")), 0
    for i, size in enumerate((*parts, len(ids) - sum(parts))):
        piece = ids[fed : fed + size]
        if i % 2:
            nll[fed : fed + size] = e.score(piece)
        else:
            e.prefill(piece)
        fed += size
    return nll[1:].double()


@pytest.mark.parametrize(("policy", "family", "positions", "parts"), jobs())
def test_steps_and_prefills_agree_with_the_oracle(policy, family, positions, parts):
    ids = token_ids(tokens_of(policy))
    expected = oracle_run(small(family), ids, POLICIES[policy], positions)
    for backend in CPU_BACKENDS:
        e = engine(family, policy, positions=positions, rebase_at=60, backend=backend)
        nll = torch.cat([e.score(ids[:100]), e.score(ids[100:])])[1:].double()
        assert worst(nll, expected.nll) < TOLERANCE, backend
        stats, visible = e.stats(), expected.steps[-1].visible.shape[-1]
        assert stats["events"] == sum(step.event for step in expected.steps) >= 6
        assert stats["kept"] == e.last_steps[0].visible == visible <= e.policy.peak
        assert stats["seen"] == len(ids) == stats["kept"] + stats["evicted"]
        assert stats["rebases"] >= 1
        if parts is None:
            continue
        e.reset()
        nll = fed_by_parts(e, ids, parts)
        known = ~nll.isnan()
        assert known.any() and worst(nll[known], expected.nll[known]) < TOLERANCE, backend
        assert {**e.stats(), "rebases": 0} == {**stats, "rebases": 0}


@pytest.mark.parametrize("policy", ["strict", "refresh-window-attention", "refresh-uncertainty", "adaptive-entropy"])
def test_streams_are_independent(policy):
    """Streams of different lengths, stepped in changing company, say what each says alone."""
    texts = [token_ids(112, seed=s) for s in range(3)]
    alone = []
    for text in texts:
        e = engine("llama", policy)
        alone.append(torch.stack([e.step(text[i : i + 1])[0] for i in range(len(text))]))
    e = engine("llama", policy, streams=3)
    e.prefill(texts[1][:50], stream=1)
    fed, seen = [0, 50, 0], [[], [], []]
    groups = [(0,), (0, 1, 2), (2, 0), (1, 2), (0, 1, 2), (0, 1, 2), (1,), (2,)]
    turn = 0
    while any(n < 112 for n in fed):
        who = [s for s in groups[turn % len(groups)] if fed[s] < 112]
        turn += 1
        if not who:
            continue
        logits = e.step([int(texts[s][fed[s]]) for s in who], streams=who)
        for s, row in zip(who, logits):
            seen[s].append(row)
            fed[s] += 1
    for s, first in enumerate((0, 50, 0)):
        assert worst(torch.stack(seen[s]), alone[s][first:]) < 1e-4
        assert e.stats(stream=s)["events"] >= 3
    assert worst(alone[0], alone[1]) > 1.0, "control: the streams differ"


def test_one_stream_can_be_forgotten():
    e = engine("qwen3", "refresh-uniform", streams=2)
    text = token_ids(80)
    e.prefill(text, stream=0)
    e.prefill(text, stream=1)
    e.reset(stream=0)
    assert (e.stats(stream=0)["seen"], e.stats(stream=1)["seen"]) == (0, 80)
    again = e.prefill(text, stream=0)
    assert worst(again, e.state.logits[1]) < 1e-5


@pytest.mark.parametrize("positions", POSITIONS)
def test_rebasing_changes_nothing(positions):
    ids = token_ids(500)
    often = engine("llama", "refresh-last-query", positions=positions, rebase_at=1)
    never = engine("llama", "refresh-last-query", positions=positions, rebase_at=10_000)
    a, b = often.score(ids), never.score(ids)
    assert often.stats()["rebases"] >= 5 and never.stats()["rebases"] == 0
    assert worst(a[1:], b[1:]) < TOLERANCE


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", THOROUGH)
def test_half_precision_costs_what_it_costs_the_module(family, dtype, backend):
    """Token by token against float64 on the same weights; means would hide errors of opposite sign."""
    model, ids, options = small(family).to(dtype), token_ids(200), POLICIES["refresh-uniform"]
    plain = full_cache_error(model, ids)
    nll = engine(model, options, backend=backend).score(ids)[1:].double()
    found = nll - oracle_run(model, ids, options).nll
    assert found.abs().max() < rounding_bound(model)
    assert root_mean_square(found) < 2 * root_mean_square(plain), "not one bit more"
    wrong = nll - oracle_run(model, ids, options, one_too_far).nll
    assert wrong.abs().max() > 2 * rounding_bound(model) and root_mean_square(wrong) > 4 * root_mean_square(plain)


def test_logits_that_were_handed_out_stay():
    e = engine()
    first = e.step([1])
    kept = first.clone()
    e.step([2])
    assert torch.equal(first, kept)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"backend": "warp"}, "unknown engine backend 'warp'; accepted: ring"),
        ({"streams": 0}, "streams=0"),
        ({"positions": "relative"}, "positions='relative'"),
        ({"windw": 3}, "unknown policy option 'windw'"),
        ({"window": 5000}, "trained on 1024 positions"),
        ({"backend": "graph"}, "accepted: a model on a CUDA device"),
        ({"backend": "fused"}, "accepted: a model on a CUDA device"),
    ],
)
def test_wrong_options_are_refused_by_name(change, words):
    with pytest.raises(ValueError, match=words):
        engine(
            policy={"sink": 4, "window": 20} | {k: v for k, v in change.items() if k in ("window", "windw")},
            **{k: v for k, v in change.items() if k not in ("window", "windw")},
        )


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_copy_would_write_to_the_same_buffers_and_is_refused(copied):
    with pytest.raises(ValueError, match=r"an engine cannot be copied or pickled; accepted: engine\.snapshot"):
        copied(engine())


def test_structural_refresh_without_a_tokenizer_is_refused():
    with pytest.raises(ValueError, match="give tokenizer=TOKENIZER"):
        Engine(build("llama"), **small_policy("refresh-structural"))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda e: e.prefill([]), "ids of shape .* whole numbers, at least one$"),
        (lambda e: e.prefill(torch.zeros(1, 3, dtype=torch.int64)), r"ids of shape .*; of a batch, one row: ids\[0\]$"),
        (lambda e: e.prefill([0.5]), "ids of shape|token ids"),
        (
            lambda e: e.prefill([VOCAB]),
            f"token id {VOCAB} at position 0 is .* of {VOCAB} tokens; accepted: 0 to {VOCAB - 1}$",
        ),
        (lambda e: e.prefill([1], stream=2), "stream=2 is not accepted; accepted: 0 to 1"),
        (lambda e: e.step([1]), "1 tokens for 2 streams"),
        (lambda e: e.step([1, 2], streams=[0, 0]), "each once"),
        (lambda e: e.step([1], streams=1), "streams=1 is not accepted; accepted: a sequence of streams"),
        (lambda e: e.rewind(1.5), "tokens=1.5 is not accepted; accepted: a whole number"),
        (lambda e: e.begin_turn(0.5), "ahead=0.5 is not accepted; accepted: a whole number"),
        (lambda e: e.snapshot(e.model), "path=GPTNeoXForCausalLM is not accepted; accepted: a str or a Path"),
        (lambda e: e.restore(5), "path=5 is not accepted"),
        (lambda e: e.score([-1]), "token id -1 at position 0"),
    ],
)
def test_wrong_calls_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call(engine(streams=2))


def test_every_backend_has_a_summary():
    assert STEPS.names() == ["ring", "graph", "graph-norm", "graph-linear", "fused-ops", "kernels", "fused"]
    assert all(STEPS.summary(name) for name in STEPS)


@pytest.mark.gpu
@pytest.mark.parametrize("policy", [*PRESETS, "refresh-window-attention+adaptive"])
def test_the_graph_says_what_the_plain_step_says(policy):
    ids = token_ids(tokens_of(policy)).cuda()
    model = small("llama").cuda()
    plain = engine(model, policy, rebase_at=60).score(ids)
    graph = engine(model, policy, rebase_at=60, backend="graph").score(ids)
    assert worst(plain[1:], graph[1:]) < TOLERANCE
