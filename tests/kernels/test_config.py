"""Which configuration a call gets that brings none: the measured one, cut down to what fits; a given one is used."""

from dataclasses import fields, replace

import pytest
import torch
from ops_cases import DEVICE, NEEDS_TRITON, TOLERANCE, draw, error

from sinkstream.kernels import LinearConfig, linear_residual
from sinkstream.kernels.config import (
    MAX_SPLITS,
    OWN_BYTES,
    RESIDUAL,
    AttentionConfig,
    MultiStreamConfig,
    PersistentConfig,
    PersistentNeoxConfig,
    PrefillConfig,
    count_programs,
    default_attention,
    default_linear_residual,
    default_norm_linear,
    fit_shared_memory,
    multi_stream_bytes,
    program_bytes,
    tile_bytes,
)
from sinkstream.kernels.plans import (
    LLAMA_OPS,
    LLAMA_PLANS,
    NEOX_OPS,
    NEOX_PLANS,
    SEVERAL_LLAMA_PLANS,
    SEVERAL_NEOX_PLANS,
    Sizes,
    measured_plan,
    several_plan,
)

H100_BYTES = 228 * 1024


def sizes(hidden, heads, kv_heads, head_dim, intermediate, ring=2048, pinned=4, shared=H100_BYTES):
    return Sizes(hidden, intermediate, heads, kv_heads, head_dim, ring, pinned, shared, 132)


def test_the_measured_shapes_get_what_was_measured():
    pythia = measured_plan(True, sizes(2560, 32, 32, 80, 10240))
    joined = NEOX_PLANS[2560]["attention_up"].config
    joined = replace(joined, attention=replace(joined.attention, splits=7))
    expected = {op: p.config for op, p in NEOX_PLANS[2560].items()} | {"attention_up": joined}
    assert {op: plan.config for op, plan in pythia.items()} == expected
    for hidden, head_dim, intermediate in [(2048, 64, 8192), (4096, 128, 14336)]:
        llama = measured_plan(False, sizes(hidden, 32, 8, head_dim, intermediate))
        assert {op: plan.config for op, plan in llama.items()} == {
            op: p.config for op, p in LLAMA_PLANS[hidden].items()
        }
        assert all(plan.pdl for plan in (*pythia.values(), *llama.values()))


def test_other_shapes_get_the_nearest_plan_cut_to_fit():
    assert measured_plan(False, sizes(576, 9, 3, 64, 1536))["o"].config == LLAMA_PLANS[2048]["o"].config
    big = measured_plan(True, sizes(4096, 32, 32, 128, 16384))
    wide = measured_plan(True, sizes(2048, 8, 8, 256, 8192))["attention_up"].config
    assert wide.attention.tile < NEOX_PLANS[2048]["attention_up"].config.attention.tile
    small = measured_plan(True, sizes(1024, 16, 16, 64, 4096))
    assert small["attention_up"].config.attention.splits > big["attention_up"].config.attention.splits, (
        "more of its bytes are cached"
    )
    assert big["out"].config.per_sm * program_bytes(big["out"].config, 4096, 16384) <= H100_BYTES
    ungrouped = measured_plan(False, sizes(2048, 16, 16, 64, 5632, ring=16, pinned=512))["attention"].config
    assert sum(count_programs(ungrouped.splits, 16, 512)[1:]) <= MAX_SPLITS


@pytest.mark.parametrize(("neox", "plans"), [(True, SEVERAL_NEOX_PLANS), (False, SEVERAL_LLAMA_PLANS)])
def test_several_streams_get_what_was_measured_for_the_nearest_number(neox, plans):
    shape = (2560, 32, 32, 80, 10240) if neox else (2048, 32, 8, 64, 8192)
    ops = {*(NEOX_OPS if neox else LLAMA_OPS), "head"}
    for streams, nearest in [(2, 2), (3, 2), (4, 8), (8, 8), (16, 8)]:
        plan = several_plan(neox, sizes(*shape), streams)
        assert plan.keys() == ops
        if streams <= 8:
            assert plan == plans[shape[0]][nearest]
        for op, planned in plan.items():
            if isinstance(planned.config, MultiStreamConfig) and not planned.config.held:
                bytes_each = multi_stream_bytes(planned.config, op == "gate_up", streams)
                assert planned.config.per_sm * bytes_each <= H100_BYTES
    other = several_plan(neox, sizes(4096, 32, 32 if neox else 8, 128, 16384), 8)
    assert other["head"].config is None and other.keys() == ops, "another shape: the ops choose"


def test_attention_and_the_up_projection_share_one_wave_of_programs():
    """Splits of Pythia-2.8B that were fastest, or within 1 % of that, of those timed at each cap."""
    fastest = {512: 3, 1024: 4, 1536: 6, 2052: 7, 3072: 8, 4096: 9, 8192: 11, 12288: 12, 16384: 13, 32768: 14}
    for cap, splits in fastest.items():
        joined = measured_plan(True, sizes(2560, 32, 32, 80, 10240, ring=cap - 4))["attention_up"].config
        assert joined.attention.splits == splits
        assert 32 * (splits + 1) < 132 * joined.linear.per_sm, "no room for the rows"
    others = {9: (2048, 16, 16, 128, 8192), 3: (4096, 32, 32, 128, 16384), 13: (1024, 16, 16, 64, 4096)}
    for splits, shape in others.items():
        assert measured_plan(True, sizes(*shape))["attention_up"].config.attention.splits == splits, "not as measured"
    few = replace(sizes(2560, 32, 32, 80, 10240), multiprocessors=4)
    crowded = measured_plan(True, few)["attention_up"].config
    assert crowded.attention.splits == 1


@pytest.mark.parametrize("widths", [(64,), (2560,), (8192, 8192), (2560, 10240), (28672,), (53248,)])
@pytest.mark.parametrize("shared_bytes", [99 * 1024, H100_BYTES])
@pytest.mark.parametrize("config", [LinearConfig(), RESIDUAL, LinearConfig(rows=16, stages=8)])
def test_defaults_fit(config, widths, shared_bytes):
    fitted = fit_shared_memory(config, shared_bytes, *widths)
    assert fitted.per_sm >= 1 and fitted.per_sm * program_bytes(fitted, *widths) <= shared_bytes
    one = config.stages * tile_bytes(config, *widths) + OWN_BYTES
    if max(one, config.per_sm * program_bytes(config, *widths)) <= shared_bytes:
        assert fitted == config, "a configuration that fits was changed"


def test_long_inputs_get_more_threads():
    assert default_linear_residual(5120, 20480, H100_BYTES).warps > RESIDUAL.warps
    assert default_norm_linear(8192, True, H100_BYTES).rows < default_norm_linear(2560, False, H100_BYTES).rows
    assert default_attention(1, 128, 2048, 4).warps > default_attention(1, 80, 2048, 4).warps
    assert default_attention(4, 128, 2048, 4).dot and default_attention(1, 256, 2048, 4).dot


def test_without_fitting_it_would_not():
    assert program_bytes(LinearConfig(rows=16, stages=8), 8192) > H100_BYTES


def test_a_first_tile_is_kept_in_one_place():
    with pytest.raises(ValueError, match="hold and fill"):
        LinearConfig(hold=True, fill=True)


TWO, TILE, WARPS = "a power of two, at least 1", "a power of two, at least 16", "a power of two, 1 to 32"
PROGRAMS, STAGES = "a whole number, 1 to 32", "a whole number, at least 1"
SHARED = {"warps": (64, WARPS), "per_sm": (0, PROGRAMS), "stages": (0, STAGES)}
#: Class -> field -> (a value that is refused, what is accepted).
REFUSED = {
    LinearConfig: SHARED
    | {"rows": (3, TWO), "columns": (4, "a power of two, at least 8"), "ahead": (-1, "a whole number, at least 0")},
    AttentionConfig: {
        **{"splits": (65, "a whole number, 1 to 64"), "tile": (8, TILE), "columns": (24, TILE), "warps": (3, WARPS)},
        **{"stages": (1, "0, or a whole number, at least 2"), "carveout": (200, "a whole number, 0 to 100")},
        "registers": (-3, "0, or a whole number, 16 to 255"),
    },
    MultiStreamConfig: SHARED
    | {"rows": (8, TILE), "columns": (8, TILE), "parts": (3, TWO), "ahead": (8, "a multiple of 16, at least 0")},
    PrefillConfig: {
        **{"rows": (24, TILE), "columns": (8, TILE), "warps": (0, WARPS), "stages": (0, STAGES), "splits": (3, TWO)}
    },
    PersistentConfig: {"warps": (6, WARPS), "per_sm": (33, PROGRAMS), "slots": (4, "a power of two, at least 8")},
    PersistentNeoxConfig: {
        **{"warps": (6, WARPS), "per_sm": (33, PROGRAMS), "rows": (3, TWO), "out_rows": (0, TWO), "slots": (8, TILE)},
        **{"lead": (5, "a whole number, 0 to 4"), "early": (-1, "a whole number, 0 to 2")},
    },
}


@pytest.mark.parametrize("kind", REFUSED)
def test_every_number_of_a_configuration_is_checked(kind):
    assert {field.name for field in fields(kind) if field.type is int} == REFUSED[kind].keys()
    for name, (value, accepted) in REFUSED[kind].items():
        for wrong in (value, 2.0, "4", None, True):
            with pytest.raises(ValueError, match=rf"^{name}={wrong!r} in the configuration; accepted: {accepted}$"):
                kind(**{name: wrong})
        assert replace(kind(), **{name: getattr(kind(), name)}) == kind(), "control"
    for name in (field.name for field in fields(kind) if field.type is bool):
        with pytest.raises(ValueError, match=f"^{name}=1 in the configuration; accepted: True or False$"):
            kind(**{name: 1})


def test_a_change_of_a_configuration_is_checked_too():
    with pytest.raises(ValueError, match="carveout=101"):
        replace(AttentionConfig(carveout=100, registers=255), carveout=101)
    with pytest.raises(ValueError, match="64 columns in 8 parts; accepted: at least 16 in each"):
        MultiStreamConfig(columns=64, parts=8)


@pytest.mark.parametrize(("ring", "pinned"), [(2048, 4), (16, 480), (9, 40), (1, 0), (30000, 4)])
def test_attention_defaults_can_be_combined(ring, pinned):
    for group, head_dim in [(1, 64), (1, 256), (4, 128)]:
        splits = default_attention(group, head_dim, ring, pinned).splits
        per, of_ring, of_pinned = count_programs(splits, ring, pinned)
        assert of_ring + of_pinned <= MAX_SPLITS
        assert per * of_ring >= ring and per * of_pinned >= pinned


def test_many_pinned_slots_take_fewer_splits():
    assert sum(count_programs(16, 16, 512)[1:]) > MAX_SPLITS, "the case is no case"
    assert default_attention(1, 64, 16, 512).splits < 16


@NEEDS_TRITON
@pytest.mark.parametrize(
    "config",
    [None, LinearConfig(1, 1024, 4, 2, 1), LinearConfig(1, 2048, 8, 4, 1), LinearConfig(2, 4096, 8, 1, 2)],
)
def test_the_width_of_pythia(config):
    """Rows of 2,560 + 10,240 values end within a chunk of every one of these widths; four are enough for the sum."""
    a, f = draw(1, 2560, dtype=torch.float16), draw(1, 10240, dtype=torch.float16)
    weight = draw(4, 12800, scale=12800**-0.5, dtype=torch.float16)
    out = torch.full((1, 4), float("nan"), dtype=torch.float16, device=DEVICE)
    linear_residual(a, weight, f=f, out=out, config=config, implementation="triton")
    assert error(out, torch.cat([a, f], 1).double() @ weight.double().T) < TOLERANCE[torch.float16]
