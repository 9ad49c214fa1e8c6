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
from sinkstream.kernels.attention_prefill import attention_prefill
from sinkstream.kernels.band import Band, Columns
from sinkstream.policies import Steps


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
    def of(cls, steps: Steps) -> "Segments":
        """Segments of a planned chunk; a prune at its first token is done before."""
        inside = torch.from_numpy(steps.drop.copy())
        inside[0] = 0
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
    frame = (column < ring.frame) & (column <= ring.live + torch.arange(tokens)[:, None])
    return torch.where(column < ring.frame, frame, window)


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
        self.copies = 0 if ring.original_positions else (segments.count - 1) * ring.frame
        if self.copies:
            first = ring.frame_places() - ring.base
            pinned_yet = ring.first_window > 0
            dropped = segments.dropped[1:].to(ring.keys.device)
            shift = dropped + (ring.first_window - ring.pinned if pinned_yet else 0)
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
        if self.unpin is None:
            pinned = ring.pinned_keys[layer]
        else:
            pinned = ring.rope.unrotate(keys[:, :, : ring.sink], *ring.rope.of_layer(layer, self.unpin))
        angles = ring.rope.of_layer(layer, (self.cos, self.sin))
        copies = ring.rope.rotate(pinned.repeat(1, 1, times, 1), *angles).to(keys.dtype)
        return torch.cat([copies, keys], 2), torch.cat([values[:, :, : ring.frame].repeat(1, 1, times, 1), values], 2)

    def mask(self) -> torch.Tensor:
        """Which columns each query sees: ``(1, 1, tokens, copies + visible)``, bool."""
        ring, rows = self.ring, self.segments.of_row
        visible = visible_columns(ring, self.segments)
        if self.copies:
            visible[:, : ring.frame] &= (rows == 0)[:, None]
            segment = torch.arange(1, self.segments.count).repeat_interleave(ring.frame)
            visible = torch.cat([rows[:, None] == segment, visible], dim=1)
        return visible[None, None].to(ring.keys.device)


def unused_mask(device: torch.device) -> torch.Tensor:
    """What stands for a mask where attention itself knows who sees what: ``(1, 1, 1, 1)``, bool."""
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


class TwoFrames:
    """Attention of one chunk that crosses prunes: the window in its frame, the pinned keys in theirs.

    A query that comes after d dropped entries stands d positions nearer to the frame than where the chunk began, so
    turned back by d it meets the pinned keys as they were written then; no key moves.

    Parameters
    ----------
    ring : SoftRing
        After the prune at the chunk's first token, if there was one.
    steps : Steps
        Of the chunk's tokens.
    """

    def __init__(self, ring: SoftRing, steps: Steps):
        dropped = steps.drop.cumsum() - steps.drop[0]
        first = max(ring.first_window, ring.sink) + dropped - ring.seen
        self.cached, self.pinned = ring.live, min(ring.frame, ring.live + len(steps))
        still = ring.original_positions or ring.frame == 0
        self.device = device = ring.keys.device
        self.rope = ring.rope
        self.bands = {
            rope: Band(
                first,
                None if still else dropped,
                rope.frequencies(device),
                past=ring.seen,
                length=max(0, self.cached - self.pinned),
            )
            for rope in ring.rope.kinds
        }

    def mask(self) -> torch.Tensor:
        """In place of a mask, so that transformers makes none; `attend` knows who sees what."""
        return unused_mask(self.device)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Softmax attention of one layer.

        Parameters
        ----------
        layer : int
            Its row in the ring.
        query : Tensor, (batch, query_heads, tokens, head_dim)
            Rotated for the window.
        key, value : Tensor, (batch, kv_heads, visible, head_dim)

        Returns
        -------
        Tensor, (batch, tokens, query_heads, head_dim), in the dtype of `query`
        """
        pinned, past, own = slice(0, self.pinned), slice(self.pinned, self.cached), slice(self.cached, None)
        keys, values = ([part[:, :, which] for which in (pinned, past, own)] for part in (key, value))
        columns = Columns(keys[0], values[0], keys[1], values[1], keys[2], values[2])
        kernel = None if not query.requires_grad else "torch"  # gradients flow through the twin only
        wide, band = query.to(key.dtype), self.bands[self.rope.layer(layer)]  # under autocast dtypes differ
        return attention_prefill(wide, columns, band, scaling=scaling, implementation=kernel).to(query.dtype)
