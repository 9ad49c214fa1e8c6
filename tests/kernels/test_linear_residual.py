"""`linear_residual` against float64: one input or two, strided views, aliasing; kernels, library and twin alike.

One stream goes through one kernel, up to 16 through another, more through the library.
"""

import pytest
import torch
from ops_cases import DEVICE, EARLY, HALF, IMPLEMENTATIONS, TOLERANCE, draw, error

from sinkstream.kernels import LinearConfig, linear_residual


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("early", EARLY)
@pytest.mark.parametrize("streams", [1, 3, 17])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("hidden", "n", "m"), [(64, 64, 0), (37, 80, 200), (96, 200, 520), (5, 8, 64)])
def test_against_float64(hidden, n, m, dtype, streams, early, implementation):
    a, wide = draw(streams, n, dtype=dtype), draw(streams, 16 + m, dtype=dtype)
    f = wide[:, 16:] if m else None
    weight, bias = draw(hidden, n + m, scale=(n + m) ** -0.5, dtype=dtype), draw(hidden, scale=0.2, dtype=dtype)
    residual = draw(streams, hidden, dtype=dtype)
    out = torch.full_like(residual, float("nan"))
    config = LinearConfig(rows=2, columns=64, **early)
    linear_residual(a, weight, f=f, bias=bias, residual=residual, out=out, config=config, implementation=implementation)
    joined = torch.cat([a, f], 1) if m else a
    product = joined.double() @ weight.double().T
    assert error(out, product + bias.double() + residual.double()) < TOLERANCE[dtype]
    assert error(out, product + bias.double()) > 5 * TOLERANCE[dtype], "the control, no residual, is not told apart"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("streams", "tolerance"), [(1, 1e-5), (2, 1e-5), (17, TOLERANCE[torch.float16])])
def test_in_place_with_a_float32_residual(streams, tolerance, implementation):
    a, weight = draw(streams, 64, dtype=torch.float16), draw(40, 64, dtype=torch.float16)
    residual = draw(streams, 40)
    expected = a.double() @ weight.double().T + residual.double()
    config = LinearConfig(columns=64, hold=True)
    returned = linear_residual(a, weight, residual=residual, out=residual, config=config, implementation=implementation)
    assert returned is residual and error(residual, expected) < tolerance


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("streams", [1, 3])
def test_plain_product(streams, implementation):
    a, weight = draw(streams, 128, dtype=torch.bfloat16), draw(17, 128, dtype=torch.bfloat16)
    out = linear_residual(a, weight, config=LinearConfig(rows=4, columns=64), implementation=implementation)
    assert out.dtype == torch.bfloat16 and error(out, a.double() @ weight.double().T) < TOLERANCE[torch.bfloat16]


def test_mistakes_are_named():
    a, weight = torch.zeros(2, 64, device=DEVICE), torch.zeros(40, 96, device=DEVICE)
    with pytest.raises(ValueError, match="weight has shape"):
        linear_residual(a, weight)
    with pytest.raises(ValueError, match="f has shape"):
        linear_residual(a, weight, f=torch.zeros(3, 32, device=DEVICE))
    with pytest.raises(ValueError, match="residual has shape"):
        linear_residual(a, weight, f=torch.zeros(2, 32, device=DEVICE), residual=torch.zeros(2, 41, device=DEVICE))
