"""`linear_residual` against float64: one input or two, strided views, aliasing; kernel and twin alike."""

import pytest
import torch
from ops_cases import BACKENDS, DEVICE, HALF, TOLERANCE, draw, error

from sinkstream.engine.ops import LinearConfig, linear_residual


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("hidden", "n", "m"), [(64, 64, 0), (37, 80, 200), (96, 200, 520), (5, 8, 64)])
def test_against_float64(hidden, n, m, dtype, backend):
    a, wide = draw(2, n, dtype=dtype), draw(2, 16 + m, dtype=dtype)
    f = wide[:, 16:] if m else None
    weight, bias = draw(hidden, n + m, scale=(n + m) ** -0.5, dtype=dtype), draw(hidden, scale=0.2, dtype=dtype)
    residual = draw(2, hidden, dtype=dtype)
    out = torch.full_like(residual, float("nan"))
    linear_residual(
        a, weight, f=f, bias=bias, residual=residual, out=out, config=LinearConfig(rows=2, columns=64), backend=backend
    )
    joined = torch.cat([a, f], 1) if m else a
    product = joined.double() @ weight.double().T
    assert error(out, product + bias.double() + residual.double()) < TOLERANCE[dtype]
    assert error(out, product + bias.double()) > 5 * TOLERANCE[dtype], "the control, no residual, is not told apart"


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_place_with_a_float32_residual(backend):
    a, weight, residual = draw(1, 64, dtype=torch.float16), draw(40, 64, dtype=torch.float16), draw(1, 40)
    expected = a.double() @ weight.double().T + residual.double()
    returned = linear_residual(
        a, weight, residual=residual, out=residual, config=LinearConfig(columns=64), backend=backend
    )
    assert returned is residual and error(residual, expected) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_plain_product(backend):
    a, weight = draw(3, 128, dtype=torch.bfloat16), draw(17, 128, dtype=torch.bfloat16)
    out = linear_residual(a, weight, config=LinearConfig(rows=4, columns=64), backend=backend)
    assert out.dtype == torch.bfloat16 and error(out, a.double() @ weight.double().T) < TOLERANCE[torch.bfloat16]


def test_mistakes_are_named():
    a, weight = torch.zeros(2, 64, device=DEVICE), torch.zeros(40, 96, device=DEVICE)
    with pytest.raises(ValueError, match="weight has shape"):
        linear_residual(a, weight)
    with pytest.raises(ValueError, match="f has shape"):
        linear_residual(a, weight, f=torch.zeros(3, 32, device=DEVICE))
    with pytest.raises(ValueError, match="residual has shape"):
        linear_residual(a, weight, f=torch.zeros(2, 32, device=DEVICE), residual=torch.zeros(2, 41, device=DEVICE))
