"""`attention_linear` against the two ops that it joins, and the two against float64 in their own tests."""

import pytest
import torch
from ops_cases import IMPLEMENTATIONS, TOLERANCE, draw, error
from ring_case import Case

from sinkstream.kernels import AttentionConfig, AttentionLinearConfig, LinearConfig, attention_linear

SMALL = AttentionLinearConfig(AttentionConfig(splits=2, tile=16, warps=4), LinearConfig(rows=4, columns=256, warps=4))
ODD_ROWS = AttentionLinearConfig(
    AttentionConfig(splits=3, tile=16, warps=4), LinearConfig(rows=8, columns=256, stages=1, hold=True)
)
FILLED = AttentionLinearConfig(SMALL.attention, LinearConfig(rows=2, columns=256, warps=4, fill=True))


def layer(head_dim=80, heads=2, hidden=160, rows=322, dtype=torch.float16, streams=1):
    """A case of attention and a linear layer in one kernel."""
    case = Case(
        dtype, query_heads=heads, kv_heads=heads, head_dim=head_dim, rotary=20, pinned_slots=4, ring=41, pinned=4,
        first=30, length=33, order="per-head", streams=streams,
    )  # fmt: skip
    linear = {
        "x": draw(streams, hidden, dtype=dtype),
        "weight": draw(rows, hidden, scale=hidden**-0.5, dtype=dtype),
        "norm_weight": 1 + draw(hidden, scale=0.1, dtype=dtype),
        "norm_bias": draw(hidden, scale=0.1, dtype=dtype),
        "bias": draw(rows, scale=0.1, dtype=dtype),
    }
    return case, linear


def call(case, linear, **how):
    return attention_linear(case.qkv, case.keys, case.values, case.scalars, case.rope, **case.options, **linear, **how)


def expected_rows(linear):
    """The linear layer in float64."""
    x, weight, gamma, beta, bias = (t.double() for t in linear.values())
    normed = torch.nn.functional.layer_norm(x, x.shape[1:], gamma, beta, 1e-5)
    return torch.nn.functional.gelu(normed @ weight.T + bias)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("config", [SMALL, ODD_ROWS, FILLED])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_both_results_agree_with_float64(implementation, config, dtype):
    torch.manual_seed(0)
    case, linear = layer(dtype=dtype)
    context, written = case.expected()
    for _ in range(2):  # twice: the counters must be left as they were found
        out, rows = call(case, linear, config=config, implementation=implementation)
        assert error(out, context) < TOLERANCE[dtype]
        assert error(rows, expected_rows(linear)) < TOLERANCE[dtype]
    assert error(case.keys[:, :, case.slot], written) < TOLERANCE[dtype]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_several_streams_take_the_two_ops(implementation):
    torch.manual_seed(1)
    case, linear = layer(streams=2)
    out, rows = call(case, linear, implementation=implementation)
    assert error(out, case.expected()[0]) < TOLERANCE[torch.float16]
    assert error(rows, expected_rows(linear)) < TOLERANCE[torch.float16]


def test_what_is_refused():
    case, linear = layer()
    with pytest.raises(ValueError, match="accepted: none, gelu"):
        call(case, linear, activation="swiglu")
    with pytest.raises(ValueError, match=r"2 warps for attention and 4 .* accepted: as many"):
        AttentionLinearConfig(AttentionConfig(warps=2), LinearConfig(warps=4))
    for own in ({"carveout": 45}, {"registers": 96}):
        with pytest.raises(ValueError, match="carveout, registers or fill for attention in a kernel with a linear"):
            AttentionLinearConfig(AttentionConfig(warps=4, **own), LinearConfig(warps=4))
