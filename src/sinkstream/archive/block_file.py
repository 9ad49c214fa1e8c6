"""Blocks of one shape in a memory-mapped file of a fixed size; when it is full the oldest is overwritten."""

import os
import weakref
import zlib
from pathlib import Path

import numpy as np
import torch

from sinkstream.records.files import WriteError


class BlockFile:
    """The oldest blocks of an archive. The file is made when the first block comes, and deleted by `close`.

    Parameters
    ----------
    path : str or Path
        A file that does not exist yet.
    file_bytes : int
        The most that the file may take.

    Raises
    ------
    ValueError
        If there is such a file already.
    """

    def __init__(self, path: str | Path, file_bytes: int):
        self.path, self.file_bytes = Path(path), file_bytes
        if self.path.exists():
            raise ValueError(
                f"recall_file={str(path)!r} exists; accepted: the name of a file that does not, which is made and, when"
                " the stream ends, deleted"
            )
        self._map: np.ndarray | None = None
        self._checksums: list[int] = []
        self._written = 0

    def append(self, block: torch.Tensor) -> bool:
        """Write a block; returns whether the oldest one was overwritten. Raises WriteError if the disk is full."""
        data = block.contiguous().view(torch.uint8).flatten().numpy()
        if self._map is None:
            self._make(block, len(data))
        assert self._map is not None, "it was made"
        slot = self._written % len(self._map)
        full = self._written >= len(self._map)
        self._map[slot] = data
        self._checksums[slot] = zlib.crc32(data.data)
        self._written += 1
        return full

    def read(self, number: int) -> torch.Tensor:
        """The block of this number, 0 for the oldest held. Raises ValueError if it is not what was written."""
        assert self._map is not None, "something was written"
        oldest = max(0, self._written - len(self._map))
        slot = (oldest + number) % len(self._map)
        data = self._map[slot].copy() if self._whole() else None
        if data is None or zlib.crc32(data.data) != self._checksums[slot]:
            raise ValueError(
                f"the archive file {str(self.path)!r} is damaged: block {slot} is not what was written; nothing else is"
                " lost. Ways out: cache.reset(), or a cache without recall_file"
            )
        return torch.from_numpy(data).view(self._dtype).view(self._shape)

    def _whole(self) -> bool:
        """Whether the file has its size still: a read past its end would end the process."""
        assert self._map is not None, "it was made"
        return os.fstat(self._descriptor).st_size >= self._map.nbytes

    def _make(self, block: torch.Tensor, size: int) -> None:
        self._shape, self._dtype = block.shape, block.dtype
        slots = self.file_bytes // size
        if slots < 1:
            raise ValueError(f"recall_file_bytes={self.file_bytes} is less than a block; accepted: at least {size}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            self._finalizer = weakref.finalize(self, _delete, self.path, self._descriptor)
            os.posix_fallocate(self._descriptor, 0, slots * size)  # a full disk shows here, not at a later write
        except OSError as error:
            if hasattr(self, "_finalizer"):
                self._finalizer()
            message = f"could not make the archive file {self.path} ({slots * size:,} bytes): {error.strerror or error}"
            raise WriteError(error.errno, message) from error
        self._map = np.memmap(self.path, dtype=np.uint8, mode="r+", shape=(slots, size))
        self._checksums = [0] * slots

    def close(self) -> None:
        """Delete the file."""
        if self._map is not None:
            self._map = None
            self._finalizer()


def _delete(path: Path, descriptor: int) -> None:
    os.close(descriptor)
    path.unlink(missing_ok=True)
