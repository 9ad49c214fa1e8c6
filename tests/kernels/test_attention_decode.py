"""`attention_decode` against float64, token by token from unrotated keys: two frames, wrapped rings, query groups."""

import copy

import pytest
import torch
from ops_cases import HALF, IMPLEMENTATIONS, NEEDS_TRITON, TOLERANCE, error, on_implementations
from ring_case import Case

from sinkstream.kernels import attention_decode

NEOX = dict(query_heads=2, kv_heads=2, order="per-head")
LLAMA = dict(query_heads=6, kv_heads=2, order="blocks")
RINGS = [  # pinned_slots, ring, pinned, first, length
    (20, 24, 4, 3, 7),
    (0, 17, 0, 5, 1),
    (4, 33, 4, 20, 33),
    (4, 33, 4, 0, 33),
    (4, 70, 4, 61, 30),
    (40, 9, 40, 8, 9),
]
HEADS = [(64, 16), (96, 96), (64, 64), (128, 32), (256, 64)]  # head_dim, rotary


def ring(values):
    return dict(zip(("pinned_slots", "ring", "pinned", "first", "length"), values))


@pytest.mark.parametrize(("values", "implementation"), on_implementations(RINGS, quick=3))
@pytest.mark.parametrize("family", ["neox", "neox-dot", "llama"])
def test_rings(values, family, implementation):
    heads = LLAMA if family == "llama" else NEOX
    case = Case(torch.float16, **heads, head_dim=80, rotary=20, **ring(values))
    expected, key = case.expected()
    out = case.run(implementation, splits=2, tile=16, dot=family != "neox")
    assert error(out, expected) < TOLERANCE[torch.float16]
    assert error(case.keys[:, :, case.slot], key) < TOLERANCE[torch.float16]
    assert torch.equal(case.values[:, :, case.slot].double(), case.parts()[2])


@pytest.mark.parametrize(("sizes", "implementation"), on_implementations(HEADS, quick=2))
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("norms", [False, True])
def test_head_sizes(sizes, dtype, norms, implementation):
    head_dim, rotary = sizes
    case = Case(dtype, **LLAMA, head_dim=head_dim, rotary=rotary, norms=norms, **ring((4, 30, 4, 11, 30)))
    expected, key = case.expected()
    out = case.run(implementation, splits=1, tile=16, columns=64)
    assert error(out, expected) < TOLERANCE[dtype]
    assert error(case.keys[:, :, case.slot], key) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("config", "implementation"),
    on_implementations([{"splits": 3, "tile": 16, "stages": 2}, {"splits": 1, "tile": 16}, {"splits": 20}], quick=1),
)
def test_every_way_to_cut_it(config, implementation):
    case = Case(torch.float16, **NEOX, head_dim=64, rotary=64, **ring((4, 150, 4, 77, 140)))
    expected, _ = case.expected()
    assert error(case.run(implementation, **config), expected) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_token_that_is_itself_a_sink(implementation):
    case = Case(torch.float16, **NEOX, head_dim=64, rotary=16, **ring((4, 20, 3, 0, 0)), sink_slot=2)
    expected, key = case.expected()
    assert error(case.run(implementation, splits=2, tile=16), expected) < TOLERANCE[torch.float16]
    assert error(case.keys[:, :, 2], key) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("heads", [NEOX, LLAMA])
def test_the_last_slots_of_longer_heads(heads, implementation):
    """What an engine with recall reads while nothing is recalled: bit for bit what contiguous slots give."""
    case = Case(torch.float16, **heads, head_dim=64, rotary=16, **ring((4, 33, 4, 20, 33)))
    longer = [torch.cat([torch.full_like(part[:, :, :24], float("nan")), part], 2) for part in (case.keys, case.values)]
    expected, key = case.run(implementation, splits=2, tile=16), case.keys[:, :, case.slot].clone()
    case.keys, case.values = (part[:, :, 24:] for part in longer)
    assert torch.equal(case.run(implementation, splits=2, tile=16), expected)
    assert torch.equal(case.keys[:, :, case.slot], key) and all(part[:, :, :24].isnan().all() for part in longer)
    with pytest.raises(ValueError, match="keys and values have strides"):
        attention_decode(
            case.qkv, case.keys, expected.new_zeros(case.keys.shape), case.scalars, case.rope, **case.options
        )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_frames_matter(implementation):
    """The control: with one frame for everything, as if nothing had been evicted, the result is another one."""
    case = Case(torch.float16, **NEOX, head_dim=64, rotary=64, **ring((4, 20, 4, 3, 20)))
    expected, _ = case.expected()
    case.rope[:, 1] = case.rope[:, 0]
    assert error(case.run(implementation, splits=2, tile=16), expected) > 5 * TOLERANCE[torch.float16]


def test_mistakes_are_named():
    case = Case(torch.float16, **LLAMA, head_dim=64, rotary=64, **ring((4, 20, 4, 3, 20)))
    arguments = case.qkv, case.keys, case.values, case.scalars, case.rope
    for change, says in [
        ({"order": "per-head"}, "order='per-head'"),
        ({"order": "x"}, "order='x'"),
        ({"query_heads": 5}, "query_heads=5"),
        ({"pinned_slots": 24}, "pinned_slots=24"),
        ({"q_norm": torch.ones(64)}, "accepted: both or neither"),
    ]:
        with pytest.raises(ValueError, match=says):
            attention_decode(*arguments, **(case.options | change))
    with pytest.raises(ValueError, match="scalars has dtype"):
        attention_decode(*arguments[:3], case.scalars.long(), case.rope, **case.options)


@NEEDS_TRITON
@pytest.mark.parametrize("heads", [NEOX, LLAMA])
def test_the_default_configuration(heads):
    case = Case(torch.float16, **heads, head_dim=80, rotary=20, streams=1, **ring((4, 30, 4, 7, 28)))
    expected, _ = case.expected()
    arguments = case.qkv, case.keys, case.values, case.scalars, case.rope
    assert (
        error(attention_decode(*arguments, **case.options, implementation="triton"), expected)
        < TOLERANCE[torch.float16]
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_many_queries_are_combined_in_turns(implementation):
    case = Case(torch.float16, query_heads=12, kv_heads=2, order="blocks", head_dim=128, rotary=32, streams=1,
                **ring((4, 128, 4, 7, 120)))  # fmt: skip
    expected, _ = case.expected()
    assert error(case.run(implementation, splits=16, tile=16, columns=64), expected) < TOLERANCE[torch.float16]


@NEEDS_TRITON
@pytest.mark.parametrize("values", [*RINGS[:1], RINGS[3], RINGS[4], (4, 33, 0, 0, 1)])
@pytest.mark.parametrize(("heads", "config"), [(NEOX, {"splits": 2}), (LLAMA, {"splits": 3, "stages": 2})])
def test_visible_slots_alone_are_divided(values, heads, config):
    case = Case(torch.float16, **heads, head_dim=64, rotary=16, **ring(values))
    case.options["most_visible"] = values[2] + values[4]
    expected, key = case.expected()
    assert error(case.run("triton", tile=16, **config), expected) < TOLERANCE[torch.float16]
    assert error(case.keys[:, :, case.slot], key) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_streams_that_see_more_or_less_share_a_grid(implementation):
    """One is full, one has just begun, one sits the step out; alone and together they give the same bits."""
    case = Case(torch.float16, **LLAMA, head_dim=64, rotary=16, **ring((20, 40, 4, 30, 36)), streams=3)
    case.scalars[1] = torch.tensor([2, 2, 2, 3, 0, 0, 0, 0])
    case.scalars[2] = torch.tensor([0, 0, 0, 1, 0, 0, 0, 0])
    case.keys.nan_to_num_(0.5), case.values.nan_to_num_(0.5)
    case.options["most_visible"] = 40
    full, before = case.expected()[0][0], (case.keys.clone(), case.values.clone())
    together = case.run(implementation, splits=2, tile=16)
    assert error(together[0], full) < TOLERANCE[torch.float16] and together.isfinite().all()
    rows = ("qkv", "scalars", "rope")
    for stream in range(3):
        alone = copy.copy(case)
        alone.keys, alone.values = (part[stream : stream + 1].clone() for part in before)
        for name in rows:
            setattr(alone, name, getattr(case, name)[stream : stream + 1])
        assert torch.equal(alone.run(implementation, splits=2, tile=16)[0], together[stream])


def test_too_few_visible_slots_are_noticed():
    case = Case(torch.float16, **LLAMA, head_dim=64, rotary=64, **ring((4, 20, 4, 3, 20)))
    case.options["most_visible"] = 25
    with pytest.raises(ValueError, match="most_visible=25; accepted: 1 to 24"):
        case.run("torch")
    case.options["most_visible"] = 23
    with pytest.raises(AssertionError, match="more than 23 slots"):
        case.run("torch")
