"""`begin_step`: the right embedding rows, and angles that stay exact far out."""

import math

import pytest
import torch
from ops_cases import BACKENDS, DEVICE, draw

from sinkstream.engine.ops import begin_step


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("half", [5, 32])
def test_rows_and_angles(half, backend):
    embedding = draw(11, 72, dtype=torch.float16)
    tokens = torch.tensor([3, 10], device=DEVICE)
    scalars = torch.tensor(
        [[9, 7, 5, 0, 0, 0, 0, 0], [9, 31000, 2051, 0, 0, 0, 0, 0]], dtype=torch.int32, device=DEVICE
    )
    inv_freq = 1e4 ** (-torch.arange(half, device=DEVICE).double() / half)
    hidden, rope = begin_step(tokens, scalars, embedding, inv_freq, factor=1.5, backend=backend)
    assert torch.equal(hidden, embedding[[3, 10]])
    for stream, frame, position in [(0, 0, 7), (0, 1, 5), (1, 0, 31000), (1, 1, 2051)]:
        for pair in range(half):
            angle = position * float(inv_freq[pair])
            assert math.isclose(rope[stream, frame, 0, pair], 1.5 * math.cos(angle), abs_tol=1e-6)
            assert math.isclose(rope[stream, frame, 1, pair], 1.5 * math.sin(angle), abs_tol=1e-6)
    assert math.isclose(rope[1, 0, 0, 0], 1.5 * math.cos(31000), abs_tol=1e-6)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="inv_freq has dtype"):
        begin_step(
            torch.zeros(1, dtype=torch.int64), torch.zeros(1, 8, dtype=torch.int32), torch.zeros(3, 8), torch.ones(4)
        )
