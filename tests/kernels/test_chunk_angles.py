"""Cosines and sines of a chunk's positions, against float64."""

import math

import pytest
import torch
from ops_cases import DEVICE, IMPLEMENTATIONS

from sinkstream.kernels.chunk_angles import angles_from, angles_of

FREQUENCIES = [1.0, 0.3, 0.011]  # three: no power of two


def expected(positions: list[int], sign: int = 1, factor: float = 1.0) -> torch.Tensor:
    rows = [[[f(sign * p * w) * factor for w in FREQUENCIES] for f in (math.cos, math.sin)] for p in positions]
    return torch.tensor(rows, dtype=torch.float64)


def inv_freq() -> torch.Tensor:
    return torch.tensor(FREQUENCIES, dtype=torch.float64, device=DEVICE)


def worst(found: torch.Tensor, wanted: torch.Tensor) -> float:
    assert found.dtype == torch.float32 and found.shape == wanted.shape
    return (found.cpu().double() - wanted).abs().max().item()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_angles_of_positions_anywhere_are_those_of_float64(implementation):
    table = torch.randint(-900_000, 900_000, (37, 7), dtype=torch.int32, device=DEVICE)
    positions = table[1:, 6]
    for back, sign in ((False, 1), (True, -1)):
        found = angles_of(positions, inv_freq(), back=back, implementation=implementation)
        assert worst(found, expected(positions.tolist(), sign)) < 1e-7
        assert worst(found, expected(positions.tolist(), -sign)) > 0.5, "control: the other way"


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_angles_of_positions_in_a_row_are_those_of_float64(implementation):
    first, less = torch.tensor([[700_003], [41]], dtype=torch.int32, device=DEVICE)
    how = {"implementation": implementation}
    found = angles_from(first, 21, inv_freq(), factor=1.25, **how)
    assert worst(found, expected(range(700_003, 700_024), factor=1.25)) < 3e-7
    found = angles_from(first, 5, inv_freq(), less=less, back=True, **how)
    assert worst(found, expected(range(699_962, 699_967), -1)) < 1e-7
    assert worst(found, expected(range(700_003, 700_008), -1)) > 0.1, "control: not earlier"
    assert angles_from(first, 0, inv_freq(), **how).shape == (0, 2, 3)


def test_mistakes_are_named():
    positions = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match=r"accepted: one axis, torch\.int32"):
        angles_of(positions.long(), inv_freq())
    with pytest.raises(ValueError, match="inv_freq has dtype"):
        angles_of(positions, inv_freq().float())
    with pytest.raises(ValueError, match="3 first positions; accepted: 1"):
        angles_from(positions, 4, inv_freq())
