"""`store_window`: every token that stays is in its slot, and nothing else is touched."""

import numpy as np
import pytest
import torch
from ops_cases import DEVICE, IMPLEMENTATIONS, draw

from sinkstream.kernels.attention_prefill import Band
from sinkstream.kernels.store_window import store_window


def band(tokens: int, stays: int, slot: int) -> Band:
    return Band(np.zeros(tokens), None, torch.ones(4, device=DEVICE).double(), past=9, length=0, stays=stays, slot=slot)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("tokens", "stays", "slot"), [(50, 27, 19), (50, 30, 0), (3, 0, 22), (7, 7, 3), (23, 0, 5)])
def test_what_stays_is_in_its_slot(tokens, stays, slot, implementation):
    ring, heads, dim = 23, 2, 24
    both = draw(tokens, heads, 3, dim, dtype=torch.float16)
    keys, values = (draw(heads, ring + 4, dim, dtype=torch.float16) for _ in range(2))
    expected = [keys.clone(), values.clone()]
    for token in range(stays, tokens):
        for target, part in zip(expected, (1, 2)):
            target[:, 4 + (slot + token) % ring] = both[token, :, part]
    store_window(
        both[:, :, 1], both[:, :, 2], keys[:, 4:], values[:, 4:], band(tokens, stays, slot),
        implementation=implementation,
    )  # fmt: skip
    assert torch.equal(keys, expected[0]) and torch.equal(values, expected[1])


def test_mistakes_are_named():
    key, keys = torch.zeros(9, 2, 8), torch.zeros(2, 5, 8)
    with pytest.raises(ValueError, match="9 tokens stay; accepted: at most 5"):
        store_window(key, key, keys, keys, band(9, 0, 0))
    with pytest.raises(ValueError, match="key has shape"):
        store_window(key, key, keys, keys, band(8, 4, 0))
