"""`activation` against float64: gelu and SwiGLU, into strided rows."""

import pytest
import torch
import torch.nn.functional as F
from ops_cases import HALF, IMPLEMENTATIONS, TOLERANCE, draw, error

from sinkstream.kernels.activation import activation


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("width", [96, 2050])
def test_against_float64(width, dtype, implementation):
    x, out = draw(5, 2 * width, dtype=dtype), draw(5, width + 8, dtype=dtype)
    wide, gate, up = x.double(), x[:, :width].double(), x[:, width:].double()
    found = activation(x, "swiglu", out=out[:, 8:], implementation=implementation)
    assert found.data_ptr() == out[:, 8:].data_ptr()
    assert error(found, F.silu(gate) * up) < TOLERANCE[dtype]
    assert error(found, F.silu(up) * gate) > 0.1, "control: gate and up exchanged"
    assert error(activation(x, "gelu", implementation=implementation), F.gelu(wide)) < TOLERANCE[dtype]


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="activation 'relu' is unknown; accepted: gelu, swiglu"):
        activation(torch.zeros(2, 4), "relu")
    with pytest.raises(ValueError, match="x has 5 columns"):
        activation(torch.zeros(2, 5), "swiglu")
    with pytest.raises(ValueError, match="out has shape"):
        activation(torch.zeros(2, 4), "swiglu", out=torch.zeros(2, 4))
