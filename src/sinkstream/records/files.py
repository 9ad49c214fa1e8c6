"""Writing files so that a reader sees the old file or the new one, never half of one."""

import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


class WriteError(OSError):
    """A file could not be written; the message says where, and how many bytes were wanted."""


_UMASK = threading.Lock()  # a thread that read the umask while another one has set it to 0 would keep it at 0


def write_atomically(path: Path | str, content: bytes | str) -> Path:
    """Write `content` (text: as UTF-8) to `path` as `replaced_file` does."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    with replaced_file(path, len(data)) as file:
        file.write(data)
    return Path(path)


@contextmanager
def replaced_file(path: Path | str, size: int) -> Iterator[BinaryIO]:
    """A binary file that takes the place of `path` once it is whole: a temporary file beside it, fsync and rename.

    The folder is created if need be. `size` is about how many bytes will be written, for the error message.

    Raises WriteError: disk full, no permission, or any other OSError. Nothing is left behind, and an older file stays
    as it was.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        message = f"could not write {path} ({size:,} bytes): {error.strerror or error}; nothing was left behind"
        raise WriteError(error.errno, message) from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


def _umask() -> int:
    """The process's umask; mkstemp ignores it, and a record must be as readable as any other file."""
    with _UMASK:
        mask = os.umask(0)
        os.umask(mask)
    return mask
