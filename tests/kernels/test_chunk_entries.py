"""Sources of the choice of pinned tokens, and the tokens that were chosen, one by one in float64."""

import numpy as np
import pytest
import torch
from ops_cases import DEVICE, TOLERANCE, draw, error, on_implementations
from ring_case import rotate

from sinkstream.kernels.band import SCALARS, Band
from sinkstream.kernels.chunk_entries import PinnedSlots, read_entries, take_sets

CASES = [  # kv_heads, dim, rotary, sinks, pinned, ring, start, length, tokens
    (2, 32, 32, 3, 5, 20, 14, 11, 9),
    (2, 80, 20, 4, 7, 9, 3, 9, 30),
    (1, 24, 12, 0, 1, 6, 5, 1, 1),
    (1, 16, 16, 2, 3, 0, 0, 0, 4),  # an empty window
]


@pytest.mark.parametrize("room", [0, 5], ids=["exact", "padded"])
@pytest.mark.parametrize(("sizes", "implementation"), on_implementations(CASES, quick=4))
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_entries_and_sets_are_those_of_float64(sizes, dtype, implementation, room):
    """Of one of several streams; padded, with room for a longer chunk, and only the first entries may be chosen."""
    kv_heads, dim, rotary, sinks, pinned, ring, start, length, tokens = sizes
    inv_freq = 1e3 ** (-torch.arange(rotary // 2, device=DEVICE).double() / (rotary // 2))
    entries, leaving, row = length + tokens, (length + tokens) // 2 if room else length + tokens, 1
    buffers = draw(2, 3, kv_heads, 3, sinks + pinned + ring, dim, dtype=dtype)[:, :, :, 1]  # heads are strided
    totals = draw(3, kv_heads, 2, sinks + pinned + ring)[:, :, 1]
    raw, qkv = draw(3, kv_heads, sinks + pinned, dim)[:, :, sinks:], draw(tokens + room, 3 * kv_heads, dim, dtype=dtype)
    key, value = qkv[:, kv_heads : 2 * kv_heads], qkv[:, 2 * kv_heads :]
    angle = torch.arange(50, 50 + entries + room, device=DEVICE).double()[:, None] * inv_freq
    angles = torch.stack([angle.cos(), -angle.sin()], 1).float()
    band = band_of(tokens, row=row, start=start, length=length, rows=tokens + room)
    found = read_entries(
        *buffers, raw, key, value, angles, band, pinned_slot=sinks, ring_slot=sinks + pinned, leaving=leaving,
        totals=totals, implementation=implementation,
    )  # fmt: skip
    slots = [sinks + pinned + (start + i) % ring for i in range(length)]
    (keys, held), raw = buffers[:, row], raw[row]
    window = torch.cat([keys[:, slots], key[:tokens].transpose(0, 1)], 1)
    assert torch.equal(found.window[:, :entries], window) and found.window.shape[1] == entries + room
    assert torch.equal(found.sinks, keys[:, :sinks])
    received = torch.cat([totals[row][:, sinks : sinks + pinned], totals[row][:, slots]], 1)
    assert found.totals is not None and torch.equal(found.totals[:, : pinned + length], received)
    assert not found.totals[:, pinned + length :].any() and found.totals.shape[1] == pinned + entries + room
    values = torch.cat([held[:, slots], value[:tokens].transpose(0, 1)], 1)[:, :leaving]
    assert torch.equal(found.values, torch.cat([held[:, sinks : sinks + pinned], values], 1))
    back = [rotate(window[:, i].double(), -(50 + i), inv_freq) for i in range(leaving)]
    assert error(found.sources, torch.cat([raw.double(), torch.stack(back, 1)], 1)) < TOLERANCE[torch.float32]
    chosen = torch.randint(pinned + leaving, (kv_heads, 3, pinned), dtype=torch.int32).to(DEVICE)
    places = torch.arange(sinks, sinks + pinned, device=DEVICE).double()[:, None] * inv_freq
    frame = torch.stack([places.cos(), places.sin()], 1).float()
    taken, untouched = take_sets(found, chosen, frame, implementation=implementation), buffers.clone()
    here, unrotated = buffers[:, :, :, sinks : sinks + pinned], torch.zeros(3, kv_heads, pinned, dim, device=DEVICE)
    which = torch.zeros(kv_heads, pinned, dtype=torch.int64, device=DEVICE)
    to = PinnedSlots(here[0], here[1], unrotated, which, band)
    keys, values = take_sets(found, chosen, frame, slots=to, implementation=implementation)
    assert torch.equal(keys, taken[0]) and torch.equal(values, taken[1])
    assert torch.equal(here[:, row], torch.stack([keys, values])[:, :, -pinned:]), "the last set"
    assert torch.equal(unrotated[row], torch.stack([found.sources[h][chosen[h, -1]] for h in range(kv_heads)]))
    assert torch.equal(which, chosen[:, -1].long()) and not unrotated[[0, 2]].any()
    changed = (buffers != untouched).flatten(-1)
    assert changed[:, row, :, sinks : sinks + pinned].any(), "control"
    changed[:, row, :, sinks : sinks + pinned] = False
    assert not changed.any(), "nothing else is written"
    for head in range(kv_heads):
        flat = chosen[head].flatten().tolist()
        expected = [rotate(found.sources[head, s].double(), sinks + i % pinned, inv_freq) for i, s in enumerate(flat)]
        assert error(keys[head], torch.stack(expected)) < TOLERANCE[dtype]
        assert torch.equal(values[head], found.values[head, flat])


def band_of(tokens: int, *, rows: int, **more: int) -> Band:
    inv_freq = torch.ones(8, dtype=torch.float64, device=DEVICE)
    table = torch.zeros(SCALARS + 2 * rows, dtype=torch.int32, device=DEVICE)
    return Band(np.zeros(tokens, dtype=np.int64), None, inv_freq, past=9, table=table, **more)


def test_mistakes_are_named():
    keys, raw, key = draw(1, 1, 9, 16), draw(1, 1, 2, 16), draw(3, 1, 16)
    angles, slots = torch.zeros(5, 2, 8, device=DEVICE), {"pinned_slot": 1, "ring_slot": 3, "leaving": 5}
    for band, change, says in [
        ({"start": 6}, {}, "start=6"),
        ({}, {"pinned_slot": 2}, "pinned_slot=2"),
        ({"length": 3}, {}, r"3 \+ 3 entries, leaving=5, and 5 angles"),
        ({}, {"leaving": 6}, "leaving=6"),
    ]:
        coming = band_of(3, rows=3, **({"start": 0, "length": 2} | band))
        with pytest.raises(ValueError, match=says):
            read_entries(keys, keys, raw, key, key, angles, coming, **slots | change)
