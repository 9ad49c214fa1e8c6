"""`store_window`: every token that stays is in its slot, and nothing else is touched."""

import numpy as np
import pytest
import torch
from ops_cases import DEVICE, IMPLEMENTATIONS, draw

from sinkstream.kernels.band import SCALARS, Band
from sinkstream.kernels.store_window import store_window


def band(tokens: int, stays: int, slot: int, past: int = 9, **more) -> Band:
    return Band(
        np.zeros(tokens),
        None,
        torch.ones(4, device=DEVICE).double(),
        past=past,
        length=0,
        stays=stays,
        slot=slot,
        **more,
    )


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("tokens", "stays", "slot", "past"),
    [
        (50, 27, 19, 9), (50, 30, 0, 4), (3, 0, 22, 9), (7, 7, 3, 9), (23, 0, 5, 9), (9, 4, 19, 0), (40, 20, 21, 2),
        (1, 1, 1, 1),
    ],
)  # fmt: skip
def test_what_stays_is_in_its_slot(tokens, stays, slot, past, padding, implementation):
    """The first of them are sinks where the stream begins with them."""
    ring, heads, dim, sinks, row = 23, 2, 24, 4, 1
    own = 3 if padding else sinks  # of this stream; the slots of the others stay as they are
    both = draw(tokens + padding, heads, 3, dim, dtype=torch.float16)
    keys, values = (draw(3, heads, ring + sinks, dim, dtype=torch.float16) for _ in range(2))
    expected = [keys.clone(), values.clone()]
    for token in range(tokens):
        for target, part in zip(expected, (1, 2)):
            if past + token < own:
                target[row, :, past + token] = both[token, :, part]
            elif token >= stays:
                target[row, :, sinks + (slot + token) % ring] = both[token, :, part]
    table = torch.zeros(SCALARS + 2 * (tokens + padding), dtype=torch.int32, device=DEVICE)
    store_window(
        both[:, :, 1], both[:, :, 2], keys, values, band(tokens, stays, slot, past, row=row, table=table, sinks=own),
        sinks=sinks, implementation=implementation,
    )  # fmt: skip
    assert torch.equal(keys, expected[0]) and torch.equal(values, expected[1])


def test_mistakes_are_named():
    key, keys = torch.zeros(9, 2, 8), torch.zeros(1, 2, 5, 8)
    with pytest.raises(ValueError, match="9 tokens stay; accepted: at most 5"):
        store_window(key, key, keys, keys, band(9, 0, 0))
    with pytest.raises(ValueError, match="key has shape"):
        store_window(key, key, keys, keys, band(8, 4, 0))
    with pytest.raises(ValueError, match="row=1; accepted: 0 to 0"):
        store_window(key, key, keys, keys, band(9, 4, 0, row=1))
