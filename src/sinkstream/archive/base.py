"""The archive of one stream: tokens that left the window, in order, by position.

Two kinds behind one interface. A KV archive holds unrotated keys and values; a text archive holds token ids, and reads
them through the model again when they are wanted.
"""

from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Sequence
from typing import ClassVar, Self

import torch

from sinkstream.registry import Registry

ARCHIVES: Registry = Registry("archive")

Fetched = Callable[[], tuple[torch.Tensor, torch.Tensor]]  # keys and values, once they have arrived


class Archive(ABC):
    """Tokens ``first <= index < end`` of a stream; a full archive drops its oldest tokens.

    Attributes
    ----------
    first, end : int
        Which tokens of the stream are held.
    ids : array of int
        Their ids.
    """

    keeps_entries: ClassVar[bool] = True  # whether `append` reads keys and values

    def __init__(self, first: int):
        self.first = self.end = first
        self.lost = 0
        self.ids = array("i")

    def __len__(self) -> int:
        return self.end - self.first

    @property
    @abstractmethod
    def bytes(self) -> int:
        """Memory of the host and of the device, in bytes; a file is not counted."""

    @property
    def file_bytes(self) -> int:
        """Size in the file, in bytes."""
        return 0

    @abstractmethod
    def first_after(self, tokens: int) -> int:
        """`first` after `tokens` more tokens have been appended, in pieces of any size."""

    @abstractmethod
    def append(self, ids: Sequence[int], keys: torch.Tensor, values: torch.Tensor) -> None:
        """Archive the tokens that follow the latest one.

        Parameters
        ----------
        keys : Tensor, (layers, 1, kv_heads, tokens, head_dim), float32
            Not rotated.
        values : Tensor, the same shape, in the dtype of the model
        """

    @abstractmethod
    def read(
        self, indices: Sequence[int], device: torch.device, behind: Sequence[int] = ()
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of tokens, by their ascending indices in the stream, as `append` took them.

        Parameters
        ----------
        behind : sequence of int
            Ids of the text behind which a text archive reads them.

        Raises
        ------
        ValueError
            If a token is not held, or its file is damaged.
        """

    def fetch_bytes(self, tokens: int) -> int:
        """Bytes that a fetch of `tokens` tokens copies to the device."""
        return 0

    def fetch(self, indices: Sequence[int], device: torch.device, behind: Sequence[int] = ()) -> Fetched:
        """Start to read; the returned function waits and gives what `read` does. The archive may lose them then."""
        read = self.read(indices, device, behind)
        return lambda: read

    def blocks(self) -> list[torch.Tensor]:
        """What a file of the stream holds beside the ids, oldest first; views of the archive.

        Raises ValueError if the archive's own file is damaged.
        """
        return []

    @abstractmethod
    def refill(self, ids: Sequence[int], blocks: Sequence[torch.Tensor], device: torch.device) -> None:
        """Fill an empty archive with the ids and `blocks` of another one.

        Parameters
        ----------
        device : torch.device
            Of the tensors that are appended later.

        Raises
        ------
        ValueError
            If the budget is too small for them.
        """

    @abstractmethod
    def fork(self, file: str | None = None) -> Self:
        """An independent archive of the same tokens.

        Parameters
        ----------
        file : str or None
            Where this archive has a file: the name of the copy's file, which gets the same contents.

        Raises
        ------
        ValueError
            If the file is damaged, or there is one of the other name.
        WriteError
            If the other file cannot be made.
        """

    def close(self) -> None:  # noqa: B027  (memory goes by itself)
        """Release files."""

    def stats(self) -> dict[str, int]:
        """Tokens held, bytes in memory and in a file, tokens lost because the archive was full."""
        return {
            "archived": len(self),
            "archive_bytes": self.bytes,
            "archive_file_bytes": self.file_bytes,
            "archive_lost": self.lost,
        }

    def _lose(self, tokens: int) -> None:
        """The oldest tokens are gone."""
        self.first += tokens
        self.lost += tokens
        del self.ids[:tokens]

    def _too_large(self, tokens: int, budget: int) -> ValueError:
        return ValueError(
            f"an archive of {tokens:,} tokens does not fit recall_bytes={budget}; accepted: a larger recall_bytes, or a"
            " recall_file with recall_file_bytes (recall_archive='kv' only)"
        )

    def _check_held(self, indices: Sequence[int]) -> None:
        wrong = next((i for i in indices if not self.first <= i < self.end), None)
        if wrong is not None:
            raise ValueError(f"token {wrong} is not in the archive; accepted: {self.first} to {self.end - 1}")
