"""`add_norm` against float64: both norms, one and two of them, with and without a first addend."""

import pytest
import torch
from ops_cases import HALF, IMPLEMENTATIONS, TOLERANCE, draw, error
from torch.nn import functional as F

from sinkstream.kernels.add_norm import add_norm


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("streams", [1, 3])
@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("layer", [True, False])
@pytest.mark.parametrize("hidden", [64, 520])
def test_against_float64(hidden, layer, dtype, streams, implementation):
    x, delta = draw(streams, hidden, dtype=dtype) + 0.5, draw(streams, hidden, dtype=dtype)
    weights = [1 + draw(hidden, scale=0.1, dtype=dtype) for _ in range(2)]
    biases = [draw(hidden, scale=0.1, dtype=dtype) if layer else None for _ in range(2)]
    norms = list(zip(weights, biases))
    total, *found = add_norm(x, delta, *norms, eps=1e-5, implementation=implementation)
    assert error(total, x.double() + delta.double()) < TOLERANCE[dtype]

    def reference(weight, bias):
        wide = total.double()
        if layer:
            return F.layer_norm(wide, weight.shape, weight.double(), bias.double(), 1e-5)
        return F.rms_norm(wide, weight.shape, weight.double(), 1e-5)

    for got, norm in zip(found, norms):
        assert error(got, reference(*norm)) < TOLERANCE[dtype]
    assert error(found[0], reference(*norms[1])) > 5 * TOLERANCE[dtype], "control: the other norm is told apart"
    alone, one, again = add_norm(total, None, norms[0], eps=1e-5, implementation=implementation)
    assert torch.equal(alone, total) and torch.equal(one, found[0]) and again is one


def test_mistakes_are_named():
    x, w = torch.zeros(2, 8), torch.ones(8)
    with pytest.raises(ValueError, match="delta has shape"):
        add_norm(x, torch.zeros(2, 4), (w, None), eps=1e-5)
    with pytest.raises(ValueError, match="two LayerNorms, or two RMSNorms"):
        add_norm(x, None, (w, w), (w, None), eps=1e-5)
    with pytest.raises(ValueError, match="norm weight has shape"):
        add_norm(x, None, (torch.ones(7), None), eps=1e-5)
