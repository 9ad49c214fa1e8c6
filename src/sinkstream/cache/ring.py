"""The soft ring: one preallocated buffer for the whole model, moved by a pointer.

New tokens are written at the tail. A prune moves the start pointer and rewrites only the pinned entries just before the
new start, so that the visible cache stays one contiguous view ``[pinned | window]`` and attention is untouched. Only
when the tail meets the end is the live part copied back once (wrap-only copy), and only then are positions rebased.

Two frames (design: window keys keep the rotation they were written with): pinned keys are rotated forward, at every
prune, from an unrotated float32 copy, so that their error never accumulates.
"""

from collections.abc import Callable

import torch

from sinkstream.cache.ahead import KeysAhead
from sinkstream.cache.channels import Channel
from sinkstream.cache.frame import FramedRing
from sinkstream.cache.pinned import SLOT_AXIS, Held, Refreshed, turned_back, window_base
from sinkstream.cache.rope import Rope


class SoftRing(FramedRing):
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
    ahead : int
        Prunes at consecutive tokens for which the sinks are rotated at once; 0 where prunes are rarer.
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
        ahead: int = 0,
    ):
        super().__init__(shape, dtype, device, channels, storage)
        layers, batch, heads, _, dim = shape
        self.rope, self.sink, self.rebase_at, self.positions = rope, sink, rebase_at, positions
        self.original_positions = original_positions
        self.pinned_keys = torch.zeros((layers, batch, heads, 0, dim), dtype=torch.float32, device=device)
        self.pinned_values = torch.zeros((layers, batch, heads, 0, dim), dtype=dtype, device=device)
        self.pinned_positions = torch.arange(0, device=device).view(1, 1, 1, 0)
        self.base = self.first_window = self.rebases = 0
        self.ahead = KeysAhead(ahead, self.keys, sink, rope)

    @property
    def bytes(self) -> int:
        """Memory held, in bytes: buffers, channels and pinned copies."""
        held = [self.keys, self.values, self.pinned_keys, self.pinned_values, *self.channels.values()]
        return self.ahead.bytes + sum(t.numel() * t.element_size() for t in held)

    def copy_buffers(self) -> None:
        super().copy_buffers()
        self.ahead = self.ahead.anew(self.keys)

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

    def advance(self, tokens: int, drop: int = 0, choose: Callable[[int], Refreshed] | None = None) -> None:
        """Count the entries that were written at the tail, and drop as many as the policy did among them.

        `choose`: as for `prune`, where other tokens are pinned then; as many as before.
        """
        self.tail += tokens
        if drop:
            self.prune(drop, self.pinned - self.sink if choose else 0, choose)

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
        self.ahead = self.ahead.anew(self.keys)
        self.take_pinned(self, rows)
