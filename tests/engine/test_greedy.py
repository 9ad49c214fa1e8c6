"""Greedy steps that find their token themselves: they say what steps say that are given it, and launch nothing else."""

import pytest
import torch
from ops_cases import NEEDS_TRITON
from oracle.models import build, token_ids
from streams import FakeTokenizer, small_policy
from torch.utils._python_dispatch import TorchDispatchMode

from sinkstream.engine import Engine
from sinkstream.kernels import set_implementation
from sinkstream.kernels.layout import LIKELIEST

CPU_BACKENDS = ("ring", "kernels")  # the latter through the kernels' twins
POLICIES = ["strict", "lazy", "refresh-uncertainty", "refresh-structural", "refresh-window-attention", "adaptive-top1"]


def engine(policy: str = "lazy", *, model=None, **more) -> Engine:
    tokenizer = FakeTokenizer() if policy == "refresh-structural" else None
    return Engine(model or build("llama"), tokenizer=tokenizer, **small_policy(policy), **more)


def given(e: Engine) -> torch.Tensor:
    """The likeliest token of every stream, chosen outside the step."""
    return e.state.logits.argmax(-1)


def kept(e: Engine, stream: int = 0) -> dict[str, torch.Tensor]:
    """A copy of all that a stream keeps."""
    return {name: t.clone() for name, t in e.state.stream_buffers(stream).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def check_against_given(policy: str, model, backend: str, tokens: int) -> Engine:
    """Bit for bit what steps do that are given the token, in logits at every step and in all that is kept."""
    alone, fed = (engine(policy, model=model, backend=backend) for _ in range(2))
    prompt = token_ids(30)
    for e in (alone, fed):
        e.prefill(prompt)
    appended = []
    for _ in range(tokens):
        appended.append(int(given(fed)[0]))
        fed.advance(given(fed), [0])
        alone.advance(None, [0])
        assert torch.equal(alone.state.logits, fed.state.logits)
        assert torch.equal(alone.state.scalars, fed.state.scalars)
    assert same(kept(alone), kept(fed)) and alone.stats() == fed.stats()
    assert alone.stats()["events"] >= 3 and len(set(appended)) > 3, "control: evictions, and not one token for ever"
    return alone


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_step_without_a_token_appends_the_likeliest(policy, backend):
    family = "gpt_neox" if policy == "lazy" else "llama"
    e = check_against_given(policy, build(family), backend, 290)
    if policy in ("refresh-uncertainty", "refresh-structural"):
        assert all(channel.abs().max() > 0 for channel in e.state.channels.values()), "control: scorers read something"


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("policy", ["lazy", "refresh-uncertainty"])
def test_streams_in_changing_company(policy, backend):
    model = build("llama")
    alone, fed = (engine(policy, model=model, backend=backend, streams=3) for _ in range(2))
    for e in (alone, fed):
        for s, n in enumerate((3, 30, 11)):
            e.prefill(token_ids(n, seed=s), stream=s)
    groups = [(0, 1, 2)] * 20 + [(0, 2)] * 40 + [(1,)] * 10 + [(0, 1, 2)] * 15
    for who in groups:
        fed.state.wake(who)
        fed.advance(given(fed), who)
        alone.advance(None, who)
        assert torch.equal(alone.state.logits[list(who)], fed.state.logits[list(who)])
    for e in (alone, fed):
        e.state.settle()
    for s in range(3):
        assert same(kept(alone, s), kept(fed, s)) and alone.stats(stream=s) == fed.stats(stream=s)
    assert not torch.equal(alone.state.logits[0], alone.state.logits[2]), "control: the streams differ"


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_given_and_likeliest_tokens_in_one_step(backend):
    model = build("llama")
    mixed, fed = (engine(model=model, backend=backend, streams=2) for _ in range(2))
    for e in (mixed, fed):  # before a prompt all logits are equal, and any of them may be found
        for s in range(2):
            e.prefill(token_ids(9, seed=s), stream=s)
    for _ in range(20):
        tokens = given(fed)
        tokens[0] = 7
        fed.advance(tokens, (0, 1))
        mixed.advance(torch.tensor([7, LIKELIEST]), (0, 1))
        assert torch.equal(mixed.state.logits, fed.state.logits)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_it_goes_on_after_a_prompt_and_after_a_snapshot(backend, tmp_path):
    e, path = engine("refresh-uncertainty", backend=backend), tmp_path / "stream.safetensors"
    first = [e.generate(token_ids(40), max_new_tokens=20).tokens, e.generate([5, 6], max_new_tokens=20).tokens]
    e.snapshot(path)
    onwards = e.generate([], max_new_tokens=30).tokens
    e.restore(path)
    assert e.generate([], max_new_tokens=30).tokens == onwards
    fed = engine("refresh-uncertainty", backend=backend)
    expected = []
    for prompt, count in ((token_ids(40), 20), ([5, 6], 20), ([], 30)):
        if len(prompt):
            fed.prefill(prompt)
        expected.append([])
        for _ in range(count):
            expected[-1].append(int(given(fed)[0]))
            fed.advance(given(fed), [0])
    assert [*first, onwards] == expected


@NEEDS_TRITON
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the tests marked gpu do more")
def test_kernels_in_the_interpreter():
    model = build("gpt_neox", torch.float16, layers=1)
    alone, fed = (Engine(model, sink=2, window=3, backend="kernels", streams=2) for _ in range(2))
    for e in (alone, fed):
        e.prefill([3, 5], stream=0)
        e.prefill([8], stream=1)
    set_implementation("triton")
    try:
        for _ in range(4):
            fed.advance(given(fed), (0, 1))
            alone.advance(None, (0, 1))
            assert torch.equal(alone.state.logits, fed.state.logits)
            assert torch.equal(alone.state.scalars, fed.state.scalars)
    finally:
        set_implementation("auto")


# ---- what is launched, and what is not ----


class Launched(TorchDispatchMode):
    """Counts what PyTorch is asked to do."""

    def __init__(self):
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Note and do it."""
        self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


def test_nothing_is_launched_between_two_greedy_steps():
    e = engine("strict")
    e.prefill(token_ids(40))
    e._step = lambda: None
    for _ in range(16 + 32 + 64 + 128 + 1):  # plans of these lengths, and then one of 256 tokens
        e.advance(None, [0])
    with Launched() as launched:
        for _ in range(200):
            e.advance(None, [0])
    assert launched.calls == []
    with Launched() as launched:
        e.advance(torch.tensor([3]), [0])
    assert launched.calls, "control: a given token is copied"


def test_generating_launches_nothing_a_token_unless_somebody_looks():
    def launched(tokens: int, **more) -> int:
        e = engine("strict")
        e.prefill(token_ids(40))
        e._step = lambda: None
        with Launched() as launched:
            e.generate([], max_new_tokens=tokens, stop_tokens=(), **more)
        return len(launched.calls)

    assert launched(260) == launched(460), "as many plans are made"
    assert launched(260, callback=lambda token, stream: None) < launched(460, callback=lambda token, stream: None)


@pytest.mark.parametrize(
    "write",
    [
        lambda e: e.state.tokens.fill_(3),
        lambda e: e.state.tokens[:1].copy_(torch.tensor([3])),
        lambda e: e.step([3]),
        lambda e: e.score([3]),
        lambda e: e.reset() or e.prefill(token_ids(9)),
    ],
)
@pytest.mark.parametrize("inference", [False, True])
def test_whoever_writes_the_tokens_is_noticed(write, inference):
    e = engine()
    e.prefill(token_ids(40))
    with torch.inference_mode(inference):
        e.advance(None, [0])
        write(e)
        expected = int(given(e)[0])
        with e.state.recording() as recorder:
            e.advance(None, [0])
            assert recorder.tokens().tolist() == [[expected]]
    assert expected != 3, "control"


# ---- reading back ----


@pytest.mark.parametrize("policy", ["strict", "adaptive-top1", "refresh-uniform"])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_recorder_tells_what_was_appended(policy, backend):
    e = engine(policy, backend=backend, streams=2)
    for s in range(2):
        e.prefill(token_ids(20, seed=s), stream=s)
    e.advance(None, (0, 1))
    expected, later = [], []
    with e.state.recording() as recorder:
        for i in range(300):
            who = (1,) if 100 <= i < 130 else (0, 1)
            tokens = torch.tensor([i % 7, i % 5]) if i % 10 == 0 else None
            appended = (given(e) if tokens is None else tokens).tolist()
            expected.append([appended[0] if 0 in who else LIKELIEST, appended[1]])
            e.advance(tokens, who)
            assert [t for s, t in enumerate(recorder.latest()) if s in who] == [appended[s] for s in who]
            if i == 150:
                e.prefill([1, 2], stream=0)
            if i == 200:
                assert recorder.tokens().tolist() == expected
        with e.state.recording() as second:
            later.append(given(e).tolist())
            e.advance(None, (0, 1))
            assert second.tokens().tolist() == later
        e.reset()
        assert recorder.tokens().tolist() == expected + later


def test_a_step_that_fails_is_not_recorded():
    e = engine()
    e.prefill(token_ids(20))
    step, expected = e._step, int(given(e)[0])

    def fail() -> None:
        raise RuntimeError("out of luck")

    with e.state.recording() as recorder:
        e.advance(None, [0])
        e._step = fail
        with pytest.raises(RuntimeError, match="out of luck"):
            e.advance(None, [0])
        e._step = step
        assert recorder.tokens().tolist() == [[expected]]


@pytest.mark.parametrize("policy", ["strict", "adaptive-top1"])
def test_looking_at_tokens_changes_none(policy):
    seen = []
    looked = engine(policy).generate(token_ids(40), max_new_tokens=300, callback=lambda t, s: seen.append(t))
    free = engine(policy).generate(token_ids(40), max_new_tokens=300, stop_tokens=())
    assert looked.tokens == free.tokens == seen and len(set(seen)) > 3


def test_a_callback_may_step_another_stream():
    e = engine(streams=2)
    e.prefill([9, 8], stream=1)
    found = e.generate(token_ids(40), max_new_tokens=30, callback=lambda t, s: e.advance(None, [1]))
    assert found.tokens == engine().generate(token_ids(40), max_new_tokens=30).tokens
    assert [e.stats(stream=s)["seen"] for s in range(2)] == [70, 32]


# ---- on a GPU ----


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["graph", "kernels", "fused"])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_graph_appends_the_likeliest(policy, backend):
    for family in ("gpt_neox", "llama"):
        check_against_given(policy, build(family, torch.float16).cuda(), backend, 290)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["graph", "kernels", "fused"])
def test_looking_beside_a_running_step(backend):
    """The ids that the host sees are those that were appended, for one stream and for several that end one by one."""
    model, prompts = build("llama", torch.float16).cuda(), [token_ids(n, seed=n).cuda() for n in (3, 40, 17)]
    free = engine(model=model, backend=backend, streams=3).generate_batch(prompts, max_new_tokens=300, stop_tokens=())
    seen = {s: [] for s in range(3)}
    looked = engine(model=model, backend=backend, streams=3).generate_batch(
        prompts, max_new_tokens=300, stop_tokens=(), callback=lambda t, s: seen[s].append(t) or len(seen[s]) == 100 + s
    )
    for s in range(3):
        assert looked[s].tokens == seen[s] == free[s].tokens[: 100 + s]
