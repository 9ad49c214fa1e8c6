"""Sampling against transformers' logits processors, and draws against their distribution."""

import math

import pytest
import torch
from draws import OPTIONS, g_test, processors, table_of
from ops_cases import DEVICE
from oracle.models import build, token_ids
from streams import small_policy

from sinkstream.engine import Engine, Sampler
from sinkstream.engine.sampling import StreamSampler
from sinkstream.engine.span import Block
from sinkstream.kernels.sample import sample
from sinkstream.kernels.sample_twin import processed, weights

THRESHOLDS = [o for o in OPTIONS if {"top_k", "top_p", "min_p"} & o.keys() and o.get("top_p") != 1.0]


def draws_of(options: dict, logits: torch.Tensor, count: int, *, prompt: torch.Tensor | None = None) -> torch.Tensor:
    """So many draws from one row of logits, each of a stream of its own."""
    table, kernels = table_of([Sampler(**options)], logits.shape[1], prompts=[] if prompt is None else [prompt])
    parts = (table.numbers, table.settings, table.counts, table.bias)
    table.numbers, table.settings, table.counts, table.bias = (
        None if t is None else t.expand(count, -1).contiguous() for t in parts
    )
    positions = torch.arange(count, device=DEVICE)
    return sample(logits.to(DEVICE).expand(count, -1), positions, table, kernels)


def twin_draw(options: dict, logits: torch.Tensor, position: int, *, prompt: list[int], seed: int = 3) -> int:
    """The token that the twin draws on the CPU from one row of logits, after the kernel has drawn the same."""
    table, kernels = table_of([Sampler(**options)], len(logits), seeds=[seed], prompts=[torch.tensor(prompt).long()])
    row, positions = logits[None].to(DEVICE), torch.tensor([position], device=DEVICE)
    found = sample(row, positions, table, kernels).cpu()
    for tensor in ("numbers", "settings", "counts", "bias"):
        value = getattr(table, tensor)
        setattr(table, tensor, None if value is None else value.cpu())
    drawn = sample(row.cpu(), positions.cpu(), table, kernels, implementation="torch")
    assert torch.equal(found, drawn), "kernel and twin"
    return int(drawn)


# ---- the distribution ----


@pytest.mark.parametrize("options", THRESHOLDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_distribution_is_that_of_transformers(options, dtype):
    logits, past = (3 * torch.randn(4, 200)).to(dtype).float(), torch.randint(200, (4, 30))
    table, _ = table_of([Sampler(**options)] * 4, 200, prompts=list(past))
    expected = processors(options)(past, logits).softmax(-1)
    found = weights(logits.to(DEVICE), table).cpu().double()
    found = found / found.sum(-1, keepdim=True)
    if dtype == torch.float32:
        assert torch.equal(found > 0, expected > 0)
    assert torch.allclose(found.float(), expected, atol=1e-9 if dtype == torch.float32 else 1e-2, rtol=1e-5)


@pytest.mark.parametrize("options", [o for o in OPTIONS if o.get("top_k") != 5000])
def test_draws_follow_the_distribution_of_transformers(options):
    logits, past = 2 * torch.randn(1, 60), torch.randint(60, (1, 20))
    expected = processors(options)(past, logits).softmax(-1)[0]
    drawn = draws_of(options, logits, 20_000, prompt=past[0])
    assert g_test(drawn, expected) > 1e-4
    wrong = expected.clone()  # control: without a token that is drawn some ten times
    wrong[torch.where(wrong > 5e-4, wrong, 2.0).argmin()] = 0
    assert g_test(drawn, wrong / wrong.sum()) < 1e-4


@pytest.mark.parametrize("top_p", [0.5, 0.9])
def test_one_token_more_or_less_would_show(top_p):
    """Control of the test above: a tail that is one token too long or too short."""
    logits = 2 * torch.randn(1, 60)
    kept = int((processors({"top_p": top_p})(None, logits).softmax(-1) > 0).sum())
    drawn = draws_of({"temperature": 1.0, "top_p": top_p}, logits, 20_000)
    for k in (kept - 1, kept, kept + 1):
        p = g_test(drawn, processors({"top_k": k})(None, logits).softmax(-1)[0])
        assert (p > 1e-4) == (k == kept)


def test_penalties_and_biases():
    options = {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.25, "logit_bias": {3: 2.0}}
    table, _ = table_of([Sampler(**options)], 6, prompts=[torch.tensor([0, 1])])
    for token in (1, 1, 2):
        table.note(torch.tensor([token], device=DEVICE), torch.tensor([True], device=DEVICE))
    logits = torch.tensor([[1.0, -1.0, 2.0, 0.5, -3.0, 0.0]], device=DEVICE)
    expected = [1 / 1.3, -1.3 - 0.5 - 2 * 0.25, 2 / 1.3 - 0.5 - 0.25, 2.5, -3.0, 0.0]
    assert torch.allclose(processed(logits, table)[0].cpu(), torch.tensor(expected))
    banned = {"temperature": 1.0, "logit_bias": {2: -math.inf, 4: -100.0}}
    drawn = draws_of(banned, torch.zeros(1, 6), 2000)
    assert set(drawn.tolist()) == {0, 1, 3, 5}
    assert draws_of({"temperature": 1.0, "logit_bias": {4: 100.0}}, torch.zeros(1, 6), 50).unique().tolist() == [4]


def test_penalties_count_what_was_generated_and_a_bias_forces_a_token():
    engine = Engine(build("llama"), window=40)
    written = engine.generate([3, 4, 5], max_new_tokens=60, frequency_penalty=1e4).tokens
    assert len(set(written)) == 60, "each token is so much less likely once it was written"
    engine.reset()
    assert len(set(engine.generate([3, 4, 5], max_new_tokens=60).tokens)) < 60
    assert engine.generate([6], max_new_tokens=5, logit_bias={9: 1e6}).tokens == [9] * 5


def test_penalised_greedy_takes_the_likeliest_of_what_is_left():
    logits = torch.tensor([[1.0, 3.0, 2.9, -1.0]])
    options = {"repetition_penalty": 1.5}
    assert draws_of(options, logits, 3, prompt=torch.tensor([1])).tolist() == [2, 2, 2]
    assert draws_of(options, logits, 3, prompt=torch.tensor([3])).tolist() == [1, 1, 1], "control"


@pytest.mark.parametrize("more", [{}, {"top_k": 3}])
@pytest.mark.parametrize("temperature", [1e-6, 1e-9, 1e-12, 1e-30, 5e-324])
def test_a_temperature_near_0_takes_the_likeliest_token(temperature, more):
    logits = torch.tensor([[-3.0, 5.0, 4.9, 7.999, 8.0, 0.0]])
    assert draws_of({"temperature": temperature, **more}, logits, 50).unique().tolist() == [4]
    assert len(draws_of({"temperature": 1.0, **more}, logits, 50).unique()) > 1, "control"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("options", OPTIONS)
def test_nothing_is_drawn_from_logits_that_are_not_numbers(options, bad):
    logits = torch.randn(3, 50, device=DEVICE)
    logits[1, 7] = bad
    table, kernels = table_of([Sampler(**options)] * 3, 50)
    positions = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    drawn = sample(logits, positions, table, kernels)
    assert drawn[1] == -1 and min(drawn[0], drawn[2]) >= 0
    logits[1] = -math.inf
    assert sample(logits, positions, table, kernels)[1] == -1, "nothing is left"
    logits[1, 7] = 0.0
    assert sample(logits, positions, table, kernels)[1] == 7, "minus infinity is a number to a sampler"


# ---- seeds ----


def test_a_seed_repeats_whatever_the_neighbours_do():
    logits, options = 3 * torch.randn(1, 500, device=DEVICE), {"temperature": 1.1}
    others = [Sampler(**o) for o in OPTIONS]
    positions = torch.arange(40, device=DEVICE)

    def drawn(seed: int, neighbours: list[Sampler], place: int) -> list[int]:
        samplers = [*neighbours[:place], Sampler(**options), *neighbours[place:]]
        seeds = [*range(100, 100 + place), seed, *range(200, 200 + len(neighbours) - place)]
        table, kernels = table_of(samplers, 500, seeds=seeds)
        rows = [torch.randn(1, 500, device=DEVICE) for _ in neighbours]
        rows.insert(place, logits)
        return [
            int(sample(torch.cat(rows), p.expand(len(rows)).contiguous(), table, kernels)[place]) for p in positions
        ]

    alone = drawn(7, [], 0)
    assert drawn(7, [], 0) == drawn(7, others, 3) == drawn(7, others[:2], 2) == alone
    assert drawn(8, [], 0) != alone and len(set(alone)) > 5, "control"


@pytest.mark.parametrize("backend", ["ring", "kernels"])
def test_streams_of_an_engine_draw_as_they_would_alone(backend):
    model = build("llama")
    options = {"temperature": 0.9, "top_p": 0.95, "frequency_penalty": 0.3, "max_new_tokens": 60, "stop_tokens": ()}

    def engine(streams: int) -> Engine:
        return Engine(model, backend=backend, streams=streams, **small_policy("lazy"))

    prompts = [token_ids(n, seed=n) for n in (3, 30, 11)]
    together = engine(3).generate_batch(prompts, seed=5, **options)
    for i, prompt in enumerate(prompts):
        assert engine(1).generate(prompt, seed=5 + i, **options).tokens == together[i].tokens
    parts = engine(1)
    first = parts.generate(prompts[0], seed=5, **options | {"max_new_tokens": 25, "frequency_penalty": 0.0})
    rest = parts.generate([], seed=5, **options | {"max_new_tokens": 35, "frequency_penalty": 0.0})
    whole = engine(1).generate(prompts[0], seed=5, **options | {"frequency_penalty": 0.0})
    assert first.tokens + rest.tokens == whole.tokens
    assert len({tuple(g.tokens) for g in together}) == 3, "control"


def test_greedy_follows_sampling():
    e = Engine(build("llama"), **small_policy("lazy"))
    prompt = token_ids(20)
    expected = e.generate(prompt, max_new_tokens=20).tokens
    e.reset()
    e.generate(prompt, max_new_tokens=20, temperature=1.5, repetition_penalty=2.0)
    e.reset()
    assert e.generate(prompt, max_new_tokens=20).tokens == expected


@pytest.mark.parametrize("backend", ["ring", "kernels"])
def test_the_rehearsal_of_a_capture_changes_nothing(backend):
    """A capture comes between two tokens, with the options of the next one in place: it must not count a token."""
    options = {"temperature": 1.0, "presence_penalty": 50.0, "repetition_penalty": 1.2}
    e = Engine(build("llama"), backend=backend, **small_policy("lazy"))
    e.prefill(token_ids(15))
    state, step = e.state, e._step

    def held() -> list[torch.Tensor]:
        table = state.sampling.draws.table
        parts = [*state.stream_buffers(0).values(), table.numbers, table.settings, table.counts, table.bias]
        return [t.clone() for t in (*parts, state.cursor, state.tokens)]

    with state.sampling.using({0: StreamSampler(Sampler(**options), 3, torch.tensor([1, 2]))}):
        state.choose(None)
        before = held()
        with state.rehearsing(Block(0, 1)):
            state.block = Block(0, 1)
            step()
            step()
            assert not all(torch.equal(a, b) for a, b in zip(before, held())), "control: steps were done"
            assert torch.equal(state.sampling.draws.table.counts, before[-4])
        assert all(torch.equal(a, b) for a, b in zip(before, held()))
        with state.step([0]):
            step()
        assert int(state.sampling.draws.table.counts.count_nonzero()) in (2, 3)


# ---- mistakes ----


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"temperature": "warm"},
        {"temperature": 1.0, "top_k": 0},
        {"temperature": 1.0, "top_k": 2.5},
        {"temperature": 1.0, "top_k": True},
        {"temperature": 1.0, "top_p": 0.0},
        {"temperature": 1.0, "top_p": 1.01},
        {"temperature": 1.0, "min_p": 1.5},
        {"temperature": 1.0, "min_p": -0.1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.inf},
        {"presence_penalty": math.nan},
        {"frequency_penalty": "much"},
        {"logit_bias": [3]},
        {"logit_bias": {-1: 1.0}},
        {"logit_bias": {"a": 1.0}},
        {"logit_bias": {3: math.inf}},
        {"logit_bias": {3: None}},
        {"top_k": 5},
        {"temperature": 10**400},
        {"presence_penalty": 10**400},
        {"frequency_penalty": 1e39},  # infinity in float32: 0 times it is no number, and token 0 was drawn
        {"frequency_penalty": -1e39},
        {"repetition_penalty": 1e-50},
        {"repetition_penalty": 1e39},
        {"logit_bias": {3: 1e39}},
        {"logit_bias": {3: -(10**400)}},
    ],
)
def test_wrong_options_are_refused_by_name(options):
    with pytest.raises(ValueError, match=list(options)[-1]):
        Sampler(**options)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("largest", "wins"),
    [
        ({"frequency_penalty": 1e30}, False),
        ({"frequency_penalty": -1e30}, True),
        ({"presence_penalty": -1e30, "frequency_penalty": -1e30}, True),
        ({"logit_bias": {7: 1e30}, "repetition_penalty": 1e-6}, True),
        ({"logit_bias": {7: torch.finfo(torch.float32).min}, "repetition_penalty": 1e6}, False),
    ],
)
def test_the_largest_options_leave_numbers_to_draw_from(largest, wins, temperature):
    e = Engine(build("llama"), **small_policy("lazy"))
    first = {"logit_bias": {7: 60.0}} if "logit_bias" not in largest else {}
    tokens = e.generate([7, 7], max_new_tokens=12, stop_tokens=(), temperature=temperature, **first | largest).tokens
    assert tokens.count(7) == (12 if wins else int(bool(first))), tokens
    assert wins or len(set(tokens)) > 3, tokens


def test_more_likeliest_tokens_than_there_are_keep_all():
    e, written = Engine(build("llama"), **small_policy("lazy")), []
    for top_k in (97, 10**30):
        e.reset()
        written.append(e.generate([1], max_new_tokens=9, stop_tokens=(), temperature=1.0, top_k=top_k).tokens)
    assert written[0] == written[1]


def test_a_bias_of_no_token_and_a_wrong_seed_are_refused_before_anything_is_fed():
    e = Engine(build("llama"), **small_policy("lazy"))
    with pytest.raises(ValueError, match=r"logit_bias=.*accepted: token ids from 0 to"):
        e.generate([1], max_new_tokens=3, logit_bias={100_000: 1.0})
    every = dict.fromkeys(range(e.model.config.vocab_size), -math.inf)
    for greedy in (True, False):
        with pytest.raises(ValueError, match=r"logit_bias forbids each of the 97 tokens"):
            e.generate([1], max_new_tokens=3, temperature=0.0 if greedy else 1.0, logit_bias=every)
    with pytest.raises(ValueError, match="seed='x'"):
        e.generate([1], max_new_tokens=3, temperature=1.0, seed="x")
    assert e.stats()["seen"] == 0
    assert e.generate([1], max_new_tokens=3, logit_bias=every | {7: 0.0}).tokens == [7] * 3, "control"


# ---- on a GPU ----


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS)
def test_drawing_never_waits_for_the_device(options):
    table, kernels = table_of([Sampler(**options)] * 2, 5000)
    logits, positions = torch.randn(2, 5000, device="cuda"), torch.zeros(2, dtype=torch.int64, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        drawn = sample(logits, positions, table, kernels)
        with pytest.raises(RuntimeError, match="synchroniz"):
            drawn.tolist()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert drawn.shape == (2,)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["graph", "kernels", "fused"])
@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
def test_a_graph_draws_what_the_twin_draws_from_its_logits(family, backend):
    """Every stream has options of its own; the twin draws on the CPU from the logits that the step found.

    The first draw of a kind comes after a capture, and that of the second round does not.
    """
    chosen = [*OPTIONS, {"repetition_penalty": 1.5}, {}, {"temperature": 1.0, "presence_penalty": 50.0, "top_k": 20}]
    e = Engine(build(family, torch.float16).cuda(), backend=backend, streams=len(chosen), **small_policy("lazy"))
    seen: list[int] = []
    tokens, logits = {}, {}
    for round_ in range(2):
        for s, options in enumerate(chosen):
            e.reset(stream=s)
            prompt = token_ids(9 + s, seed=s)
            e.prefill(prompt, stream=s)
            logits[round_, s] = e.state.logits[s].clone()
            twin = twin_draw(options, logits[round_, s], e.stats(stream=s)["seen"], prompt=[])
            seen.clear()
            watch = (lambda token, stream: seen.append(token)) if round_ else None
            more = {"max_new_tokens": 40, "stop_tokens": (), "seed": 3, "callback": watch}
            tokens[round_, s] = e.generate([], stream=s, **more, **options).tokens
            assert tokens[round_, s][0] == twin, f"round {round_}, stream {s}: the first draw"
            assert not round_ or seen == tokens[round_, s]
    for s in range(len(chosen)):
        assert torch.equal(logits[0, s], logits[1, s]), f"stream {s}: logits of the prompt"
        assert tokens[0, s] == tokens[1, s], f"stream {s}: a seed repeats, looked at or not"
    for s, options in enumerate(chosen):
        last = twin_draw(options, e.state.logits[s], e.stats(stream=s)["seen"], prompt=[])
        assert e.generate([], max_new_tokens=1, stream=s, stop_tokens=(), seed=3, **options).tokens == [last]
