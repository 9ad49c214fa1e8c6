"""`begin_step`: the next row of the plan, the right embedding rows, and angles that stay exact far out."""

import math

import pytest
import torch
from ops_cases import DEVICE, IMPLEMENTATIONS, NEEDS_TRITON, draw

from sinkstream.kernels import begin_step
from sinkstream.kernels.layout import TOKEN
from sinkstream.kernels.likeliest import Tiles

NEAR, FAR = [9, 7, 5, 1, 2, 3, 0, 4], [8, 31000, 2051, 4, 3, 2, 0, -1]


def plan_of(*rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("half", [5, 32])
def test_rows_and_angles(half, implementation):
    embedding = draw(11, 72, dtype=torch.float16)
    tokens, cursor = torch.tensor([3, 10], device=DEVICE), torch.tensor([0, 0], device=DEVICE)
    plan = plan_of([FAR, NEAR], [NEAR, FAR])
    inv_freq = 1e4 ** (-torch.arange(half, device=DEVICE).double() / half)
    given = tokens, draw(2, 11), plan, cursor, embedding, inv_freq
    scalars, hidden, rope = begin_step(*given, factor=1.5, implementation=implementation)
    assert cursor.tolist() == [1, 1]
    assert scalars.tolist() == [[*NEAR[:6], 3, NEAR[7]], [*FAR[:6], 10, FAR[7]]]
    assert torch.equal(hidden, embedding[[3, 10]])
    for stream, frame, position in [(0, 0, 7), (0, 1, 5), (1, 0, 31000), (1, 1, 2051)]:
        for pair in range(half):
            angle = position * float(inv_freq[pair])
            assert math.isclose(rope[stream, frame, 0, pair], 1.5 * math.cos(angle), abs_tol=1e-6)
            assert math.isclose(rope[stream, frame, 1, pair], 1.5 * math.sin(angle), abs_tol=1e-6)
    assert math.isclose(rope[1, 0, 0, 0], 1.5 * math.cos(31000), abs_tol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_cursor_goes_round(implementation):
    rows = [[[i] * 8] for i in range(3)]
    cursor = torch.tensor([-1], device=DEVICE)
    arguments = (
        torch.tensor([2], device=DEVICE),
        draw(1, 4),
        plan_of(*rows),
        cursor,
        draw(4, 8),
        torch.ones(4, device=DEVICE).double(),
    )
    seen = [begin_step(*arguments, implementation=implementation)[0][0].tolist() for _ in range(5)]
    assert [row[0] for row in seen] == [0, 1, 2, 0, 1] and all(row[6] == 2 for row in seen)


def searched(vocab: int) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Token ids and logits of five streams, and what each appends."""
    logits = draw(5, vocab)
    logits[0, [vocab - 1, vocab // 2]] = 50.0
    logits[1] = math.nan
    logits[2, vocab - 2] = math.nan
    logits[3] = -math.inf
    logits[4, vocab - 1] = 50.0
    return torch.tensor([-1, 3, -1, -1, -1], device=DEVICE), logits, [vocab // 2, 3, vocab - 2, 0, vocab - 1]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("vocab", [7, 2048, 5000])
def test_a_negative_token_is_the_likeliest_of_the_logits(vocab, implementation):
    tokens, logits, expected = searched(vocab)
    plan, cursor = torch.randint(9, (3, 5, 8), dtype=torch.int32).to(DEVICE), torch.zeros(5, dtype=torch.int64)
    embedding, tiles = draw(vocab, 8), Tiles(5, vocab, DEVICE)
    before = plan.clone()
    given = plan, cursor.to(DEVICE), embedding, torch.ones(4, device=DEVICE).double()
    scalars, hidden, _ = begin_step(tokens, logits, *given, tiles=tiles, implementation=implementation)
    assert scalars[:, TOKEN].tolist() == expected
    assert torch.equal(hidden, embedding[expected])
    before[1, :, TOKEN] = scalars[:, TOKEN]
    assert torch.equal(plan, before), "the ids are written to the row of this step, and nothing else is"
    assert torch.equal(scalars, before[1])
    tokens, logits, expected = tokens.int(), logits.flip(0).contiguous(), [vocab - 1, 3, vocab - 2, 0, vocab // 2]
    again, hidden, _ = begin_step(tokens, logits, *given, tiles=tiles, implementation=implementation)
    assert again[:, TOKEN].tolist() == plan[2, :, TOKEN].tolist() == expected, "nothing is left of the search before"


@NEEDS_TRITON
def test_only_streams_without_a_token_are_searched():
    tokens, logits, expected = searched(5000)
    tiles = Tiles(5, 5000, DEVICE)
    tiles.values.fill_(7.0)
    tiles.find(logits, tokens)
    assert (tiles.values[1] == 7.0).all() and (tiles.values[[0, 2, 3, 4]] != 7.0).all()
    assert tiles.indices[0, 1] == expected[0]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"inv_freq": torch.ones(4)}, "inv_freq has dtype"),
        ({"plan": torch.zeros(5, 2, 8, dtype=torch.int32)}, "plan has shape"),
        ({"cursor": torch.zeros(1, dtype=torch.int32)}, "cursor has dtype"),
        ({"logits": torch.zeros(2, 3)}, "logits has shape"),
        ({"logits": torch.zeros(1, 3).half()}, "logits has dtype"),
    ],
)
def test_mistakes_are_named(change, says):
    arguments = {
        "tokens": torch.zeros(1, dtype=torch.int64),
        "logits": torch.zeros(1, 3),
        "plan": torch.zeros(5, 1, 8, dtype=torch.int32),
        "cursor": torch.zeros(1, dtype=torch.int64),
        "embedding": torch.zeros(3, 8),
        "inv_freq": torch.ones(4, dtype=torch.float64),
    }
    with pytest.raises(ValueError, match=says):
        begin_step(**arguments | change)
