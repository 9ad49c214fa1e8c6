"""The soft ring's buffers: what is cached survives being moved, however it overlaps its target."""

import pytest
import tiny_model
import torch

from sinkstream import StreamingCache
from sinkstream.cache import stream
from sinkstream.cache.buffers import MOVED_PIECES, RingBuffers
from sinkstream.compat import with_cache


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


@torch.no_grad()
def rotated_sinks(model) -> tuple[list[torch.Tensor], set[int]]:
    """The sinks' keys of a strict stream after each of 70 tokens, and the bytes held since the first prune."""
    cache = StreamingCache.for_model(model, sink=3, window=9)
    keys, held = [], set()
    for i, token in enumerate(torch.randint(0, 90, (1, 70), generator=torch.Generator().manual_seed(0)).split(1, 1)):
        model(token, **with_cache(model, cache))
        keys.append(cache.stream.ring.stored["keys"][..., :3, :].clone())
        held |= {cache.stats()["bytes"]} if i >= 12 else set()
    cache.close()
    return keys, held


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_keys_that_are_rotated_ahead_are_those_rotated_one_at_a_time(family, monkeypatch):
    """Bit for bit, in half precision, over several blocks; keys of another position are not."""
    model = tiny_model.tiny_model(family).to(torch.bfloat16)
    ahead, held = rotated_sinks(model)
    assert len(held) == 1, "constant"
    monkeypatch.setattr(stream, "MOST_AHEAD", 0)
    alone, _ = rotated_sinks(model)
    assert 3 * stream.AHEAD < 70 and all(map(torch.equal, ahead, alone))
    assert not torch.equal(alone[40], alone[41])
