"""The soft ring: one preallocated buffer for the whole model, moved by a pointer.

New tokens are written at the tail. A prune moves the start pointer and rewrites only the pinned entries just before the
new start, so that the visible cache stays one contiguous view ``[pinned | window]`` and attention is untouched. Only
when the tail meets the end is the live part copied back once (wrap-only copy), and only then are positions rebased.

Two frames (design: window keys keep the rotation they were written with): pinned keys are rotated forward, at every
prune, from an unrotated float32 copy, so that their error never accumulates.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from sinkstream.cache.rope import Rope

SLOT_AXIS = 3


@dataclass(frozen=True)
class Channel:
    """A quantity kept for every cached token besides its key and value.

    Attributes
    ----------
    name : str
    dtype : torch.dtype
    per_head : bool
        Shape ``(layers, batch, kv_heads, slots)`` if true, ``(1, batch, 1, slots)`` otherwise.
    """

    name: str
    dtype: torch.dtype
    per_head: bool


class SoftRing:
    """Keys, values and channels of all layers, each in one stacked tensor.

    Parameters
    ----------
    shape : tuple of int
        ``(layers, batch, kv_heads, capacity, head_dim)``.
    dtype, device
        Of keys and values.
    rope : Rope
    sink : int
        Tokens that the first prune moves into the pinned frame.
    original_positions : bool
        Pinned tokens keep their index in the stream instead of moving along with the window.
    rebase_at : int
        Relative position past which a wrap rebases the window.
    channels : list of Channel
    storage : pair of Tensor or None
        Buffers for keys and values; default: new ones.
    """

    def __init__(
        self,
        shape,
        dtype,
        device,
        *,
        rope: Rope,
        sink: int,
        original_positions: bool,
        rebase_at: int,
        channels,
        storage: tuple[torch.Tensor, torch.Tensor] | None = None,
    ):
        layers, batch, heads, self.capacity, dim = shape
        self.keys, self.values = storage or [torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)]
        self.channels = {
            c.name: torch.zeros(
                (layers if c.per_head else 1, batch, heads if c.per_head else 1, self.capacity),
                dtype=c.dtype,
                device=device,
            )
            for c in channels
        }
        self.rope, self.sink, self.rebase_at = rope, sink, rebase_at
        self.original_positions = original_positions
        self.pinned_keys = torch.zeros((layers, batch, heads, 0, dim), dtype=torch.float32, device=device)
        self.pinned_values = torch.zeros((layers, batch, heads, 0, dim), dtype=dtype, device=device)
        self.pinned_channels = {n: c[..., :0].clone() for n, c in self.channels.items()}
        self.pinned_positions = torch.arange(0, device=device).view(1, 1, 1, 0)
        self.start = self.tail = self.base = self.first_window = 0
        self.rebases = 0

    @property
    def pinned(self) -> int:
        """Entries in the pinned frame now (0 until the first prune)."""
        return self.pinned_keys.shape[SLOT_AXIS]

    @property
    def live(self) -> int:
        """Entries cached now."""
        return self.tail - self.start

    @property
    def seen(self) -> int:
        """Tokens appended since the beginning of the stream."""
        return self.first_window + self.live - self.pinned

    @property
    def bytes(self) -> int:
        """Memory held, in bytes: buffers, channels and pinned copies."""
        held = [self.keys, self.values, self.pinned_keys, self.pinned_values]
        held += [*self.channels.values(), *self.pinned_channels.values()]
        return sum(t.numel() * t.element_size() for t in held)

    @property
    def stored(self) -> dict[str, torch.Tensor]:
        """Everything cached now, oldest first: views of keys, values and channels by name, slots on axis 3."""
        buffers = {"keys": self.keys, "values": self.values, **self.channels}
        return {name: buffer.narrow(SLOT_AXIS, self.start, self.live) for name, buffer in buffers.items()}

    def load(
        self,
        source: dict[str, torch.Tensor],
        slots: torch.Tensor,
        *,
        base: int,
        first_window: int = 0,
        pinned_keys: torch.Tensor | None = None,
        pinned_positions: torch.Tensor | None = None,
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
        """
        assert self.tail == 0, f"{self.live} entries are cached already"
        self.base, self.tail = base, len(slots)
        for name, target in self.stored.items():
            for row, source_row in zip(target, source[name]):  # one layer at a time: the source may be the target
                row.copy_(source_row.index_select(SLOT_AXIS - 1, slots))
        if pinned_keys is None:
            return
        self.first_window, self.pinned_positions = first_window, pinned_positions
        self._keep_pinned_keys(pinned_keys.clone())
        self.pinned_values = self._pinned_slots(self.values).clone()
        self.pinned_channels = {n: self._pinned_slots(c).clone() for n, c in self.channels.items()}
        self._write_pinned()

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
        if self.tail + tokens <= self.capacity:
            return None
        assert self.live + tokens <= self.capacity, f"{self.live} + {tokens} entries exceed {self.capacity}"
        self._compact()
        return self._rebase() if self.seen - self.base > self.rebase_at else None

    def _compact(self) -> None:
        """Copy the live part back to the front."""
        live = self.live
        if self.start:
            for buffer in (self.keys, self.values, *self.channels.values()):
                self._to_front(buffer, live)
        self.start, self.tail = 0, live

    def _to_front(self, buffer: torch.Tensor, live: int) -> None:
        if self.start >= live:
            buffer.narrow(SLOT_AXIS, 0, live).copy_(buffer.narrow(SLOT_AXIS, self.start, live))
            return
        for row in buffer:  # source and target overlap: one layer at a time bounds the extra memory
            row.narrow(SLOT_AXIS - 1, 0, live).copy_(row.narrow(SLOT_AXIS - 1, self.start, live).clone())

    def _rebase(self) -> int:
        base = self.first_window - (0 if self.original_positions else self.pinned)
        delta = base - self.base
        cos, sin = self.rope.angles(torch.tensor(delta, device=self.keys.device))
        for layer in self.keys:
            window = layer[:, :, self.start + self.pinned : self.tail]
            window.copy_(self.rope.unrotate(window, cos, sin))
        self.base = base
        self.rebases += 1
        self._write_pinned()
        return delta

    def prune(self, drop: int, refresh: int = 0, choose: Callable[[int], torch.Tensor] | None = None) -> None:
        """Drop entries: the sinks stay, the best older tokens stay pinned, the oldest of the rest go.

        Parameters
        ----------
        drop : int
            By how many entries the cache shrinks.
        refresh : int
            Older tokens to keep pinned after this prune.
        choose : callable or None
            Called with the number of tokens that leave the window; returns which candidates stay, as a Tensor
            ``(layers or 1, batch or 1, kv_heads or 1, refresh)`` of ascending indices into pinned-then-leaving tokens.
        """
        first = self.pinned == 0 and self.first_window == 0
        window = self.live - drop - self.sink - refresh
        if first:
            self._pin_sinks()
        self.pinned_channels = {n: self._pinned_slots(c).clone() for n, c in self.channels.items()}
        leaving = self.live - self.pinned - window
        if refresh:
            self._pin(choose(leaving), leaving)
        self.first_window += leaving
        self.start = self.tail - window - self.pinned
        self._write_pinned()
        for name, channel in self.channels.items():
            self._pinned_slots(channel).copy_(self.pinned_channels[name])

    def candidates(self, leaving: int) -> dict[str, torch.Tensor]:
        """Channels of the pinned tokens (sinks left out) and of the `leaving` oldest window tokens, in stream order."""
        count = self.pinned - self.sink + leaving
        return {n: c.narrow(SLOT_AXIS, self.start + self.sink, count) for n, c in self.channels.items()}

    def candidate_keys(self, leaving: int) -> torch.Tensor:
        """Unrotated float32 keys of the candidates, ``(layers, batch, kv_heads, candidates, head_dim)``."""
        slots = self._leaving(self.keys, leaving)
        positions = torch.arange(leaving, device=slots.device) + (self.first_window - self.base)
        return torch.cat(
            [self.pinned_keys[..., self.sink :, :], self.rope.unrotate(slots, *self.rope.angles(positions))],
            dim=SLOT_AXIS,
        )

    def pinned_phases(self, shift: int | None = None) -> torch.Tensor:
        """Rotations of the pinned frame, relative to the base.

        Parameters
        ----------
        shift : int or None
            By how much the frame lies forward of the base; default: where it lies now. Ignored with original positions.
        """
        if self.original_positions:
            return self.rope.phases(self.pinned_positions - self.base)
        shift = self.first_window - self.pinned - self.base if shift is None else shift
        return self.rope.phases_from(shift, self.pinned, self.keys.device)

    def _pinned_slots(self, buffer: torch.Tensor) -> torch.Tensor:
        return buffer.narrow(SLOT_AXIS, self.start, self.pinned)

    def _leaving(self, buffer: torch.Tensor, leaving: int) -> torch.Tensor:
        return buffer.narrow(SLOT_AXIS, self.start + self.pinned, leaving)

    def _join(self, pinned: torch.Tensor, buffer: torch.Tensor, leaving: int) -> torch.Tensor:
        older = pinned.narrow(SLOT_AXIS, self.sink, self.pinned - self.sink)
        return torch.cat([older, self._leaving(buffer, leaving)], dim=SLOT_AXIS)

    def _pin_sinks(self) -> None:
        sink = self.sink
        positions = torch.arange(sink, device=self.keys.device)
        slots = self.keys[..., self.start : self.start + sink, :]
        self._keep_pinned_keys(self.rope.unrotate(slots, *self.rope.angles(positions - self.base)))
        self.pinned_values = self.values[..., self.start : self.start + sink, :].clone()
        self.pinned_positions = positions.view(1, 1, 1, sink)
        self.first_window = sink

    def _pin(self, index: torch.Tensor, leaving: int) -> None:
        kept = index.shape[-1]
        keys, channels = self.candidate_keys(leaving), self.candidates(leaving)
        values = self._join(self.pinned_values, self.values, leaving)
        lead = keys.shape[:SLOT_AXIS]
        wide = index.expand(*lead, kept)[..., None].expand(*lead, kept, keys.shape[-1])
        sinks = self.pinned_keys[..., : self.sink, :]
        self._keep_pinned_keys(torch.cat([sinks, keys.gather(SLOT_AXIS, wide)], SLOT_AXIS))
        self.pinned_values = torch.cat(
            [self.pinned_values[..., : self.sink, :], values.gather(SLOT_AXIS, wide)], SLOT_AXIS
        )
        for name, channel in channels.items():
            kept_channel = channel.gather(SLOT_AXIS, index.expand(*channel.shape[:SLOT_AXIS], kept))
            self.pinned_channels[name] = torch.cat(
                [self.pinned_channels[name][..., : self.sink], kept_channel], SLOT_AXIS
            )
        self.pinned_positions = self.pinned_channels["position"]

    def _keep_pinned_keys(self, keys: torch.Tensor) -> None:
        """Keep unrotated pinned keys, also as the complex pairs that prunes rotate."""
        self.pinned_keys, self._pinned_pairs = keys, self.rope.pairs(keys)

    def _write_pinned(self) -> None:
        """Rotate the pinned keys to where the frame lies now and write keys and values before the window."""
        if self.pinned == 0:
            return
        keys = self.keys.narrow(SLOT_AXIS, self.start, self.pinned)
        rotary = self.rope.rotary_dim
        self.rope.write_rotated(keys, self._pinned_pairs, self.pinned_phases())
        if rotary < keys.shape[-1]:
            keys[..., rotary:].copy_(self.pinned_keys[..., rotary:])
        self.values.narrow(SLOT_AXIS, self.start, self.pinned).copy_(self.pinned_values)
