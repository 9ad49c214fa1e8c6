"""Blocks of one shape in a memory-mapped file of a fixed size; a full file overwrites its oldest block."""

import errno
import math
import os
import shutil
import weakref
import zlib
from pathlib import Path
from typing import Self

import numpy as np
import torch

from sinkstream.records.files import WriteError


class BlockFile:
    """The oldest blocks of an archive, in a file that the constructor makes at its full size and `close` deletes.

    Parameters
    ----------
    path : str or Path
        A file that does not exist yet.
    file_bytes : int
        The most that the file may take.
    shape, dtype
        Of a block.

    Raises
    ------
    ValueError
        If there is such a file already, or no block fits.
    WriteError
        If the file cannot be made: the disk is full, there is no permission.
    """

    def __init__(self, path: str | Path, file_bytes: int, shape: tuple[int, ...], dtype: torch.dtype):
        self.path, self._shape, self._dtype = Path(path), shape, dtype
        size = math.prod(shape) * dtype.itemsize
        slots = self.check(path, file_bytes, shape, dtype)
        finalizer = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            finalizer = weakref.finalize(self, _delete, self.path, self._descriptor)
            os.posix_fallocate(self._descriptor, 0, slots * size)  # a full disk shows here, not at a later write
        except OSError as error:
            if finalizer is not None:
                finalizer()
            raise _not_made(self.path, slots * size, error.errno, error.strerror or str(error)) from error
        self._finalizer = finalizer
        self._map = np.memmap(self.path, dtype=np.uint8, mode="r+", shape=(slots, size))
        self._checksums = [0] * slots
        self._written = 0

    @staticmethod
    def check(path: str | Path, file_bytes: int, shape: tuple[int, ...], dtype: torch.dtype) -> int:
        """How many blocks such a file would hold; makes none. Raises as the constructor for what shows beforehand."""
        path, size = Path(path), math.prod(shape) * dtype.itemsize
        slots = file_bytes // size
        if path.exists():
            raise ValueError(
                f"recall_file={str(path)!r} exists; accepted: the name of a file that does not, which is made and, when"
                " the stream ends, deleted"
            )
        if slots < 1:
            raise ValueError(f"recall_file_bytes={file_bytes} is less than a block; accepted: at least {size}")
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        if not folder.is_dir():
            raise _not_made(path, slots * size, errno.ENOTDIR)
        if not os.access(folder, os.W_OK):
            raise _not_made(path, slots * size, errno.EACCES)
        if shutil.disk_usage(folder).free < slots * size:
            raise _not_made(path, slots * size, errno.ENOSPC)
        return slots

    @property
    def slots(self) -> int:
        """Number of blocks that fit the file."""
        return len(self._map)

    def append(self, block: torch.Tensor) -> bool:
        """Write a block; returns whether the oldest one was overwritten. Raises ValueError if the file was cut."""
        data = block.contiguous().view(torch.uint8).flatten().numpy()
        slot, full = self._written % len(self._map), self._written >= len(self._map)
        if not self._whole():
            raise self._damaged(slot)
        self._map[slot] = data
        self._checksums[slot] = zlib.crc32(data.data)
        self._written += 1
        return full

    def read(self, number: int, *, copy: bool = True) -> torch.Tensor:
        """The block of this number, 0 for the oldest held; without `copy` a view of the file.

        Raises ValueError if it is not what was written.
        """
        oldest = max(0, self._written - len(self._map))
        slot = (oldest + number) % len(self._map)
        data = self._map[slot] if self._whole() else None
        data = data.copy() if copy and data is not None else data
        if data is None or zlib.crc32(data.data) != self._checksums[slot]:
            raise self._damaged(slot)
        return torch.from_numpy(data).view(self._dtype).view(self._shape)

    def copy(self, path: str | Path) -> Self:
        """A file of its own with the same blocks. Raises as the constructor, and ValueError if this file was cut."""
        slots, size = self._map.shape
        if not self._whole():
            raise self._damaged(0)
        other = type(self)(path, slots * size, self._shape, self._dtype)
        held = min(self._written, slots)
        other._map[:held] = self._map[:held]
        other._checksums, other._written = list(self._checksums), self._written  # damage shows in either
        return other

    def close(self) -> None:
        """Delete the file."""
        self._finalizer()

    def _damaged(self, slot: int) -> ValueError:
        return ValueError(
            f"the archive file {str(self.path)!r} is damaged: block {slot} is not what was written; the stream"
            " cannot go on with it. Ways out: reset(), which makes a new file, or no recall_file"
        )

    def _whole(self) -> bool:
        """Whether the file has its size still: an access past its end would end the process."""
        return os.fstat(self._descriptor).st_size >= self._map.nbytes


def _not_made(path: Path, size: int, number: int | None, reason: str | None = None) -> WriteError:
    why = reason or os.strerror(number or 0)
    return WriteError(
        number,
        f"could not make the archive file {path} ({size:,} bytes): {why}; accepted: a smaller recall_file_bytes, or a"
        " recall_file elsewhere",
    )


def _delete(path: Path, descriptor: int) -> None:
    os.close(descriptor)
    path.unlink(missing_ok=True)
