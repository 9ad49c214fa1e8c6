"""`KeysAhead`: sinks rotated for several prunes at once.

A prune at every token moves the sinks by one position. Rotated one prune at a time they take a handful of kernels at
every token; rotated ahead, a token takes one copy.
"""

import torch

from sinkstream.cache.pinned import SLOT_AXIS, write_rotated
from sinkstream.cache.rope import Rope


class KeysAhead:
    """The keys of the sinks at positions in a row, in the dtype of the cache.

    Parameters
    ----------
    prunes : int
        Positions in a row; 0: none are kept.
    keys : Tensor, (layers, batch, kv_heads, slots, head_dim)
        Buffer that they are for.
    sink : int
    rope : Rope
    """

    def __init__(self, prunes: int, keys: torch.Tensor, sink: int, rope: Rope):
        layers, batch, heads, _, dim = keys.shape
        self.prunes, self.sink, self.rope = prunes, sink, rope
        with torch.inference_mode(False):  # as the buffers
            self._keys = torch.zeros((prunes, layers, batch, heads, sink, dim), dtype=keys.dtype, device=keys.device)
        self._first: int | None = None  # position of the first sink in the first of them

    @property
    def bytes(self) -> int:
        """Memory held, in bytes."""
        return self._keys.numel() * self._keys.element_size()

    def anew(self, keys: torch.Tensor) -> "KeysAhead":
        """The same for another buffer."""
        return KeysAhead(self.prunes, keys, self.sink, self.rope)

    def forget(self) -> None:
        """The sinks are others now."""
        self._first = None

    def at(self, first: int | None, keys: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor | None:
        """The sinks where the first of them has that position; None where they are not kept, or others are pinned too.

        Parameters
        ----------
        first : int or None
            None: original positions.
        keys, pairs : Tensor, (layers, batch, kv_heads, pinned, ...)
            Pinned keys, not rotated, and ``rope.pairs(keys)``.
        """
        if not self.prunes or first is None or keys.shape[SLOT_AXIS] != self.sink:
            return None
        if self._first is None or not self._first <= first < self._first + self.prunes:
            phases = self.rope.phases_from(first, self.sink + self.prunes - 1, keys.device)
            phases = phases.unfold(-2, self.sink, 1).movedim(-3, 0).transpose(-1, -2)  # (prunes, …, sink, pairs)
            phases = phases if phases.ndim > 3 else phases[:, None, None, None]
            write_rotated(self.rope, self._keys, keys, phases, pairs)
            self._first = first
        return self._keys[first - self._first]
