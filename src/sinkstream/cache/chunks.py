"""Chunks that cross prune events, in one exact forward.

A query must see exactly what it would see token by token. Between two prunes of a chunk the visible window differs and
the pinned frame lies elsewhere. A mask lets every query see the window that was live at its time; for the frame there
are two ways. An attention function of the model's own gets the pinned keys once per segment, each copy rotated for its
segment (`PinnedCopies`). Our own attention function turns the query instead: its scores with the pinned keys come from
the query moved to where it stands in the frame, at the same cost for any number of prunes (`TwoFrames`).
"""

from dataclasses import dataclass

import torch

from sinkstream.cache.ring import SoftRing
from sinkstream.policies import Step

TILE = {"cpu": 64}  # queries that attend at once and share one stretch of the window, by kind of device
DEFAULT_TILE = 512  # fewer and larger tiles where launching a kernel costs more than what a tile computes for nothing


@dataclass(frozen=True)
class Segments:
    """The stretches of a chunk between two prunes; segment 0 sees the cache as it stands.

    Attributes
    ----------
    of_row : Tensor, (tokens,), int64
        Segment of every query.
    dropped : Tensor, (segments,), int64
        Entries dropped inside the chunk before each segment begins.
    """

    of_row: torch.Tensor
    dropped: torch.Tensor

    @classmethod
    def of(cls, steps: list[Step]) -> "Segments | None":
        """Segments of a planned chunk, or None if no prune falls inside it (one at its first token is done before)."""
        if not any(s.drop for s in steps[1:]):
            return None
        inside = torch.tensor([0, *(s.drop for s in steps[1:])])
        starts = inside > 0
        dropped = torch.cat([torch.zeros(1, dtype=torch.int64), inside.cumsum(0)[starts]])
        return cls(starts.long().cumsum(0), dropped)

    @property
    def count(self) -> int:
        """Number of segments."""
        return len(self.dropped)


def visible_columns(ring: SoftRing, segments: Segments) -> torch.Tensor:
    """Which entries of cache and chunk each query may see, the frame left aside: ``(tokens, visible)``, bool, host."""
    tokens = len(segments.of_row)
    column = torch.arange(ring.live + tokens)
    index = column if ring.first_window == 0 else ring.first_window + column - ring.pinned
    oldest = (max(ring.first_window, ring.sink) + segments.dropped)[segments.of_row]
    now = ring.seen + torch.arange(tokens)
    window = (index >= oldest[:, None]) & (index <= now[:, None])
    sinks = (column < ring.sink) & (column <= ring.live + torch.arange(tokens)[:, None])
    return torch.where(column < ring.sink, sinks, window)


class PinnedCopies:
    """Extra columns and the mask of one chunk that crosses prunes.

    Parameters
    ----------
    ring : SoftRing
        After the prune at the chunk's first token, if there was one.
    segments : Segments
    """

    def __init__(self, ring: SoftRing, segments: Segments):
        self.ring, self.segments = ring, segments
        self.copies = 0 if ring.original_positions else (segments.count - 1) * ring.sink
        if self.copies:
            first = torch.arange(ring.sink, device=ring.keys.device) - ring.base
            pinned_yet = ring.first_window > 0
            dropped = segments.dropped[1:].to(ring.keys.device)
            shift = dropped + (ring.first_window - ring.sink if pinned_yet else 0)
            self.cos, self.sin = ring.rope.angles((shift[:, None] + first).reshape(-1))
            self.unpin = None if pinned_yet else ring.rope.angles(first)

    def extend(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Put the pinned copies of the later segments before the visible cache.

        Parameters
        ----------
        keys, values : Tensor, (batch, kv_heads, visible, head_dim)

        Returns
        -------
        keys, values : Tensor, (batch, kv_heads, copies + visible, head_dim)
        """
        if not self.copies:
            return keys, values
        ring, times = self.ring, self.segments.count - 1
        pinned = (
            ring.pinned_keys[layer] if self.unpin is None else ring.rope.unrotate(keys[:, :, : ring.sink], *self.unpin)
        )
        copies = ring.rope.rotate(pinned.repeat(1, 1, times, 1), self.cos, self.sin).to(keys.dtype)
        return torch.cat([copies, keys], 2), torch.cat([values[:, :, : ring.sink].repeat(1, 1, times, 1), values], 2)

    def mask(self) -> torch.Tensor:
        """Which columns each query sees: ``(1, 1, tokens, copies + visible)``, bool."""
        ring, rows = self.ring, self.segments.of_row
        visible = visible_columns(ring, self.segments)
        if self.copies:
            visible[:, : ring.sink] &= (rows == 0)[:, None]
            segment = torch.arange(1, self.segments.count).repeat_interleave(ring.sink)
            visible = torch.cat([rows[:, None] == segment, visible], dim=1)
        return visible[None, None].to(ring.keys.device)


@dataclass(frozen=True)
class _Tile:
    """Queries ``rows`` of a chunk, the window columns that at least one of them sees, and what each does not see."""

    rows: slice
    window: slice
    hidden: torch.Tensor


class TwoFrames:
    """Attention of one chunk that crosses prunes: scores with the pinned keys in their frame, with the window in its.

    A query that comes after d dropped entries stands d positions nearer to the frame than where the chunk began, so
    turned back by d it meets the pinned keys as they were written then; no key moves.

    Parameters
    ----------
    ring : SoftRing
        After the prune at the chunk's first token, if there was one.
    segments : Segments
    """

    def __init__(self, ring: SoftRing, segments: Segments):
        self.rope, self.pinned = ring.rope, ring.sink
        device, dropped = ring.keys.device, segments.dropped[segments.of_row]
        still = ring.original_positions or ring.sink == 0
        self.turn = None if still else ring.rope.angles(dropped.to(device))
        self.visible, tokens = visible_columns(ring, segments), len(dropped)
        size = TILE.get(device.type, DEFAULT_TILE)
        self.tiles = [
            self._tile(first, rows, device) for first, rows in zip(range(0, tokens, size), self.visible.split(size))
        ]

    def _tile(self, first: int, visible: torch.Tensor, device: torch.device) -> _Tile:
        columns = visible[:, self.pinned :].any(0).nonzero()[:, 0] + self.pinned
        window = slice(int(columns[0]), int(columns[-1]) + 1) if len(columns) else slice(self.pinned, self.pinned)
        seen = torch.cat([visible[:, : self.pinned], visible[:, window]], dim=1)
        return _Tile(slice(first, first + len(visible)), window, ~seen.to(device))

    def mask(self) -> torch.Tensor:
        """Which columns each query sees: ``(1, 1, tokens, visible)``, bool, on the host; `attend` knows it already."""
        return self.visible[None, None]

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
        """Softmax attention in float32, tile by tile.

        Parameters
        ----------
        query : Tensor, (batch, query_heads, tokens, head_dim)
            Rotated for the window.
        key, value : Tensor, (batch, kv_heads, visible, head_dim)

        Returns
        -------
        Tensor, (batch, tokens, query_heads, head_dim), in the dtype of `query`
        """
        batch, heads, tokens, dim = query.shape
        out = query.new_empty(batch, tokens, heads, dim)
        window_query = query.float() * scaling
        pinned_query = window_query if self.turn is None else self.rope.unrotate(window_query, *self.turn)
        key, value = key.float(), value.float()
        for tile in self.tiles:
            size = tile.hidden.shape[0]
            both = [
                (q[:, :, tile.rows].reshape(batch, key.shape[1], -1, dim), k, v)
                for q, k, v in (
                    (pinned_query, key[:, :, : self.pinned], value[:, :, : self.pinned]),
                    (window_query, key[:, :, tile.window], value[:, :, tile.window]),
                )
            ]
            scores = torch.cat([q @ k.mT for q, k, _ in both], dim=-1).view(batch, heads, size, -1)
            weights = scores.masked_fill_(tile.hidden, float("-inf")).softmax(-1)
            weights = weights.view(batch, key.shape[1], -1, weights.shape[-1])
            seen = weights[..., : self.pinned] @ both[0][2] + weights[..., self.pinned :] @ both[1][2]
            out[:, tile.rows] = seen.view(batch, heads, size, dim).transpose(1, 2).to(query.dtype)
        return out
