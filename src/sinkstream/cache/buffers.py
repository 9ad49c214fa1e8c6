"""Buffers of one ring: keys, values and channels of all layers, which are written at the tail and moved as one."""

import copy
from typing import Self

import torch

from sinkstream.cache.channels import Channel
from sinkstream.cache.pinned import SLOT_AXIS

MOVED_PIECES = 4  # copies of all layers at once, rather than two of each layer


class RingBuffers:
    """Keys, values and channels of all layers, each in one stacked tensor; entries `start` to `tail` count.

    Parameters
    ----------
    shape : tuple of int
        ``(layers, batch, kv_heads, capacity, head_dim)``.
    dtype, device
        Of keys and values.
    channels : list of Channel
    storage : pair of Tensor or None
        Buffers for keys and values; default: new ones.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        channels: list[Channel],
        storage: tuple[torch.Tensor, torch.Tensor] | None,
    ):
        layers, batch, heads, self.capacity, _ = shape
        self.keys, self.values = storage or [torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)]
        self.channels = {
            c.name: torch.zeros(
                (layers if c.per_head else 1, batch, heads if c.per_head else 1, self.capacity),
                dtype=torch.float32,
                device=device,
            )
            for c in channels
        }
        self.start = self.tail = 0

    @property
    def live(self) -> int:
        """Entries cached now."""
        return self.tail - self.start

    @property
    def stored(self) -> dict[str, torch.Tensor]:
        """Everything cached now, oldest first: views of keys, values and channels by name, slots on axis 3."""
        buffers = {"keys": self.keys, "values": self.values, **self.channels}
        return {name: buffer.narrow(SLOT_AXIS, self.start, self.live) for name, buffer in buffers.items()}

    def twin(self) -> Self:
        """A ring with the same buffers, which either may write to after `copy_buffers` only."""
        other = copy.copy(self)
        other.channels = dict(self.channels)
        return other

    def copy_buffers(self) -> None:
        """Copy what is cached to buffers of its own, at the same slots."""
        with torch.inference_mode(False):
            copies = {}
            for name, stored in self.stored.items():
                whole = self.channels.get(name, self.keys)
                copies[name] = torch.zeros_like(whole)
                copies[name].narrow(SLOT_AXIS, self.start, self.live).copy_(stored)
        self.keys, self.values = copies.pop("keys"), copies.pop("values")
        self.channels = copies

    def open(self, tokens: int) -> None:
        """Cut the views of all layers for a forward of `tokens` new entries; `make_room` comes before."""
        end = self.tail + tokens
        self._new = [buffer[..., self.tail : end, :].unbind(0) for buffer in (self.keys, self.values)]
        self._visible = [buffer[..., self.start : end, :].unbind(0) for buffer in (self.keys, self.values)]

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new entries at the tail of one layer, without moving it, and return everything visible.

        Parameters
        ----------
        keys, values : Tensor, (batch, kv_heads, new, head_dim)
            As many entries as `open` was told.

        Returns
        -------
        keys, values : Tensor, (batch, kv_heads, live + new, head_dim)
            Views of the buffers.
        """
        # detached where it matters: no graph may grow along with the stream
        self._new[0][layer].copy_(keys.detach() if keys.requires_grad else keys)
        self._new[1][layer].copy_(values.detach() if values.requires_grad else values)
        return self._visible[0][layer], self._visible[1][layer]

    def move(self, start: int) -> None:
        """Copy the live part to where slot `start` is its first."""
        shift, live = start - self.start, self.live
        if shift and live:
            for buffer in (self.keys, self.values, *self.channels.values()):
                self._move(buffer, shift, live)
        self.start, self.tail = start, start + live

    def _move(self, buffer: torch.Tensor, shift: int, live: int) -> None:
        """Copy `live` entries from the start by `shift` slots: in pieces that meet no other's source, if few do."""
        size = abs(shift)
        firsts = range(0, live, size)
        if len(firsts) <= MOVED_PIECES:
            for first in firsts if shift < 0 else reversed(firsts):
                count = min(size, live - first)
                target = buffer.narrow(SLOT_AXIS, self.start + shift + first, count)
                target.copy_(buffer.narrow(SLOT_AXIS, self.start + first, count))
            return
        for layer in buffer:  # one layer at a time bounds the extra memory
            held = layer.narrow(SLOT_AXIS - 1, self.start, live).clone()
            layer.narrow(SLOT_AXIS - 1, self.start + shift, live).copy_(held)
