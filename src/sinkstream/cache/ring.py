"""The soft ring: one preallocated buffer for the whole model, moved by a pointer.

New tokens are written at the tail. A prune moves the start pointer and rewrites only the pinned entries just before the
new start, so that the visible cache stays one contiguous view ``[pinned | window]`` and attention is untouched. Only
when the tail meets the end is the live part copied back once (wrap-only copy), and only then are positions rebased.

Two frames (design: window keys keep the rotation they were written with): pinned keys are rotated forward, at every
prune, from an unrotated float32 copy, so that their error never accumulates.
"""

import copy
from collections.abc import Callable
from typing import Self

import torch

from sinkstream.cache.channels import Channel
from sinkstream.cache.pinned import (
    SLOT_AXIS,
    Held,
    Refreshed,
    frame_phases,
    turned_back,
    unrotated,
    window_base,
    write_rotated,
)
from sinkstream.cache.rope import Rope

MOVED_PIECES = 4  # copies of all layers at once, rather than two of each layer

#: Told of tokens that leave the window: index in the stream of the first, unrotated keys in float32, values.
Leaving = Callable[[int, torch.Tensor, torch.Tensor], None]


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


class SoftRing(RingBuffers):
    """Buffers with a pinned frame at the start of what counts and a window behind it.

    Parameters
    ----------
    rope : Rope
    sink : int
        Tokens that the first prune moves into the pinned frame.
    original_positions : bool
        Pinned tokens keep their index in the stream instead of moving along with the window.
    rebase_at : int
        Relative position past which a wrap rebases the window.
    positions : int or None
        How many positions there are: the window is rebased before a new token would stand past them.
    shape, dtype, device, channels, storage
        As for `RingBuffers`.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        *,
        rope: Rope,
        sink: int,
        original_positions: bool,
        rebase_at: int,
        channels: list[Channel],
        storage: tuple[torch.Tensor, torch.Tensor] | None = None,
        positions: int | None = None,
    ):
        super().__init__(shape, dtype, device, channels, storage)
        layers, batch, heads, _, dim = shape
        self.rope, self.sink, self.rebase_at, self.positions = rope, sink, rebase_at, positions
        self.original_positions = original_positions
        self.pinned_keys = torch.zeros((layers, batch, heads, 0, dim), dtype=torch.float32, device=device)
        self.pinned_values = torch.zeros((layers, batch, heads, 0, dim), dtype=dtype, device=device)
        self.pinned_positions = torch.arange(0, device=device).view(1, 1, 1, 0)
        self.base = self.first_window = 0
        self.rebases = 0
        self.recalled = self.recall_shift = 0  # entries that `recall` put into the frame; where they stand in it
        self.on_leaving: Leaving | None = None

    @property
    def pinned(self) -> int:
        """Entries in the pinned frame now (0 until the first prune)."""
        return self.pinned_keys.shape[SLOT_AXIS]

    @property
    def frame(self) -> int:
        """Entries that a query meets in the pinned frame: the sinks alone before the first prune."""
        return self.pinned if self.first_window else self.sink

    @property
    def seen(self) -> int:
        """Tokens appended since the beginning of the stream."""
        return self.first_window + self.live - self.pinned

    @property
    def bytes(self) -> int:
        """Memory held, in bytes: buffers, channels and pinned copies."""
        held = [self.keys, self.values, self.pinned_keys, self.pinned_values, *self.channels.values()]
        return sum(t.numel() * t.element_size() for t in held)

    def load(
        self,
        source: dict[str, torch.Tensor],
        slots: torch.Tensor,
        *,
        base: int,
        first_window: int = 0,
        pinned_keys: torch.Tensor | None = None,
        pinned_positions: torch.Tensor | None = None,
        start: int = 0,
    ) -> None:
        """Take over a stream that was held elsewhere; the ring must be empty.

        Parameters
        ----------
        source : dict of Tensor, (layers or 1, batch, kv_heads or 1, any, ...)
            Buffers "keys" and "values", and one for every channel; window keys are rotated relative to `base`.
        slots : Tensor, (live,), int64
            Which slots of the source are cached, in stream order.
        base : int
            Token index of window position 0.
        first_window : int
            Index of the oldest window token; 0 before the first prune.
        pinned_keys : Tensor or None, (layers, batch, kv_heads, pinned, head_dim), float32
            Keys of the pinned entries (the first of `slots`), not rotated; None before the first prune.
        pinned_positions : Tensor or None, (layers or 1, batch or 1, kv_heads or 1, pinned), int64
            Their indices in the stream.
        start : int
            Slot of the oldest entry.
        """
        assert self.tail == 0, f"{self.live} entries are cached already"
        self.base, self.start, self.tail = base, start, start + len(slots)
        for name, target in self.stored.items():
            for row, source_row in zip(target, source[name]):  # one layer at a time: the source may be the target
                row.copy_(source_row.index_select(SLOT_AXIS - 1, slots))
        if pinned_keys is None:
            return
        assert pinned_positions is not None, "pinned keys come with their positions"
        self.first_window, self.pinned_positions = first_window, pinned_positions
        self._keep_pinned_keys(pinned_keys.clone())
        self.pinned_values = self._pinned_slots(self.values).clone()
        self._write_pinned()

    def advance(self, tokens: int, drop: int = 0) -> None:
        """Count the entries that were written at the tail, and drop as many as the policy did among them."""
        self.tail += tokens
        if drop:
            self.prune(drop)

    def make_room(self, tokens: int) -> int | None:
        """Ensure that `tokens` entries fit behind the tail; copy the live part back to the front if they do not.

        Returns
        -------
        int or None
            By how many positions the window was rebased, if it was.
        """
        spent = self.positions is not None and self.seen - self.base + tokens > self.positions
        if self.tail + tokens <= self.capacity:
            return self._rebase() if spent else None
        assert self.live + tokens <= self.capacity, f"{self.live} + {tokens} entries exceed {self.capacity}"
        self.move(0)
        return self._rebase() if spent else self.rebase_if_far()

    def rebase_if_far(self) -> int | None:
        """Rebase the window if its positions have grown past `rebase_at`; returns by how many, if so."""
        return self._rebase() if self.seen - self.base > self.rebase_at else None

    def _rebase(self) -> int:
        base = window_base(self.first_window, self.pinned, self.original_positions)
        delta = base - self.base
        for row, layer in enumerate(self.keys):
            window = layer[:, :, self.start + self.pinned : self.tail]
            window.copy_(turned_back(self.rope.layer(row), window, delta))
        self.base = base
        self.rebases += 1
        self._write_pinned()
        return delta

    def prune(self, drop: int, refresh: int = 0, choose: Callable[[int], Refreshed] | None = None) -> None:
        """Drop entries: the sinks stay, the best older tokens stay pinned, the oldest of the rest go.

        Parameters
        ----------
        drop : int
            By how many entries the cache shrinks.
        refresh : int
            Older tokens to keep pinned after this prune.
        choose : callable or None
            Called with the number of tokens that leave the window; returns the tokens that stay pinned.
        """
        first = self.pinned == 0 and self.first_window == 0
        window = self.live - drop - self.sink - (refresh or self.recalled)
        if first:
            self._pin_sinks()
        leaving = self.live - self.pinned - window
        self._tell_leaving(leaving)
        channels = {}
        if refresh:
            assert choose is not None, "somebody chooses the tokens that a refresh keeps"
            channels = self._pin(choose(leaving))
        self.first_window += leaving
        self.start = self.tail - window - self.pinned
        self._write_pinned()
        for name, pinned in channels.items():
            self._pinned_slots(self.channels[name]).copy_(pinned)

    def recall(
        self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, *, drop: int = 0, shift: int = 0
    ) -> None:
        """Put tokens that left the window into the pinned frame behind the sinks, in place of those that are there.

        Parameters
        ----------
        keys : Tensor, (layers, batch, kv_heads, recalled, head_dim), float32
            Not rotated.
        values : Tensor, the same shape, in the dtype of the cache
        positions : Tensor, (1, 1, 1, recalled), int64
            Their indices in the stream, ascending.
        drop : int
            Window tokens that leave for them.
        shift : int
            How far in front of their place behind the sinks they stand in the frame.
        """
        assert self.first_window > 0, "tokens come back once tokens have left"
        self._tell_leaving(drop)
        self.first_window += drop
        window = self.live - self.pinned - drop
        self._keep_pinned_keys(torch.cat([self.pinned_keys[..., : self.sink, :], keys], SLOT_AXIS))
        self.pinned_values = torch.cat([self.pinned_values[..., : self.sink, :], values], SLOT_AXIS)
        self.pinned_positions = torch.cat([self.pinned_positions[..., : self.sink], positions], SLOT_AXIS)
        self.recalled, self.recall_shift = keys.shape[SLOT_AXIS], shift
        self.start = self.tail - window
        if self.start < self.pinned:  # no room before the window
            self.move(self.pinned)
        self.start -= self.pinned
        self._write_pinned()

    def rewind(self, tokens: int) -> None:
        """Take back the latest tokens, which must be in the window; what left when they came stays away."""
        assert tokens <= self.live - self.pinned, "these tokens are not in the window"
        self.tail -= tokens

    def held(self) -> Held:
        """What is cached now, for the choice of pinned tokens; views, good until something moves."""
        return Held(
            rope=self.rope,
            sink=self.sink,
            pinned=self.pinned,
            window=self.live - self.pinned,
            first_window=self.first_window,
            base=self.base,
            frame_shift=0,
            keys=self.keys,
            values=self.values,
            channels=self.channels,
            pinned_keys=self.pinned_keys,
            refreshed=self.pinned_positions[..., self.sink :],
            read=lambda buffer, first, count: buffer.narrow(SLOT_AXIS, self.start + first, count),
        )

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows of the batch, ``(any,)`` int64, in copies."""
        self.keys, self.values = self.keys.index_select(1, rows), self.values.index_select(1, rows)
        self.channels = {name: channel.index_select(1, rows) for name, channel in self.channels.items()}
        self.take_pinned(self, rows)

    def take_pinned(self, other: "SoftRing", rows: torch.Tensor) -> None:
        """Take over the pinned tokens and the counts of rows, ``(any,)`` int64, of another ring."""
        self.start, self.tail = other.start, other.tail
        self.base, self.first_window, self.rebases = other.base, other.first_window, other.rebases
        self.recalled, self.recall_shift = other.recalled, other.recall_shift
        self._keep_pinned_keys(other.pinned_keys.index_select(1, rows))
        self.pinned_values = other.pinned_values.index_select(1, rows)
        positions = other.pinned_positions
        self.pinned_positions = positions.index_select(1, rows) if positions.shape[1] > 1 else positions

    def pinned_phases(self) -> torch.Tensor:
        """Rotations of the pinned frame, relative to the base: it ends where the window begins."""
        first = None if self.original_positions else self.first_window - self.pinned - self.base
        if first is not None and self.recall_shift:
            return self.rope.phases(first + self.frame_places())
        return frame_phases(self.rope, self.pinned_positions, base=self.base, first=first)

    def frame_places(self) -> torch.Tensor:
        """Positions of the entries of the frame, ``(frame,)``, counted from its first: recalled ones may be shifted."""
        places = torch.arange(self.frame, device=self.keys.device)
        return places + self.recall_shift * (places >= self.sink) if self.recall_shift else places

    def _tell_leaving(self, count: int) -> None:
        if self.on_leaving is not None and count:
            keys = unrotated(self.rope, self._window(self.keys, count), self.first_window - self.base)
            self.on_leaving(self.first_window, keys, self._window(self.values, count))

    def _window(self, buffer: torch.Tensor, count: int) -> torch.Tensor:
        """The oldest entries of the window: a view."""
        return buffer.narrow(SLOT_AXIS, self.start + self.pinned, count)

    def _pinned_slots(self, buffer: torch.Tensor) -> torch.Tensor:
        return buffer.narrow(SLOT_AXIS, self.start, self.pinned)

    def _pin_sinks(self) -> None:
        slots = slice(self.start, self.start + self.sink)
        self._keep_pinned_keys(unrotated(self.rope, self.keys[..., slots, :], -self.base))
        self.pinned_values = self.values[..., slots, :].clone()
        self.pinned_positions = torch.arange(self.sink, device=self.keys.device).view(1, 1, 1, self.sink)
        self.first_window = self.sink

    def _pin(self, chosen: Refreshed) -> dict[str, torch.Tensor]:
        """Pin other tokens behind the sinks; returns the channels of all pinned tokens, not yet in their slots."""
        sink = self.sink
        self._keep_pinned_keys(torch.cat([self.pinned_keys[..., :sink, :], chosen.keys], SLOT_AXIS))
        self.pinned_values = torch.cat([self.pinned_values[..., :sink, :], chosen.values], SLOT_AXIS)
        sinks = self.pinned_positions[..., :sink].expand(*chosen.positions.shape[:SLOT_AXIS], sink)
        self.pinned_positions = torch.cat([sinks, chosen.positions], SLOT_AXIS)
        return {
            name: torch.cat([channel.narrow(SLOT_AXIS, self.start, sink), chosen.channels[name]], SLOT_AXIS)
            for name, channel in self.channels.items()
        }

    def _keep_pinned_keys(self, keys: torch.Tensor) -> None:
        """Keep unrotated pinned keys, also as the complex pairs that prunes rotate."""
        self.pinned_keys, self._pinned_pairs = keys, self.rope.pairs(keys)

    def _write_pinned(self) -> None:
        """Rotate the pinned keys to where the frame lies now and write keys and values before the window."""
        if self.pinned == 0:
            return
        slots = self._pinned_slots(self.keys)
        write_rotated(self.rope, slots, self.pinned_keys, self.pinned_phases(), self._pinned_pairs)
        self._pinned_slots(self.values).copy_(self.pinned_values)
