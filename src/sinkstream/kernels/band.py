"""What the queries of a chunk see: the band of the window, and the columns that it is a band of."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from sinkstream.kernels.chunk_angles import angles_of
from sinkstream.kernels.runtime import check_tensor

SCALARS = 16  # of a band: tokens, past, start, length, stays, slot, row, position, sinks; the others are spare
TOKENS, PAST, START, LENGTH, STAYS, SLOT, ROW, POSITION, SINKS = range(9)  # where they are
ALL_PINNED = 2**31 - 1  # as `sinks`: every pinned entry


class Band:
    """What each query of a chunk sees, and where it meets the pinned keys. Tokens are counted from the chunk's first.

    Everything that changes from chunk to chunk goes to the device in one copy, which nobody waits for.

    Parameters
    ----------
    first : array, (tokens,), integers, never falling
        Oldest window token that each query sees; negative ones came before the chunk.
    turn : array, (tokens,), integers, or None
        By how many positions each query is turned back to where it stands in the frame of the pinned keys; None: by
        none.
    inv_freq : Tensor, (rotary_dim / 2,), float64, on the device of the queries
        Radians per position.
    past : int
        Tokens of the stream before the chunk, below 2**31: pinned entry i is seen by queries from token ``i - past``
        on.
    start, length : int
        Slot of the oldest window entry of the past in its ring, and how many there are; the latest is the token before
        the chunk.
    stays, slot : int
        The first of the chunk's tokens that stays in the ring afterwards; where in the ring its first token would lie.
    row : int
        Row of the pinned keys and of the ring that belongs to the first row of the queries.
    position : int
        Window position of the chunk's first token.
    sinks : int
        Pinned entries that belong to the stream; the pinned slots after them are neither read nor written.
    table : Tensor or None, (SCALARS + 2 * rows,), int32
        A buffer to write to, for a chunk that is padded to `rows` tokens; then it is the caller who calls `rotate`,
        where the work on the chunk begins. Default: a new one, without padding.
    """

    def __init__(
        self,
        first: np.ndarray,
        turn: np.ndarray | None,
        inv_freq: torch.Tensor,
        *,
        past: int,
        length: int,
        start: int = 0,
        stays: int = 0,
        slot: int = 0,
        row: int = 0,
        position: int = 0,
        sinks: int = ALL_PINNED,
        table: torch.Tensor | None = None,
    ):
        self.first, self.past, self.start, self.length, self.stays, self.slot = first, past, start, length, stays, slot
        self.row, self.inv_freq, self.fixed, self.sinks = row, inv_freq, table is not None, sinks
        tokens = len(first)
        self.rows = tokens if table is None else (len(table) - SCALARS) // 2
        host = np.zeros(SCALARS + 2 * self.rows, dtype=np.int32)
        host[:9] = tokens, past, start, length, stays, slot, row, position, sinks
        host[SCALARS : SCALARS + tokens] = first
        if turn is not None:
            host[SCALARS + self.rows : SCALARS + self.rows + tokens] = turn
        source = torch.from_numpy(host)
        if inv_freq.device.type == "cuda":
            source = source.pin_memory()
        self.turns = turn is not None and (self.fixed or bool(turn.any()))
        self.rotation: torch.Tensor | None = None
        if table is None:
            self.table = source.to(inv_freq.device, non_blocking=True)
            self.rotate()
        else:
            self.table = table.copy_(source, non_blocking=True)

    def rotate(self) -> None:
        """Compute `rotation`, ``(rows, 2, rotary_dim / 2)`` float32, from the table; None where no query is turned."""
        if self.turns:
            self.rotation = angles_of(self.table[SCALARS + self.rows :], self.inv_freq, back=True)

    @property
    def tokens(self) -> int:
        """Queries of the chunk, without padding."""
        return len(self.first)

    @property
    def device_row(self) -> torch.Tensor:
        """`row`, ``(1,)`` int64, on the device."""
        return self.table[ROW : ROW + 1].long()

    def slots(self, pinned_slots: int, ring: int) -> torch.Tensor:
        """Slot of every token of the chunk, ``(rows,)`` int64, on the device; padded ones have that of the last token.

        Parameters
        ----------
        pinned_slots, ring : int
            Slots in front of the ring, and of the ring.
        """
        table = self.table.long()
        token = torch.arange(self.rows, device=table.device).minimum(table[TOKENS] - 1)
        index = table[PAST] + token
        return torch.where(
            index < table[SINKS].clamp(max=pinned_slots), index, pinned_slots + (table[SLOT] + token) % ring
        )

    def owners(self, pinned_slots: int, ring: int) -> torch.Tensor:
        """Which token lies in every slot once the chunk does, ``(pinned_slots + ring,)`` int64, on the device.

        A pinned slot is that of the token of its index; one that does not belong to the stream has a token that never
        comes.
        """
        table = self.table.long()
        pinned = torch.arange(pinned_slots, device=table.device)
        pinned = torch.where(pinned < table[SINKS], pinned - table[PAST], ALL_PINNED)
        last = table[TOKENS] - 1
        return torch.cat([pinned, last - (table[SLOT] + last - torch.arange(ring, device=table.device)) % ring])

    @cached_property
    def host_first(self) -> list[int]:
        """`first`, as integers of the host."""
        return self.first.tolist()

    @property
    def device_first(self) -> torch.Tensor:
        """`first`, ``(tokens,)`` int32, on the device."""
        return self.table[SCALARS : SCALARS + self.tokens]


@dataclass(frozen=True)
class SetColumns:
    """Sets of pinned tokens, of which each query of a chunk sees one: what stays pinned changes within the chunk.

    Attributes
    ----------
    keys, values : Tensor, (kv_heads, sets * size, head_dim)
        One set after the other, in the frame of pinned keys.
    which : Tensor, (tokens,), int32, never falling
        The set that a query sees.
    size : int
        Tokens of a set.
    """

    keys: torch.Tensor
    values: torch.Tensor
    which: torch.Tensor
    size: int

    def check(self, query: torch.Tensor, kv_heads: int) -> None:
        """Refuse what no chunk of these queries, ``(1, query_heads, tokens, head_dim)``, can see. Raises ValueError."""
        if len(query) != 1:
            raise ValueError(f"sets of pinned tokens with {len(query)} rows of queries; accepted: 1")
        shape = (kv_heads, None, query.shape[3])
        for name, part in (("keys", self.keys), ("values", self.values)):
            check_tensor(f"sets.{name}", part, shape, dtypes=(query.dtype,), device=query.device)
        check_tensor("sets.which", self.which, (query.shape[2],), dtypes=(torch.int32,), device=query.device)
        if self.size < 1 or self.keys.shape[1] % self.size:
            raise ValueError(f"sets of {self.size} tokens, {self.keys.shape[1]} in all; accepted: a multiple of it")

    def tile(self, begin: int, end: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keys and values, ``(1, kv_heads, any, head_dim)``, of queries `begin` to `end` - 1, and which each sees."""
        which = self.which[begin:end]
        lowest, highest = int(which[0]), int(which[-1])
        part = slice(lowest * self.size, (highest + 1) * self.size)
        index = torch.arange(part.start, part.stop, device=which.device) // self.size
        return self.keys[None, :, part], self.values[None, :, part], index == which[:, None]


@dataclass(frozen=True)
class Columns:
    """Keys and values of one layer that a chunk sees. All may be strided, but for the last axis.

    Attributes
    ----------
    pinned_keys, pinned_values : Tensor, (at least batch, kv_heads, pinned, head_dim)
        In the frame of their own. Entry i holds token i; those that are tokens of the chunk itself are not read.
    past_keys, past_values : Tensor, (at least batch, kv_heads, slots, head_dim)
        A ring of window entries, rotated as the chunk's own are; the band says which of its rows and slots are used.
    keys, values : Tensor, (batch, kv_heads, tokens, head_dim)
        Of the chunk itself.
    sets : SetColumns or None
        Pinned tokens that change within the chunk, beside those that do not.
    """

    pinned_keys: torch.Tensor
    pinned_values: torch.Tensor
    past_keys: torch.Tensor
    past_values: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    sets: SetColumns | None = None

    def window(self, band: Band, first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of window tokens `first` to `end` - 1, ``(batch, kv_heads, end - first, head_dim)``."""
        ring, pieces, rows = self.past_keys.shape[2], [], self._rows(band)
        oldest = band.start + band.length + min(first, 0)  # of what is asked of the past, its slot
        while first < min(end, 0):
            slot = oldest % ring
            count = min(min(end, 0) - first, ring - slot)
            past = slice(slot, slot + count)
            pieces.append((self.past_keys[rows, :, past], self.past_values[rows, :, past]))
            first, oldest = first + count, oldest + count
        if end > 0 or not pieces:
            own = slice(max(first, 0), max(end, first, 0))
            pieces.append((self.keys[:, :, own], self.values[:, :, own]))
        if len(pieces) == 1:
            return pieces[0]
        keys, values = zip(*pieces)
        return torch.cat(keys, 2), torch.cat(values, 2)

    def pinned(self, band: Band) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all pinned tokens, ``(batch, kv_heads, pinned, head_dim)``."""
        pinned = min(self.pinned_keys.shape[2], band.sinks)
        held = min(pinned, band.past)
        own = min(pinned - held, band.tokens)
        parts = ((self.pinned_keys, self.keys), (self.pinned_values, self.values))
        both = [torch.cat([p[self._rows(band), :, :held], new[:, :, :own]], 2) for p, new in parts]
        return both[0], both[1]

    def _rows(self, band: Band) -> slice:
        return slice(band.row, band.row + len(self.keys))
