"""What attention keeps of its queries and scores, and attention added up, against float64."""

import numpy as np
import pytest
import torch
from ops_cases import DEVICE, IMPLEMENTATIONS, TOLERANCE, draw, error, on_implementations
from ring_case import NAN, Case, rotate

from sinkstream.kernels import attention_linear
from sinkstream.kernels.band import SCALARS, Band
from sinkstream.kernels.config import AttentionConfig, AttentionLinearConfig, LinearConfig
from sinkstream.kernels.observed import Observed, accumulate
from sinkstream.kernels.observed_chunk import accumulate_chunk

NEOX = dict(query_heads=2, kv_heads=2, order="per-head", head_dim=80, rotary=20)
LLAMA = dict(query_heads=6, kv_heads=2, order="blocks", head_dim=64, rotary=64)
RING = dict(pinned_slots=20, ring=50, pinned=4, first=41, length=37)
WAYS = [
    ("neox", {"splits": 2, "tile": 16}),
    ("llama", {"splits": 3, "tile": 16, "columns": 32}),
    ("neox", {"splits": 1, "tile": 16, "stages": 2, "dot": True}),
    ("llama", {"splits": 1, "tile": 64}),
    ("neox", {"splits": 1, "tile": 16, "dot": False}),
]
KEPT = 5


def room(case: Case) -> Observed:
    """Room for everything that can be observed, filled with what must not stay."""
    (streams, _, slots, dim), heads = case.keys.shape, case.options["query_heads"]
    queries = torch.full((streams, heads, KEPT, dim), 9.0, dtype=case.keys.dtype, device=DEVICE)
    scores = torch.full((streams, heads, slots), NAN, device=DEVICE)
    return Observed(queries, scores, torch.full((streams, heads), NAN, device=DEVICE))


def check(case: Case, observed: Observed, place: int) -> None:
    """Compare what was observed with float64."""
    weights, queries = case.weights()
    assert error(torch.exp2(observed.scores.double() - observed.sums[..., None].double()), weights) < 2e-3
    assert torch.equal(observed.scores == -torch.inf, weights == 0)
    assert error(observed.queries[:, :, place], queries) < TOLERANCE[case.keys.dtype]
    others = [i for i in range(KEPT) if i != place]
    assert (observed.queries[:, :, others] == 9).all(), "another token's query was overwritten"


@pytest.mark.parametrize(("way", "implementation"), on_implementations(WAYS, quick=2))
def test_queries_and_scores_are_those_of_float64(way, implementation):
    family, config = way
    case = Case(torch.float16, **(NEOX if family == "neox" else LLAMA), **RING)
    case.scalars[:, 7], observed = 3, room(case)
    expected, _ = case.expected()
    assert error(case.run(implementation, observed, **config), expected) < TOLERANCE[torch.float16]
    check(case, observed, 3)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_beside_a_linear_layer(implementation):
    case = Case(torch.float16, **NEOX, **RING, streams=1)
    case.scalars[:, 7], observed, hidden = -1, room(case), 64
    weight, norm = draw(8, hidden, dtype=torch.float16), torch.ones(hidden, dtype=torch.float16, device=DEVICE)
    attention_linear(
        case.qkv, case.keys, case.values, case.scalars, case.rope, draw(1, hidden, dtype=torch.float16), weight,
        **case.options, norm_weight=norm, norm_bias=torch.zeros_like(norm), observed=observed,
        config=AttentionLinearConfig(AttentionConfig(splits=2, tile=16, warps=4), LinearConfig(2, 256, 4, 1, 1)),
        implementation=implementation,
    )  # fmt: skip
    check(case, observed, 0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("group", [1, 3])
def test_attention_is_added_up(group, implementation):
    layers, streams, kv_heads, slots = 2, 2, 2, 1100
    scores = draw(layers, streams, kv_heads * group, slots) * 3
    scores[..., ::7] = -torch.inf
    sums = scores.double().mul(torch.log(torch.tensor(2.0))).logsumexp(-1) / torch.log(torch.tensor(2.0)).item()
    totals = draw(layers, streams, kv_heads, slots).abs()
    scalars = torch.zeros(streams, 8, dtype=torch.int32, device=DEVICE)
    scalars[:, 0] = torch.tensor([3, 1050])
    expected = torch.exp2(scores.double() - sums[..., None]).unflatten(2, (kv_heads, group)).mean(3)
    kept = totals.double().clone()
    kept[:, 0, :, 3], kept[:, 1, :, 1050] = 0.0, 0.0
    before = totals.clone()
    accumulate(scores, sums.float(), scalars, totals, implementation=implementation)
    assert error(totals, kept + expected) < 1e-6
    assert error(before, kept + expected) > 1e-3, "control: what was there before is something else"


def test_mistakes_are_named():
    case = Case(torch.float16, **LLAMA, **RING)
    whole = room(case)
    for observed, says in [
        (Observed(scores=whole.scores), "accepted: both or neither"),
        (Observed(queries=whole.queries[:, :2]), "queries has shape"),
        (Observed(scores=whole.scores[..., :-1].contiguous(), sums=whole.sums), "scores has shape"),
    ]:
        with pytest.raises(ValueError, match=says):
            case.run("torch", observed)
    with pytest.raises(ValueError, match="totals of 4 kv heads"):
        totals = torch.zeros(1, 2, 4, whole.scores.shape[-1], device=DEVICE)
        accumulate(whole.scores[None], whole.sums[None], case.scalars, totals)


CHUNKS = [  # past, oldest window token, tokens, padding, used pinned slots; the third brings sinks of its own
    (50, 40, 9, 0, 5),
    (90, 75, 17, 15, 4),
    (2, 4, 16, 4, 4),
]


@pytest.mark.parametrize(("sizes", "implementation"), on_implementations(CHUNKS, quick=3))
@pytest.mark.parametrize("turns", [True, False])
def test_a_chunk_gives_what_its_queries_give_in_float64(sizes, turns, implementation):
    (past, oldest, tokens, padding, sinks), kv_heads, group, dim, pinned_slots, ring = sizes, 2, 3, 48, 5, 35
    inv_freq = 1e3 ** (-torch.arange(8, device=DEVICE).double() / 8)
    turn = [7 + t // 4 for t in range(tokens)]
    rows = tokens + padding
    band = Band(
        np.full(tokens, oldest - past), np.array(turn) if turns else None, inv_freq, past=past, sinks=sinks, row=1,
        start=(oldest - 4) % ring, length=max(0, past - oldest), slot=(past - 4) % ring,
        table=torch.zeros(SCALARS + 2 * rows, dtype=torch.int32, device=DEVICE),
    )  # fmt: skip
    band.rotate()
    keys = draw(3, kv_heads, pinned_slots + ring, dim, dtype=torch.float16)
    queries = draw(rows, 2 * kv_heads * group, dim, scale=2.0, dtype=torch.float16)[:, kv_heads * group :]
    queries[tokens:] = NAN
    totals = draw(3, kv_heads, pinned_slots + ring).abs()
    slot_of = {t: t if t < sinks else pinned_slots + (t - 4) % ring for t in range(oldest, past + tokens)}
    slot_of |= {t: t for t in range(sinks)}
    expected, whole = totals.double().clone(), torch.zeros(kv_heads, group, tokens, device=DEVICE)
    for t in range(past, past + tokens):
        expected[1, :, [slot_of[t], pinned_slots + (t - 4) % ring]] = 0.0  # a sink's place in the ring is empty
    for i in range(tokens):
        seen = sorted({*range(sinks), *range(oldest, past + i + 1)} & set(range(past + i + 1)))
        for head in range(kv_heads * group):
            own = queries[i, head].double()
            frame = rotate(own, -turn[i], inv_freq) if turns else own
            held = keys[1, head // group].double()
            scores = torch.stack([(frame if t < sinks else own) @ held[slot_of[t]] for t in seen])
            whole[head // group, head % group, i] = (scores * dim**-0.5).logsumexp(0) / np.log(2)
            weights = (scores * dim**-0.5).softmax(0)
            expected[1, head // group, [slot_of[t] for t in seen]] += weights / group
    how = {"pinned_slots": pinned_slots, "scaling": dim**-0.5, "implementation": implementation}
    before = totals.clone()
    accumulate_chunk(queries, keys, totals, band, **how)
    assert error(totals, expected) < 1e-3
    sums = torch.full((kv_heads, rows * group), torch.inf, device=DEVICE)
    sums.view(kv_heads, rows, group)[:, :tokens] = whole.transpose(1, 2)
    accumulate_chunk(queries, keys, before, band, **how, sums=sums)
    assert error(before, totals) < 1e-3, "the sums are known from attention"
