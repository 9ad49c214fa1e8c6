"""The soft ring's buffers: what is cached survives being moved, however it overlaps its target."""

import pytest
import torch

from sinkstream.cache.buffers import MOVED_PIECES, RingBuffers


@pytest.mark.parametrize("start", [0, 1, 3, 7, 8, 15, 16, 29, 40])
@pytest.mark.parametrize("live", [1, 29, 30])
@pytest.mark.parametrize("forward", [False, True])
def test_what_is_cached_is_the_same_at_another_place(start, live, forward):
    """In one piece, in a few, and layer by layer where pieces would be many."""
    ring = RingBuffers((3, 2, 2, 70, 4), torch.float32, torch.device("cpu"), [], None)
    assert {-(-live // start) > MOVED_PIECES for live in (29,) for start in (7, 8)} == {True, False}
    for buffer in (ring.keys, ring.values):
        buffer.copy_(torch.arange(buffer.numel()).view_as(buffer))
    first, to = (0, start) if forward else (start, 0)
    ring.start, ring.tail = first, first + live
    before = {name: part.clone() for name, part in ring.stored.items()}
    ring.move(to)
    assert (ring.start, ring.tail) == (to, to + live)
    assert all(torch.equal(part, before[name]) for name, part in ring.stored.items())
