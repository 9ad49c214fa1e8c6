"""Text archive: token ids, whose keys and values a forward computes again when they come back."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Self

import torch

from sinkstream.archive.base import ARCHIVES, Archive, Fetched

BYTES = 4  # of an id
LOST_AT_ONCE = 1_024  # tokens, so that a full archive is not moved for every token

#: ids of a text -> unrotated keys (layers, 1, kv_heads, tokens, head_dim), float32, and values, in the model's dtype
Reread = Callable[[Sequence[int]], tuple[torch.Tensor, torch.Tensor]]


@ARCHIVES.register("text")
class TextArchive(Archive):
    """Token ids, 4 bytes each; tokens that come back are read through the model again, behind the sinks.

    The forward sees the sinks, a part of the present text if asked for, and the tokens that come back, but not the text
    around them when they left. So keys and values differ from those of the KV archive, and cost a forward.

    Parameters
    ----------
    first : int
        Index of the first token that can leave.
    sinks : sequence of int
        Ids of the sinks, which every text that is read again begins with.
    reread : callable
    budget_bytes : int
    """

    keeps_entries = False

    def __init__(self, first: int, *, sinks: Sequence[int], reread: Reread, budget_bytes: int):
        super().__init__(first)
        self.sinks, self.reread, self.budget_bytes = list(sinks), reread, budget_bytes

    @property
    def bytes(self) -> int:
        """Of the ids."""
        return len(self.ids) * BYTES

    def first_after(self, tokens: int) -> int:
        """As `Archive.first_after`."""
        most = self.budget_bytes // BYTES
        lost_at_once = min(LOST_AT_ONCE, most + 1)
        over = max(0, len(self.ids) + tokens - most)
        return self.first + -(-over // lost_at_once) * lost_at_once

    def append(self, ids: Sequence[int], keys: torch.Tensor, values: torch.Tensor) -> None:
        """As `Archive.append`; keys and values are ignored."""
        self.ids.extend(ids)
        self.end += len(ids)
        self._lose(self.first_after(0) - self.first)

    def read(
        self, indices: Sequence[int], device: torch.device, behind: Sequence[int] = ()
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Archive.read`, by one forward of the sinks, the text behind which they are read, and the tokens."""
        return self.fetch(indices, device, behind)()

    def fetch(self, indices: Sequence[int], device: torch.device, behind: Sequence[int] = ()) -> Fetched:
        """As `Archive.fetch`; the function that it returns runs the forward."""
        self._check_held(indices)
        front = [*self.sinks, *behind]
        return partial(self._read, front, [self.ids[index - self.first] for index in indices])

    def _read(self, front: list[int], ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.reread(front + ids)
        own = slice(len(front), None)
        return keys[..., own, :], values[..., own, :]

    def refill(self, ids: Sequence[int], blocks: Sequence[torch.Tensor], device: torch.device) -> None:
        """As `Archive.refill`."""
        if len(ids) * BYTES > self.budget_bytes:
            raise self._too_large(len(ids), self.budget_bytes)
        self.ids.extend(ids)
        self.end += len(ids)

    def fork(self, file: str | None = None) -> Self:
        """As `Archive.fork`."""
        other = copy.copy(self)
        other.ids = self.ids[:]
        return other
