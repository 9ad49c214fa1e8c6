"""`RowsForward`: one forward of rows that differ. Each row plans, prunes and counts as if it were alone."""

from dataclasses import replace
from typing import Any

import torch
from torch.nn.functional import pad as pad_zeros

from sinkstream.cache.attention import Forward, running, writing_mask
from sinkstream.cache.chunks import PinnedCopies, Segments
from sinkstream.cache.forward import PendingForward, attention_mask, check_entries, check_written
from sinkstream.cache.ring import SoftRing
from sinkstream.cache.rows import Rows, ring_of
from sinkstream.cache.stream import Stream


class RowForward(PendingForward):
    """The part of one row, whose entries `RowsForward` writes.

    Parameters
    ----------
    row : Stream
    pads : int
        Columns of the forward before the tokens of the row.
    tokens, input_ids, device
        As for `PendingForward`; without the pads.
    """

    def __init__(self, row: Stream, pads: int, tokens: int, input_ids: torch.Tensor | None, device: torch.device):
        self.pads = pads
        super().__init__(row, 1, tokens, input_ids, device)

    def _ring(self, batch: int, device: torch.device) -> SoftRing:
        return ring_of(self.stream)

    def _open(self, batch: int, device: torch.device) -> None:
        """Nothing yet: room is made for all rows at once, when each has pruned."""

    def open_row(self, rows: Rows) -> None:
        """Put the row where its new tokens follow; room has been made."""
        rows.place(self.stream, self.pads)
        self._observe_attention()
        crosses = self.stream.policy.plan_known and self.steps.drop[1:].any()
        self._crossing = PinnedCopies(self.ring, Segments.of(self.steps)) if crosses else None

    @property
    def copies(self) -> PinnedCopies | None:
        """How the row's chunk crosses prunes; None if it crosses none."""
        assert self._crossing is None or isinstance(self._crossing, PinnedCopies), "rows that differ cross by copies"
        return self._crossing

    @property
    def columns(self) -> int:
        """Keys that the row is shown: copies of pinned ones, what is cached, its new tokens."""
        return (self.copies.copies if self.copies else 0) + self.ring.live + self.tokens

    @property
    def first_position(self) -> int:
        """Position id of the column that the row's first token would have if its pads were tokens."""
        return self.ring.seen - self.ring.base - self.pads

    def read(self, logits: torch.Tensor | None) -> None:
        """What the policy reads of the logits ``(1, columns, vocab)`` of the row, where it does. Raises ValueError."""
        self._read(None if logits is None else logits[:, self.pads :])

    def count(self) -> None:
        """Take over the row's tokens."""
        self._count()


class RowsForward:
    """As `PendingForward`, for rows that differ.

    Parameters
    ----------
    stream : Rows
    own : list of int
        Tokens of each row, the last ones of its columns; the columns before them are pads.
    tokens : int
        Columns of the forward.
    input_ids : Tensor or None, (batch, tokens), int64
    device : torch.device
    """

    def __init__(self, stream: Rows, own: list[int], tokens: int, input_ids: torch.Tensor | None, device: torch.device):
        self.stream, self.tokens = stream, tokens
        self._layers_written = 0
        self.parts = {
            i: RowForward(
                stream.rows[i], tokens - n, n, None if input_ids is None else input_ids[i : i + 1, tokens - n :], device
            )
            for i, n in enumerate(own)
            if n
        }
        stream.make_room(tokens)
        # a row that goes on behind pads lies where the pads would be written
        self._covered = any(p.pads and p.ring.live for p in self.parts.values())
        for part in self.parts.values():
            part.open_row(stream)
        self._crossing = any(part.copies for part in self.parts.values())
        self.width = max(tokens, *(part.columns for part in self.parts.values()))
        end = stream.tail + tokens
        first = stream.tail if self._crossing else end - self.width
        buffers = (stream.keys, stream.values)
        self._new = [buffer[..., stream.tail : end, :].unbind(0) for buffer in buffers]
        self._visible = [buffer[..., first:end, :].unbind(0) for buffer in buffers]
        observed = any(part.stream.observer for part in self.parts.values())
        observer = RowsObserver(self.parts, self.width) if observed else None
        self._attention = Forward(observer, rows=stream.spec.streaming_rows)
        running.set(self._attention)
        self.positions = self._positions(len(own), device)
        self.mask = self._mask(len(own), device)

    def _positions(self, batch: int, device: torch.device) -> torch.Tensor:
        """``(batch, tokens)``, int64; 0 where a row has pads."""
        first = torch.zeros(batch, 1, dtype=torch.int64)
        for i, part in self.parts.items():
            first[i] = part.first_position
        return (first + torch.arange(self.tokens)).clamp_(min=0).to(device)

    def _mask(self, batch: int, device: torch.device) -> torch.Tensor | None:
        """``(batch, 1, tokens, width)``, or None where every row sees all columns, as a causal mask lets it.

        A pad sees the column of its own place only, so that its output is finite.
        """
        equal = len(self.parts) == batch and all(not p.pads and p.columns == self.width for p in self.parts.values())
        if equal and not self._crossing:
            return None
        column, place = torch.arange(self.width), torch.arange(self.width - self.tokens, self.width)[:, None]
        alone = column == place
        mask = alone.repeat(batch, 1, 1, 1)
        for i, part in self.parts.items():
            seen = mask[i, 0, part.pads :]
            if part.copies is None:
                seen.copy_((column <= place[part.pads :]) & (column >= self.width - part.columns))
            else:
                seen.zero_()
                seen[:, self.width - part.columns :] = part.copies.mask()[0, 0]
        return attention_mask(self.stream.spec, mask.to(device))

    def write_in_attention(self) -> torch.Tensor:
        """As `PendingForward.write_in_attention`."""
        running.set(replace(self._attention, write=self.write, mask=self.mask))
        return writing_mask(self.positions.device)

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new entries ``(batch, kv_heads, tokens, head_dim)`` of one layer; returns what the queries may see.

        Returns
        -------
        keys, values : Tensor, (batch, kv_heads, width, head_dim)
            The last columns are the new ones; `mask` says which of them a row sees.

        Raises
        ------
        ValueError
            If the model's dtype or device is not that of the buffers.
        """
        check_entries(self.stream.spec, keys, self.stream.keys.device, layer if self._layers_written else 0)
        self._layers_written += 1
        for new, given in zip(self._new, (keys.detach(), values.detach())):
            if not self._covered:
                new[layer].copy_(given)
                continue
            for i, part in self.parts.items():
                new[layer][i, :, part.pads :].copy_(given[i, :, part.pads :])
        if not self._crossing:
            return self._visible[0][layer], self._visible[1][layer]
        rows = [self._extended(layer, i) for i in range(len(keys))]
        return torch.cat([k for k, _ in rows]), torch.cat([v for _, v in rows])

    def _extended(self, layer: int, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What one row is shown where rows have copies of pinned keys; zeros before it, up to the width."""
        part, stream = self.parts.get(row), self.stream
        first = stream.tail if part is None else part.ring.start
        shown: Any = [
            buffer[layer, row : row + 1, :, first : stream.tail + self.tokens]
            for buffer in (stream.keys, stream.values)
        ]
        if part is not None and part.copies is not None:
            shown = part.copies.extend(layer, *shown)
        keys, values = (pad_zeros(t, (0, 0, self.width - t.shape[2], 0)) for t in shown)
        return keys, values

    def commit(self, logits: torch.Tensor | None) -> None:
        """The called model has returned: count the tokens of every row. As `PendingForward.commit`."""
        check_written(self.stream.spec, self._layers_written)
        for i, part in self.parts.items():
            part.read(None if logits is None else logits[i : i + 1])
        for part in self.parts.values():
            part.count()
        longest = max(self.parts.values(), key=lambda part: part.tokens)
        self.stream.appended(self.tokens, longest.steps)


class RowsObserver:
    """Shows every row's observer the row's part of queries and keys.

    Parameters
    ----------
    parts : dict of RowForward
        By row.
    width : int
        Columns of the keys.
    """

    def __init__(self, parts: dict[int, RowForward], width: int):
        self.parts, self.width = parts, width

    def see(self, layer: int, query: torch.Tensor, key: torch.Tensor, scaling: float) -> None:
        """As `AttentionObserver.see`, for all rows."""
        for i, part in self.parts.items():
            assert part.stream.observer is not None, "rows of one stream are observed or not"
            mine = slice(i, i + 1)
            part.stream.observer.see(
                layer, query[mine, :, part.pads :], key[mine, :, self.width - part.columns :], scaling
            )


def parted(stream: Stream, batch: int, own: list[int] | None, device: torch.device) -> Stream:
    """The stream for a forward: `Rows` if its rows differ, have pads (`own`) or are observed by the policy."""
    if isinstance(stream, Rows) and not stream.batch:
        stream = stream.start_over()
    if isinstance(stream, Rows) or (own is None and (batch == 1 or not stream.schedule.signals())):
        return stream
    if stream.recall is not None:
        raise ValueError("recall serves one row without pads; accepted: a batch of 1 without padding")
    if stream.spec.sliding:
        raise ValueError(
            f"rows that differ are not supported for {stream.spec.family} with sliding layers: left-padded batches, and"
            " batches under adaptive policies; accepted: rows of equal length without padding, or one row"
        )
    if not stream.batch:
        stream.allocate(batch, device)
    return Rows(stream)


def begun(
    stream: Stream,
    batch: int,
    tokens: int,
    input_ids: torch.Tensor | None,
    device: torch.device,
    own: list[int] | None,
) -> PendingForward | RowsForward:
    """A forward of a stream, begun; `own` as for `RowsForward`, None if no row has pads."""
    if isinstance(stream, Rows):
        return RowsForward(stream, own or [tokens] * batch, tokens, input_ids, device)
    return PendingForward(stream, batch, tokens, input_ids, device)
