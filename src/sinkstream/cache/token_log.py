"""`TokenLog`: ids of the latest tokens of a stream on the host, for recall."""

import copy
from array import array
from collections.abc import Sequence
from typing import Self

import torch


class TokenLog:
    """Ids of the latest tokens of a stream: those in the window, and a few more. They go to the host in batches."""

    def __init__(self) -> None:
        self.first, self._ids = 0, array("i")
        self._coming: list[torch.Tensor] = []
        self._count = 0

    @property
    def end(self) -> int:
        """Tokens appended since the beginning of the stream."""
        return self.first + len(self._ids) + self._count

    def append(self, ids: torch.Tensor | list[int]) -> None:
        """Take in new tokens, ``(tokens,)``; nothing waits for those of a tensor."""
        if isinstance(ids, list):
            self._arrive()
            self._ids.extend(ids)
            return
        self._coming.append(ids)
        self._count += len(ids)

    def read(self, first: int, end: int) -> Sequence[int]:
        """Ids of tokens; waits for those that are still on the device."""
        if end > self.first + len(self._ids):
            self._arrive()
        return self._ids[max(0, first - self.first) : end - self.first]

    def _arrive(self) -> None:
        if self._coming:
            self._ids.extend(torch.cat(self._coming).tolist())
            self._coming, self._count = [], 0

    def forget(self, before: int) -> None:
        """Tokens before this index are not asked for any more."""
        if before - self.first > 1_024:
            gone = min(before - self.first, len(self._ids))
            del self._ids[:gone]
            self.first += gone

    def load(self, first: int, ids: Sequence[int]) -> None:
        """Go on with the ids of another log, the first of which is token `first`."""
        self.first, self._ids = first, array("i", ids)

    def rewind(self, end: int) -> None:
        """Forget the latest tokens, from index `end` on."""
        self.read(self.first, self.end)
        del self._ids[end - self.first :]

    def fork(self) -> Self:
        """The same tokens, to go on independently."""
        other = copy.copy(self)
        other._ids, other._coming = self._ids[:], list(self._coming)
        return other
