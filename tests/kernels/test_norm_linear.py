"""`norm_linear` against float64: both norms, activations, awkward shapes; kernels, library, twin alike.

One stream goes through one kernel, up to 16 through others, more through the library.
"""

import pytest
import torch
from ops_cases import DEVICE, EARLY, HALF, IMPLEMENTATIONS, TOLERANCE, draw, error
from torch.nn import functional as F

from sinkstream.kernels import LinearConfig, norm_linear

SHAPES = [(64, 96), (80, 40), (200, 37), (520, 65)]  # (hidden, rows)
STREAMS = [1, 3, 17]


def reference(x, weight, gamma, beta, bias, eps, norm, activation):
    """The op in float64, with torch's own norms."""
    x, weight, gamma, beta, bias = (None if t is None else t.double() for t in (x, weight, gamma, beta, bias))
    shape = gamma.shape
    normed = F.layer_norm(x, shape, gamma, beta, eps) if norm == "layer" else F.rms_norm(x, shape, gamma, eps)
    y = F.linear(normed, weight, bias)
    if activation == "swiglu":
        gate, up = y.chunk(2, 1)
        return F.silu(gate) * up
    return F.gelu(y) if activation == "gelu" else y


def case(hidden, rows, dtype, with_bias, streams=1):
    x = draw(streams, hidden, dtype=dtype) + 0.5
    weight = draw(rows, hidden, scale=hidden**-0.5, dtype=dtype)
    gamma, beta = 1 + draw(hidden, scale=0.1, dtype=dtype), draw(hidden, scale=0.1, dtype=dtype)
    return x, weight, gamma, beta, draw(rows, scale=0.2, dtype=dtype) if with_bias else None


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("early", EARLY)
@pytest.mark.parametrize("streams", STREAMS)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("hidden", "rows"), SHAPES)
def test_layer_norm_and_gelu(hidden, rows, dtype, streams, early, implementation):
    x, weight, gamma, beta, bias = case(hidden, rows, dtype, True, streams)
    out = torch.full((streams, rows), float("nan"), dtype=dtype, device=DEVICE)
    norm_linear(
        x, weight, norm_weight=gamma, norm_bias=beta, bias=bias, activation="gelu", out=out,
        config=LinearConfig(rows=4, columns=64, **early), implementation=implementation,
    )  # fmt: skip
    assert error(out, reference(x, weight, gamma, beta, bias, 1e-5, "layer", "gelu")) < TOLERANCE[dtype]
    other = reference(x, weight, gamma, -beta, bias, 1e-5, "layer", "gelu")
    assert error(out, other) > 5 * TOLERANCE[dtype], "the control, another norm, is not told apart"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("early", EARLY)
@pytest.mark.parametrize("streams", STREAMS)
@pytest.mark.parametrize("activation", ["none", "swiglu"])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("hidden", "rows"), [(64, 96), (200, 38)])
def test_rms_norm(hidden, rows, with_bias, activation, streams, early, implementation):
    x, weight, gamma, _, bias = case(hidden, rows, torch.bfloat16, with_bias, streams)
    out = norm_linear(
        x, weight, norm_weight=gamma, bias=bias, eps=1e-6, norm="rms", activation=activation,
        config=LinearConfig(rows=2, columns=64, **early), implementation=implementation,
    )  # fmt: skip
    expected = reference(x, weight, gamma, None, bias, 1e-6, "rms", activation)
    assert out.shape == (streams, rows // 2 if activation == "swiglu" else rows)
    assert error(out, expected) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("streams", STREAMS)
def test_float32_hidden_state_and_strided_rows(streams, implementation):
    x, wide, gamma, beta, bias = case(64, 40, torch.float16, True, streams)
    padded = torch.zeros(40, 128, dtype=torch.float16, device=DEVICE)
    padded[:, :64] = wide
    out = torch.empty(streams, 40, device=DEVICE)
    norm_linear(
        x.float(), padded[:, :64], norm_weight=gamma, norm_bias=beta, bias=bias, out=out,
        config=LinearConfig(rows=4, columns=64), implementation=implementation,
    )  # fmt: skip
    assert error(out, reference(x.float(), wide, gamma, beta, bias, 1e-5, "layer", "none")) < 1e-3


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rms_norm_with_an_offset(implementation):
    x, weight, gamma, beta, bias = case(80, 40, torch.float16, True)
    out = norm_linear(
        x, weight, norm_weight=gamma, norm_bias=beta, bias=bias, norm="rms", implementation=implementation
    )
    x, weight, gamma, beta, bias = (t.double() for t in (x, weight, gamma, beta, bias))
    expected = F.linear(F.rms_norm(x, gamma.shape, gamma, 1e-5) + beta, weight, bias)
    assert error(out, expected) < TOLERANCE[torch.float16]


def test_float32_weights_run_the_twin():
    x, weight, gamma, beta, bias = case(80, 40, torch.float32, True)
    out = norm_linear(x, weight, norm_weight=gamma, norm_bias=beta, bias=bias, implementation="torch")
    assert error(out, reference(x, weight, gamma, beta, bias, 1e-5, "layer", "none")) < 1e-5


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"norm": "batch"}, "norm='batch'"),
        ({"activation": "tanh"}, "activation='tanh'"),
        ({"activation": "swiglu", "out": torch.zeros(2, 40)}, "out has shape"),
        ({"bias": torch.zeros(3)}, "bias has shape"),
        ({"norm_weight": torch.zeros(1, 64)}, "norm_weight has shape"),
        ({"out": torch.zeros(2, 39)}, "out has shape"),
        ({"implementation": "cuda"}, "implementation='cuda'"),
    ],
)
def test_mistakes_are_named(change, says):
    arguments = {"norm_weight": torch.ones(64)} | change
    with pytest.raises(ValueError, match=says):
        norm_linear(torch.zeros(2, 64), torch.zeros(40, 64), **arguments)
