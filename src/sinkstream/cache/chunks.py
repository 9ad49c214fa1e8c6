"""Chunks that cross prune events, in one exact forward.

A query must see exactly what it would see token by token. Between two prunes of a chunk the visible window differs and
the pinned frame lies elsewhere; so the pinned keys are offered once per segment, each copy rotated for its segment, and
a mask lets every query see the copy of its own segment and the window that was live at its time.
"""

from dataclasses import dataclass

import torch

from sinkstream.cache.ring import SoftRing
from sinkstream.policies import Step


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
    def of(cls, steps: list[Step], device: torch.device) -> "Segments | None":
        """Segments of a planned chunk, or None if no prune falls inside it (one at its first token is done before)."""
        if not any(s.drop for s in steps[1:]):
            return None
        inside = torch.tensor([0, *(s.drop for s in steps[1:])])
        starts = inside > 0
        dropped = torch.cat([torch.zeros(1, dtype=torch.int64), inside.cumsum(0)[starts]])
        return cls(starts.long().cumsum(0).to(device), dropped.to(device))

    @property
    def count(self) -> int:
        """Number of segments."""
        return len(self.dropped)


class CrossingChunk:
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
            dropped = ring.first_window + segments.dropped[1:] if pinned_yet else ring.sink + segments.dropped[1:]
            shift = dropped - ring.sink
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
        device, tokens = rows.device, len(rows)
        sink, first_window = ring.sink, max(ring.first_window, ring.sink)
        column = torch.arange(ring.live + tokens, device=device)
        index = column if ring.first_window == 0 else ring.first_window + column - ring.pinned
        oldest = (first_window + self.segments.dropped)[rows]
        now = ring.seen + torch.arange(tokens, device=device)
        window = (index >= oldest[:, None]) & (index <= now[:, None])
        is_sink = column < sink
        own_frame = (rows == 0) | torch.tensor(ring.original_positions, device=device)
        visible = torch.where(
            is_sink, own_frame[:, None] & (column <= ring.live + torch.arange(tokens, device=device)[:, None]), window
        )
        if not self.copies:
            return visible[None, None]
        segment = torch.arange(1, self.segments.count, device=device).repeat_interleave(sink)
        return torch.cat([rows[:, None] == segment, visible], dim=1)[None, None]
