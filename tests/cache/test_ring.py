"""The soft ring's buffers: what is cached survives the copy back to the front, however it overlaps its target."""

import pytest
import torch

from sinkstream.cache.ring import MOVED_PIECES, RingBuffers


@pytest.mark.parametrize("start", [0, 1, 3, 7, 8, 15, 16, 29, 40])
@pytest.mark.parametrize("live", [1, 29, 30])
def test_what_is_cached_is_the_same_at_the_front(start, live):
    """In one piece, in a few, and layer by layer where pieces would be many."""
    ring = RingBuffers((3, 2, 2, 70, 4), torch.float32, torch.device("cpu"), [], None)
    assert {-(-live // start) > MOVED_PIECES for live in (29,) for start in (7, 8)} == {True, False}
    for buffer in (ring.keys, ring.values):
        buffer.copy_(torch.arange(buffer.numel()).view_as(buffer))
    ring.start, ring.tail = start, start + live
    before = {name: part.clone() for name, part in ring.stored.items()}
    ring.move(0)
    assert (ring.start, ring.tail) == (0, live)
    assert all(torch.equal(part, before[name]) for name, part in ring.stored.items())
