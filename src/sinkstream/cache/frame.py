"""The pinned frame of a soft ring: sinks, then refreshed or recalled tokens, rotated from unrotated copies."""

from collections.abc import Callable
from typing import Protocol, Self

import torch

from sinkstream.archive import Fetched
from sinkstream.cache.ahead import KeysAhead
from sinkstream.cache.buffers import RingBuffers
from sinkstream.cache.pinned import SLOT_AXIS, Refreshed, frame_phases, unrotated, write_rotated
from sinkstream.cache.rope import Rope

#: Told of tokens that leave the window: index in the stream of the first, unrotated keys in float32, values.
Leaving = Callable[[int, torch.Tensor, torch.Tensor], None]


class RecallRing(Protocol):
    """What recall reads of a ring, and how it sets the frame; see `FramedRing`."""

    @property
    def keys(self) -> torch.Tensor: ...

    @property
    def pinned_keys(self) -> torch.Tensor: ...

    @property
    def pinned_values(self) -> torch.Tensor: ...

    @property
    def live(self) -> int: ...

    @property
    def pinned(self) -> int: ...

    def recall(self, fetched: Fetched, positions: torch.Tensor, *, drop: int = 0, shift: int = 0) -> None: ...


class FramedRing(RingBuffers):
    """Buffers whose first entries, once something has been pruned, are the pinned frame.

    Attributes
    ----------
    rope : Rope
    sink : int
        Tokens that the first prune moves into the frame.
    original_positions : bool
        Pinned tokens keep their index in the stream instead of moving along with the window.
    pinned_keys, pinned_values, pinned_positions : Tensor
        Unrotated float32 keys, values, and indices in the stream of the entries of the frame.
    base : int
        Token index of window position 0.
    first_window : int
        Index of the oldest window token; 0 before the first prune.
    recalled, recall_shift : int
        Entries that `recall` put into the frame, and how far in front of their place behind the sinks they stand.
    on_leaving : callable or None
    ahead : KeysAhead
        Sinks that are rotated for prunes to come.
    """

    rope: Rope
    sink: int
    original_positions: bool
    pinned_keys: torch.Tensor
    pinned_values: torch.Tensor
    pinned_positions: torch.Tensor
    base: int
    first_window: int
    rebases: int
    recalled: int = 0
    recall_shift: int = 0
    on_leaving: Leaving | None = None
    ahead: KeysAhead

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

    def recall(self, fetched: Fetched, positions: torch.Tensor, *, drop: int = 0, shift: int = 0) -> None:
        """Put tokens that left the window into the pinned frame behind the sinks, in place of those that are there.

        Parameters
        ----------
        fetched : callable
            Waits for their keys ``(layers, batch, kv_heads, recalled, head_dim)``, float32, not rotated, and values,
            the same shape, in the dtype of the cache.
        positions : Tensor, (1, 1, 1, recalled), int64, on the host
            Their indices in the stream, ascending.
        drop : int
            Window tokens that leave for them.
        shift : int
            How far in front of their place behind the sinks they stand in the frame.
        """
        assert self.first_window > 0, "tokens come back once tokens have left"
        keys, values = fetched()
        self._tell_leaving(drop)
        self.first_window += drop
        window = self.live - self.pinned - drop
        self._keep_pinned_keys(torch.cat([self.pinned_keys[..., : self.sink, :], keys], SLOT_AXIS))
        self.pinned_values = torch.cat([self.pinned_values[..., : self.sink, :], values], SLOT_AXIS)
        positions = positions.to(self.pinned_positions.device, non_blocking=True)
        self.pinned_positions = torch.cat([self.pinned_positions[..., : self.sink], positions], SLOT_AXIS)
        self.recalled, self.recall_shift = keys.shape[SLOT_AXIS], shift
        self.start = self.tail - window
        if self.start < self.pinned:  # no room before the window
            self.move(self.pinned)
        self.start -= self.pinned
        self._write_pinned()

    def hold_recalled(self, count: int, shift: int) -> None:
        """Say of a frame that was loaded how many of its last entries came back, and how far they are shifted."""
        self.recalled, self.recall_shift = count, shift
        self._write_pinned()

    def take_pinned(self, other: Self, rows: torch.Tensor) -> None:
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
        self.ahead.forget()

    def _write_pinned(self) -> None:
        """Rotate the pinned keys to where the frame lies now and write keys and values before the window."""
        if self.pinned == 0:
            return
        slots, keys, pairs = self._pinned_slots(self.keys), self.pinned_keys, self._pinned_pairs
        first = None if self.original_positions else self.first_window - self.pinned - self.base
        ahead = self.ahead.at(first, keys, pairs)
        if ahead is not None:
            slots.copy_(ahead)
        else:
            write_rotated(self.rope, slots, keys, self.pinned_phases(), pairs)
        self._pinned_slots(self.values).copy_(self.pinned_values)
