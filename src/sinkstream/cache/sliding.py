"""The ring of layers that attend to a window of their own: the latest entries, no sinks, no policy.

That is what such layers were trained with, so the policy of the cache is no matter of theirs. They share the position
ids of the forward with the layers that stream under the policy, and are set back along with them.
"""

import torch

from sinkstream.cache.buffers import RingBuffers
from sinkstream.cache.pinned import SLOT_AXIS, turned_back
from sinkstream.cache.rope import Rope


class SlidingRing(RingBuffers):
    """Buffers whose oldest entry goes for every new one, once the window is full.

    Parameters
    ----------
    shape : tuple of int
        ``(layers, batch, kv_heads, capacity, head_dim)``.
    dtype, device
        Of keys and values.
    rope : Rope
    window : int
        Tokens that a query sees, its own included.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, rope: Rope, window: int):
        super().__init__(shape, dtype, device, [], None)
        self.rope, self.window, self.base = rope, window, 0

    @property
    def bytes(self) -> int:
        """Memory held, in bytes."""
        return sum(t.numel() * t.element_size() for t in (self.keys, self.values))

    @property
    def room(self) -> int:
        """The most tokens that the next forward may append."""
        return self.capacity - min(self.live, self.window - 1)

    def make_room(self, tokens: int, base: int) -> None:
        """Let go what no coming query sees, ensure that `tokens` entries fit, and set positions back to a new base.

        Parameters
        ----------
        base : int
            Token index of position 0 in the coming forward.
        """
        self.start = max(self.start, self.tail - (self.window - 1))
        if self.tail + tokens > self.capacity:
            assert self.live + tokens <= self.capacity, f"{self.live} + {tokens} entries exceed {self.capacity}"
            self.move(0)
        if base != self.base:
            for row, layer in enumerate(self.keys):
                live = layer[:, :, self.start : self.tail]
                live.copy_(turned_back(self.rope.layer(row), live, base - self.base))
            self.base = base

    @property
    def needed(self) -> dict[str, torch.Tensor]:
        """Keys and values that coming queries see: views ``(layers, batch, kv_heads, below window, head_dim)``."""
        count = min(self.live, self.window - 1)
        return {name: stored[..., self.live - count :, :] for name, stored in self.stored.items()}

    def load(self, keys: torch.Tensor, values: torch.Tensor, base: int) -> None:
        """Take over what `needed` gave, on any device, with keys rotated relative to `base`; the ring must be empty."""
        assert self.tail == 0, f"{self.live} entries are cached already"
        self.base, self.tail = base, keys.shape[SLOT_AXIS]
        self.stored["keys"].copy_(keys)
        self.stored["values"].copy_(values)

    def select(self, rows: torch.Tensor) -> None:
        """Keep these rows of the batch, ``(any,)`` int64, in copies."""
        self.keys, self.values = self.keys.index_select(1, rows), self.values.index_select(1, rows)

    def advance(self, tokens: int) -> None:
        """Count the entries that were written at the tail."""
        self.tail += tokens

    def visible_columns(self, tokens: int) -> torch.Tensor:
        """Which entries each query of the coming forward may see: ``(tokens, live + tokens)``, bool, host."""
        query = self.live + torch.arange(tokens)[:, None]
        column = torch.arange(self.live + tokens)
        return (column <= query) & (column > query - self.window)
