"""The cache that prompts go through: a `StreamingCache` in the slots of a stream's own static ring.

Memory in addition to the ring: the entries of one chunk, which may not overwrite the ring during their own forward, and
the visible keys and values of one layer.
"""

from typing import Any

import torch

from sinkstream.cache import StreamingCache
from sinkstream.cache.ring import SLOT_AXIS, SoftRing
from sinkstream.cache.stream import Stream


class LentRing(SoftRing):
    """A soft ring in the buffers of a stream, which have room for the cached entries; new entries have buffers here.

    Parameters
    ----------
    shape : tuple of int
        ``(layers, batch, kv_heads, capacity, head_dim)`` as if the new entries had their slots behind the others.
    storage : pair of Tensor, (layers, batch, kv_heads, slots, head_dim)
        Keys and values; whatever they hold is overwritten.
    **more
        As for `SoftRing`.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        *,
        storage: tuple[torch.Tensor, torch.Tensor],
        **more: Any,
    ):
        super().__init__(shape, dtype, device, storage=storage, **more)
        self.capacity = storage[0].shape[SLOT_AXIS]
        layers, batch, heads, whole, dim = shape
        new = (layers, batch, heads, whole - self.capacity, dim)
        self._chunk = [torch.zeros(new, dtype=dtype, device=device) for _ in storage]

    @property
    def chunk_tokens(self) -> int:
        """The most entries that one forward may append."""
        return self._chunk[0].shape[SLOT_AXIS]

    def open(self, tokens: int) -> None:
        """Check the size of a chunk; `write` concatenates the visible entries layer by layer."""
        assert tokens <= self.chunk_tokens, f"{tokens} new entries exceed {self.chunk_tokens}"

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep new entries of one layer and return copies of everything visible. As `SoftRing.write`."""
        visible = []
        for buffer, new, given in zip((self.keys, self.values), self._chunk, (keys.detach(), values.detach())):
            new[layer, :, :, : given.shape[2]].copy_(given)
            visible.append(torch.cat([buffer[layer, :, :, self.start : self.tail], given], 2))
        return visible[0], visible[1]

    def advance(self, tokens: int, drop: int = 0) -> None:
        """Copy the entries of the forward to the ring and drop as many entries as the policy did during the forward.

        Entries are dropped early where their room is needed; the same entries remain as after a late drop.
        """
        taken = 0
        while taken < tokens:
            rest = tokens - taken
            early = min(drop, self.live + rest - self.capacity, self.live - self.sink)
            if early > 0:
                self.prune(early)
                drop -= early
            if self.tail + rest > self.capacity:
                self.move(0)
            fits = min(rest, self.capacity - self.tail)
            for buffer, new in zip((self.keys, self.values), self._chunk):
                buffer[..., self.tail : self.tail + fits, :] = new[..., taken : taken + fits, :]
            self.tail += fits
            taken += fits
        if drop:
            self.prune(drop)

    def make_room(self, tokens: int) -> int | None:
        """As `SoftRing.make_room`; where entries must be dropped first, `advance` makes the room."""
        if self.live + tokens <= self.capacity:
            return super().make_room(tokens)
        return self.rebase_if_far()


class PrefillStream(Stream):
    """A stream in the buffers of a static ring.

    Attributes
    ----------
    storage : pair of Tensor, (layers, 1, kv_heads, slots, head_dim)
        Keys and values of the stream that is fed; given before the first token.
    """

    chunk_tokens = 128
    remembers_ids = False  # a stream may go on with either side's tokens
    storage: tuple[torch.Tensor, torch.Tensor]

    def max_chunk_tokens(self) -> int:
        """The most tokens that the next forward may append."""
        return min(self.chunk_tokens, super().max_chunk_tokens())

    def capacity(self) -> int:
        """Slots of the ring, and one chunk."""
        return self.storage[0].shape[SLOT_AXIS] + self.chunk_tokens

    def _new_ring(self, shape: tuple[int, ...], device: torch.device, **more: Any) -> SoftRing:
        # every chunk wraps here; the larger limit keeps rotations of keys, and their rounding, rare
        more["rebase_at"] += self.policy.peak
        return LentRing(shape, self.spec.dtype, device, storage=self.storage, **more)


class PrefillCache(StreamingCache):
    """A streaming cache in the buffers of a static ring."""

    stream_class = PrefillStream
    shows_queries = False  # the engine keeps them
    stream: PrefillStream
