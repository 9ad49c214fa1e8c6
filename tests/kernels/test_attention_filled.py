"""Attention whose pipelines are filled before the wait, against float64: shares of tiles, frames, widths of heads."""

import copy
from dataclasses import replace

import pytest
import torch
from ops_cases import DEVICE, HALF, NEEDS_TRITON, TOLERANCE, error, on_implementations
from ring_case import Case

from sinkstream.kernels import AttentionConfig, plans
from sinkstream.kernels.config import AttentionLinearConfig, LinearConfig, chunk_widths, filled_bytes, fit_filled
from sinkstream.kernels.observed import Observed
from sinkstream.kernels.plans import OpLaunch, Sizes

NEOX = dict(query_heads=2, kv_heads=2, order="per-head")
LLAMA = dict(query_heads=6, kv_heads=2, order="blocks")
FILL = dict(tile=16, stages=3, dot=True, fill=True)
RINGS = [  # pinned_slots, ring, pinned, first, length
    (4, 70, 4, 61, 30),  # wraps
    (20, 24, 20, 3, 7),  # more tiles of pinned slots than of the ring
    (4, 33, 0, 0, 1),  # nothing but the new token
    (40, 9, 33, 8, 9),
    (0, 17, 0, 5, 17),
]


def ring(values):
    return dict(zip(("pinned_slots", "ring", "pinned", "first", "length"), values))


@pytest.mark.parametrize(("values", "implementation"), on_implementations(RINGS, quick=3))
@pytest.mark.parametrize("heads", [NEOX, LLAMA])
@pytest.mark.parametrize("splits", [1, 3])
def test_rings(values, heads, splits, implementation):
    case = Case(torch.float16, **heads, head_dim=80, rotary=20, **ring(values))
    expected, key = case.expected()
    assert error(case.run(implementation, splits=splits, **FILL), expected) < TOLERANCE[torch.float16]
    assert error(case.keys[:, :, case.slot], key) < TOLERANCE[torch.float16]
    assert torch.equal(case.values[:, :, case.slot].double(), case.parts()[2])


@pytest.mark.parametrize(
    ("sizes", "implementation"), on_implementations([(112, 16), (64, 64), (96, 96), (256, 64)], quick=2)
)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("norms", [False, True])
def test_head_sizes(sizes, dtype, norms, implementation):
    """Also those of which the second chunk is wider than what is left."""
    head_dim, rotary = sizes
    case = Case(dtype, **LLAMA, head_dim=head_dim, rotary=rotary, norms=norms, **ring((4, 30, 4, 11, 30)))
    expected, key = case.expected()
    assert error(case.run(implementation, splits=2, **FILL), expected) < TOLERANCE[dtype]
    assert error(case.keys[:, :, case.slot], key) < TOLERANCE[dtype]


@NEEDS_TRITON
@pytest.mark.parametrize("splits", [1, 2])
def test_groups_whose_rows_of_window_and_frame_need_a_taller_tile(splits):
    heads = dict(query_heads=12, kv_heads=1, order="blocks")
    case = Case(torch.float16, **heads, head_dim=64, rotary=32, streams=1, **ring((4, 40, 4, 7, 40)))
    expected, _ = case.expected()
    assert error(case.run("triton", splits=splits, **FILL), expected) < TOLERANCE[torch.float16]


@NEEDS_TRITON
@pytest.mark.parametrize("splits", [1, 4])
def test_the_frames_matter(splits):
    """The control: with one frame for everything, as if nothing had been evicted, the result is another one."""
    case = Case(torch.float16, **NEOX, head_dim=64, rotary=64, **ring((4, 20, 4, 3, 20)))
    expected, _ = case.expected()
    case.rope[:, 1] = case.rope[:, 0]
    assert error(case.run("triton", splits=splits, **FILL), expected) > 5 * TOLERANCE[torch.float16]


@NEEDS_TRITON
def test_a_token_that_is_itself_a_sink():
    case = Case(torch.float16, **NEOX, head_dim=64, rotary=16, **ring((4, 20, 3, 0, 0)), sink_slot=2)
    expected, key = case.expected()
    assert error(case.run("triton", splits=2, **FILL), expected) < TOLERANCE[torch.float16]
    assert error(case.keys[:, :, 2], key) < TOLERANCE[torch.float16]


@NEEDS_TRITON
def test_streams_that_see_more_or_less_share_a_grid():
    """One is full, one has just begun, one sits the step out; alone and together they give the same bits."""
    case = Case(torch.float16, **LLAMA, head_dim=64, rotary=16, **ring((20, 40, 4, 30, 36)), streams=3)
    case.scalars[1] = torch.tensor([2, 2, 2, 3, 0, 0, 0, 0])
    case.scalars[2] = torch.tensor([0, 0, 0, 1, 0, 0, 0, 0])
    case.keys.nan_to_num_(0.5), case.values.nan_to_num_(0.5)
    case.rope[1:, 1] = case.rope[1:, 0]  # a sink is written where it is attended to
    case.options["most_visible"] = 40
    full, before = case.expected()[0][0], (case.keys.clone(), case.values.clone())
    together = case.run("triton", splits=3, **FILL)
    assert error(together[0], full) < TOLERANCE[torch.float16] and together.isfinite().all()
    twin = copy.copy(case)
    twin.keys, twin.values = (part.clone() for part in before)
    assert error(together, twin.run("torch", splits=3, **FILL).double()) < TOLERANCE[torch.float16]
    for stream in range(3):
        alone = copy.copy(case)
        alone.keys, alone.values = (part[stream : stream + 1].clone() for part in before)
        for name in ("qkv", "scalars", "rope"):
            setattr(alone, name, getattr(case, name)[stream : stream + 1])
        assert torch.equal(alone.run("triton", splits=3, **FILL)[0], together[stream])


@NEEDS_TRITON
def test_the_last_slots_of_longer_heads():
    """Bit for bit what contiguous slots give; slots before them, NaN here, are not read."""
    case = Case(torch.float16, **LLAMA, head_dim=64, rotary=16, **ring((4, 33, 4, 20, 33)))
    longer = [torch.cat([torch.full_like(part[:, :, :24], float("nan")), part], 2) for part in (case.keys, case.values)]
    expected = case.run("triton", splits=2, **FILL)
    case.keys, case.values = (part[:, :, 24:] for part in longer)
    assert torch.equal(case.run("triton", splits=2, **FILL), expected)


@NEEDS_TRITON
def test_where_attention_is_observed_it_is_not_filled():
    case = Case(torch.float16, **NEOX, head_dim=64, rotary=16, streams=1, **ring((4, 20, 4, 3, 20)))
    slots = case.keys.shape[2]
    expected, (weights, _) = case.expected()[0], case.weights()
    observed = Observed(None, torch.zeros(1, 2, slots, device=DEVICE), torch.zeros(1, 2, device=DEVICE))
    assert error(case.run("triton", observed, splits=2, **FILL), expected) < TOLERANCE[torch.float16]
    kept = (observed.scores - observed.sums[..., None]).exp2()[..., [s for s, _ in case.seen]]
    assert error(kept, weights[..., [s for s, _ in case.seen]]) < 1e-2


def test_chunks_cover_a_head():
    assert [chunk_widths(d) for d in (64, 80, 96, 112, 256)] == [(64, 0), (64, 32), (64, 32), (64, 64), (256, 0)]


def test_what_fits():
    config = AttentionConfig(4, 64, 4, 5, dot=True, fill=True)
    assert fit_filled(config, 64, 228 * 1024) == config
    small = fit_filled(config, 256, 99 * 1024)
    assert filled_bytes(small, 256) <= 99 * 1024 < filled_bytes(config, 256) and small.stages >= 2
    assert fit_filled(small, 256, 99 * 1024) == small, "what fits is left as it is"


@pytest.mark.parametrize(("streams", "splits"), [(5, 6), (8, 4), (12, 2), (32, 1), (64, 1)])
def test_a_plan_for_another_number_of_streams_stays_one_wave(streams, splits, monkeypatch):
    filled = OpLaunch(AttentionConfig(4, 64, 4, 4, dot=True, fill=True), pdl=True)
    sizes = Sizes(2048, 8192, 32, 8, 64, 2048, 4, 228 * 1024, 132)
    monkeypatch.setitem(plans.SEVERAL_LLAMA_PLANS, 2048, {8: {"attention": filled}})
    assert plans.several_plan(False, sizes, streams)["attention"].config == replace(filled.config, splits=splits)
    monkeypatch.setitem(plans.SEVERAL_LLAMA_PLANS, 2048, {8: {"attention": OpLaunch(AttentionConfig(4, dot=True))}})
    assert plans.several_plan(False, sizes, streams)["attention"].config.splits == 4, "control: other attention"


def test_what_is_refused():
    for wrong in ({"stages": 0}, {"dot": False}):
        with pytest.raises(ValueError, match=r"fill=True with stages=.*accepted: at least 2"):
            AttentionConfig(**(FILL | wrong))
    with pytest.raises(ValueError, match="carveout, registers or fill for attention in a kernel with a linear layer"):
        AttentionLinearConfig(AttentionConfig(**FILL), LinearConfig(warps=2))
