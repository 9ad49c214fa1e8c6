"""`Leaving`: keys and values on their way from the ring into the archive of recall."""

import torch

from sinkstream.cache.pinned import SLOT_AXIS, write_rotated
from sinkstream.engine.state import StreamState

TABLE = 4_096  # positions by which the table of rotations grows


class Leaving:
    """Window tokens that were copied out of the ring before a step writes over them, and are not in the archive yet.

    Parameters
    ----------
    state : StreamState
        Of one stream.
    first : int
        The first token that has not been copied.
    keeps : bool
        Whether the archive or its chooser has keys and values; else only `end` is kept.

    Attributes
    ----------
    end : int
        Tokens before this one have been copied, or are in the archive.
    """

    def __init__(self, state: StreamState, first: int, keeps: bool):
        self.state, self.keeps = state, keeps
        self._table: torch.Tensor | None = None  # rotations back from positions 0, 1, …
        self.restart(first)

    def restart(self, first: int) -> None:
        """Begin at token `first` of another stream, without copies."""
        self.end = first
        self._base = self.state.counters[0].base  # token index of window position 0 when the latest were copied
        self._parts: list[tuple[int, torch.Tensor, torch.Tensor]] = []  # first token, keys and values, oldest first

    def copy(self, end: int) -> None:
        """Copy the window tokens before `end` out of the ring, keys not rotated."""
        self.renew()
        state, counters, first = self.state, self.state.counters[0], self.end
        if end <= first:
            return
        if not self.keeps:
            self.end = end
            return
        g = state.geometry
        while first < end:  # up to the end of the ring, then from its beginning on
            index = counters.ring_index(first)
            count = min(end - first, g.ring - index)
            slots = slice(g.pinned_slots + index, g.pinned_slots + index + count)
            keys, values = (part[:, :1, :, slots] for part in (state.keys, state.values))
            phases = self.turned_back(first - counters.base, count)
            kept = torch.empty_like(keys)
            write_rotated(state.spec.rope, kept, keys.float(), phases)
            self._parts.append((first, kept, values.clone()))
            first += count
            self.end = first

    def turned_back(self, first: int, count: int) -> torch.Tensor:
        """Rotations that undo those of positions `first` to `first + count - 1`, from a table that is kept."""
        if self._table is None or self._table.shape[-2] < first + count:
            positions = torch.arange(-(-(first + count) // TABLE) * TABLE, device=self.state.device)
            self._table = self.state.spec.rope.phases(-positions)
        return self._table.narrow(-2, first, count)

    def renew(self) -> None:
        """After a rebase, drop copies of tokens that are still in the window.

        They are copied again from the rebased ring, so that the archive has the same bits whenever a copy was made.
        """
        counters = self.state.counters[0]
        if self._base != counters.base:
            self.cut(counters.first_window)
            self._base = counters.base

    def pop(self, first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Remove the oldest copied tokens from `first` on, at least one and none from `end` on; gives their entries.

        Keys and values, ``(layers, 1, kv_heads, tokens, head_dim)`` each. An archive of token ids reads only how many
        there are, and gets entries of the ring that mean nothing.
        """
        if not self.keeps:
            entries = self.state.keys[:, :1, :, : end - first]
            return entries, entries
        first, keys, values = self._parts.pop(0)
        count, held = end - first, keys.shape[SLOT_AXIS]
        if count < held:
            rest = (first + count, keys[..., count:, :], values[..., count:, :])
            self._parts.insert(0, rest)
        return keys[..., :count, :], values[..., :count, :]

    def cut(self, end: int) -> None:
        """Drop the copies of tokens from `end` on."""
        self.end = min(self.end, end)
        held = [(first, k[..., : end - first, :], v[..., : end - first, :]) for first, k, v in self._parts]
        self._parts = [part for part in held if part[0] < end]
