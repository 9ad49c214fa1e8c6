"""`likeliest` against a search on the host: any width, equal logits, infinities, and what is not a number."""

import math

import pytest
import torch
from ops_cases import DEVICE, IMPLEMENTATIONS, draw

from sinkstream.kernels import likeliest


def first_largest(row: list[float]) -> int:
    """NaN counts as infinity; the first of equals."""
    return max(range(len(row)), key=lambda i: (math.inf if math.isnan(row[i]) else row[i], -i))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("vocab", [1, 7, 2048, 2049, 10_000])
def test_any_width(vocab, implementation):
    torch.manual_seed(vocab)
    logits = draw(3, vocab)
    assert likeliest(logits, implementation=implementation).tolist() == [first_largest(row) for row in logits.tolist()]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equal_logits_and_infinities(implementation):
    logits = draw(4, 5000)
    logits[0] = 0.0
    logits[1, [4999, 3000]] = 50.0
    logits[2] = -math.inf
    logits[3, 17] = math.inf
    assert likeliest(logits, implementation=implementation).tolist() == [0, 3000, 0, 17]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_is_not_a_number_is_not_passed_over(implementation):
    logits = draw(1, 4100)
    logits[0, 4090] = math.nan
    assert likeliest(logits, implementation=implementation).tolist() == [4090]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_may_be_strided(implementation):
    wide = draw(2, 4000)
    assert torch.equal(likeliest(wide[:, :3000], implementation=implementation), wide[:, :3000].argmax(-1).to(DEVICE))


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="logits has dtype"):
        likeliest(torch.zeros(1, 8, dtype=torch.float16))
    with pytest.raises(ValueError, match="logits has shape"):
        likeliest(torch.zeros(8))
