"""`norm_linear_pair` against float64: two norms of one input, two layers of one weight; kernels and twin alike."""

import pytest
import torch
from ops_cases import HALF, IMPLEMENTATIONS, TOLERANCE, draw, error
from torch.nn import functional as F

from sinkstream.kernels.config import MultiStreamConfig
from sinkstream.kernels.norm_linear_pair import norm_linear_pair

SMALL = MultiStreamConfig(columns=64, stages=3, per_sm=1, parts=2)


def norms_of(hidden: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(1 + draw(hidden, scale=0.2), draw(hidden, scale=0.3)) for _ in range(2)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("streams", "hidden", "rows"), [(2, 200, (48, 37)), (9, 72, (32, 70))])
def test_against_float64(streams, hidden, rows, dtype, implementation):
    x, weight = draw(streams, hidden) + 0.5, draw(sum(rows), hidden, scale=hidden**-0.5, dtype=dtype)
    bias, norms = draw(sum(rows), scale=0.2, dtype=dtype), norms_of(hidden)
    wide, other = (torch.full((streams + 1, n), 7.0, dtype=dtype, device=x.device) for n in rows)
    out, second = norm_linear_pair(
        x, weight, norms=tuple(norms), bias=bias, out=wide[:streams], second_out=other[:streams], config=SMALL,
        implementation=implementation,
    )  # fmt: skip
    normed = [F.layer_norm(x.double(), (hidden,), g.double(), b.double()) for g, b in norms]
    y, z = (n @ w.double().T + b.double() for n, w, b in zip(normed, weight.split(rows), bias.split(rows)))
    assert error(out, y) < TOLERANCE[dtype] and error(second, F.gelu(z)) < TOLERANCE[dtype]
    swapped = normed[1] @ weight[: rows[0]].double().T + bias[: rows[0]].double()
    assert error(out, swapped) > 0.1, "the control, the other layer's norm, is not told apart"
    assert error(second, z) > 0.1, "the control, no activation, is not told apart"
    assert (wide[streams] == 7.0).all() and (other[streams] == 7.0).all(), "a stream that is not there was written"


def test_mistakes_are_named():
    x, weight, norms = draw(3, 64), draw(96, 64, dtype=torch.float16), norms_of(64)
    room = {"out": draw(3, 40), "second_out": draw(3, 56)}
    with pytest.raises(ValueError, match="activation='swiglu' of a pair; accepted: none, gelu"):
        norm_linear_pair(x, weight, norms=tuple(norms), activation="swiglu", **room)
    with pytest.raises(ValueError, match="norms with one bias; accepted"):
        norm_linear_pair(x, weight, norms=(norms[0], (norms[1][0], None)), **room)
    with pytest.raises(ValueError, match="1 streams of a pair; accepted: 2 to 16"):
        norm_linear_pair(x[:1], weight, norms=tuple(norms), **room)
    with pytest.raises(ValueError, match="second_out has shape"):
        norm_linear_pair(x, weight, norms=tuple(norms), out=draw(3, 48), second_out=draw(3, 56))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])
def test_no_tile_has_rows_of_both_layers(implementation):
    x, weight = draw(3, 64), draw(96, 64, dtype=torch.float16)
    with pytest.raises(ValueError, match="rows=16 in the configuration; accepted: a divisor of the first layer's 40"):
        norm_linear_pair(
            x, weight, norms=tuple(norms_of(64)), out=draw(3, 40), second_out=draw(3, 56), config=SMALL,
            implementation=implementation,
        )  # fmt: skip
