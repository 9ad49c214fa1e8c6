"""`begin_step`: the next row of the plan, the right embedding rows, and angles that stay exact far out."""

import math

import pytest
import torch
from ops_cases import BACKENDS, DEVICE, draw

from sinkstream.engine.ops import begin_step

NEAR, FAR = [9, 7, 5, 1, 2, 3, 0, 4], [8, 31000, 2051, 4, 3, 2, 0, -1]


def plan_of(*rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("half", [5, 32])
def test_rows_and_angles(half, backend):
    embedding = draw(11, 72, dtype=torch.float16)
    tokens, cursor = torch.tensor([3, 10], device=DEVICE), torch.tensor([0, 0], device=DEVICE)
    plan = plan_of([FAR, NEAR], [NEAR, FAR])
    inv_freq = 1e4 ** (-torch.arange(half, device=DEVICE).double() / half)
    scalars, hidden, rope = begin_step(tokens, plan, cursor, embedding, inv_freq, factor=1.5, backend=backend)
    assert cursor.tolist() == [1, 1]
    assert scalars.tolist() == [[*NEAR[:6], 3, NEAR[7]], [*FAR[:6], 10, FAR[7]]]
    assert torch.equal(hidden, embedding[[3, 10]])
    for stream, frame, position in [(0, 0, 7), (0, 1, 5), (1, 0, 31000), (1, 1, 2051)]:
        for pair in range(half):
            angle = position * float(inv_freq[pair])
            assert math.isclose(rope[stream, frame, 0, pair], 1.5 * math.cos(angle), abs_tol=1e-6)
            assert math.isclose(rope[stream, frame, 1, pair], 1.5 * math.sin(angle), abs_tol=1e-6)
    assert math.isclose(rope[1, 0, 0, 0], 1.5 * math.cos(31000), abs_tol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_cursor_goes_round(backend):
    rows = [[[i] * 8] for i in range(3)]
    cursor = torch.tensor([-1], device=DEVICE)
    arguments = (
        torch.tensor([2], device=DEVICE),
        plan_of(*rows),
        cursor,
        draw(4, 8),
        torch.ones(4, device=DEVICE).double(),
    )
    seen = [begin_step(*arguments, backend=backend)[0][0].tolist() for _ in range(5)]
    assert [row[0] for row in seen] == [0, 1, 2, 0, 1] and all(row[6] == 2 for row in seen)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"inv_freq": torch.ones(4)}, "inv_freq has dtype"),
        ({"plan": torch.zeros(5, 2, 8, dtype=torch.int32)}, "plan has shape"),
        ({"cursor": torch.zeros(1, dtype=torch.int32)}, "cursor has dtype"),
    ],
)
def test_mistakes_are_named(change, says):
    arguments = {
        "tokens": torch.zeros(1, dtype=torch.int64),
        "plan": torch.zeros(5, 1, 8, dtype=torch.int32),
        "cursor": torch.zeros(1, dtype=torch.int64),
        "embedding": torch.zeros(3, 8),
        "inv_freq": torch.ones(4, dtype=torch.float64),
    }
    with pytest.raises(ValueError, match=says):
        begin_step(**arguments | change)
