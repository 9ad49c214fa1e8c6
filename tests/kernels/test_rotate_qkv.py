"""`rotate_qkv` against a float64 rotation: both orders, partial rotary, query and key norms, rows that are strided."""

import pytest
import torch
from ops_cases import DEVICE, HALF, IMPLEMENTATIONS, TOLERANCE, draw, error
from ring_case import rotate

from sinkstream.kernels.rotate_qkv import rotate_qkv

SHAPES = [(2, 2, 80, 20, "per-head"), (6, 2, 64, 64, "blocks"), (4, 1, 24, 24, "blocks"), (3, 3, 96, 48, "blocks")]


def table(positions, inv_freq):
    """Cosines and sines as the op takes them."""
    angle = positions.double()[:, None] * inv_freq
    return torch.stack([angle.cos(), angle.sin()], 1).float()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("norms", [False, True])
def test_against_float64(shape, dtype, norms, implementation):
    query_heads, kv_heads, dim, rotary, order = shape
    inv_freq = 1e4 ** (-torch.arange(rotary // 2, device=DEVICE).double() / (rotary // 2))
    wide = draw(37, (query_heads + 2 * kv_heads) * dim + 16, dtype=dtype)
    qkv, before = wide[:, : wide.shape[1] - 16], wide.clone()
    weights = {n: 1 + draw(dim, scale=0.2, dtype=dtype) for n in ("q_norm", "k_norm")} if norms else {}
    positions = torch.arange(60, 97, device=DEVICE)
    parts = rotate_qkv(
        qkv, table(positions, inv_freq), query_heads=query_heads, kv_heads=kv_heads, order=order, **weights,
        implementation=implementation,
    )  # fmt: skip
    rows = before[:, : qkv.shape[1]].double()
    if order == "per-head":
        q, k, v = rows.view(37, query_heads, 3, dim).unbind(2)
    else:
        q, k, v = rows.view(37, -1, dim).split((query_heads, kv_heads, kv_heads), 1)
    if norms:
        q, k = (
            torch.nn.functional.rms_norm(x, (dim,), weights[n].double(), 1e-6)
            for x, n in ((q, "q_norm"), (k, "k_norm"))
        )
    for found, exact in zip(parts[:2], (q, k)):
        expected = torch.stack([rotate(x, p, inv_freq) for x, p in zip(exact, positions.tolist())])
        assert error(found, expected) < TOLERANCE[dtype]
        assert error(found, exact) > 0.1, "control: not rotated"
    assert torch.equal(parts[2].double(), v)
    assert torch.equal(wide[:, qkv.shape[1] :], before[:, qkv.shape[1] :]), "nothing past the row is touched"


def test_mistakes_are_named():
    qkv, rotation = torch.zeros(3, 10 * 16), torch.zeros(3, 2, 8)
    heads = dict(query_heads=6, kv_heads=2)
    for arguments, change, says in [
        ((qkv, rotation), {"order": "x"}, "order='x'"),
        ((qkv, torch.zeros(3, 2, 9)), {"order": "blocks"}, "rotation has 9 angles"),
        ((qkv[:2], rotation), {"order": "blocks"}, "rotation has shape"),
        ((qkv, rotation), {"order": "blocks", "q_norm": torch.ones(16)}, "both or neither"),
    ]:
        with pytest.raises(ValueError, match=says):
            rotate_qkv(*arguments, **heads, **change)
