"""Servers of one folder tell each other of themselves: each writes files there every other second."""

import logging
import os
import secrets
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sinkstream.records.files import WriteError, write_atomically

SECONDS = 2.0  # between two writes: so old what others tell may be
GONE_SECONDS = 5 * SECONDS  # a server that has written nothing for so long is gone
FORGOTTEN_SECONDS = 60 * SECONDS  # the files of a server that is gone for so long are deleted
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Heartbeat:
    """What a server has told.

    Attributes
    ----------
    name : str
        Of the server.
    text : str
    seconds : float
        How long ago it was told, by the clock of the folder.
    """

    name: str
    text: str
    seconds: float

    @property
    def gone(self) -> bool:
        """Whether the server has been silent for too long."""
        return self.seconds > GONE_SECONDS


class Heartbeats:
    """What this server and the others of a folder tell.

    Parameters
    ----------
    folder : Path
        Shared with the other servers.
    tell : callable
        ``tell(name)`` gives what this server tells the others, as texts by the ending of their files.

    Attributes
    ----------
    name : str
        Of this server, for the others.
    """

    def __init__(self, folder: Path, tell: Callable[[str], dict[str, str]]):
        self.name = secrets.token_hex(4)
        self._folder, self._tell = folder, tell
        self._ends, self._files = threading.Event(), threading.Lock()
        self._writer: threading.Thread | None = None

    def start(self) -> None:
        """Write now, and from now on."""
        self._write()
        self._writer = threading.Thread(target=self._write_on, name="sinkstream-heartbeats", daemon=True)
        self._writer.start()

    def stop(self) -> None:
        """Write no more; the others know nothing of this server any more."""
        self._ends.set()
        if self._writer is not None:
            self._writer.join()
        with self._files:
            for path in self._folder.glob(f"{self.name}.*"):
                path.unlink(missing_ok=True)

    def read(self, ending: str) -> list[Heartbeat]:
        """What all servers have told, this one first, which tells it now; also those that are gone, for a while."""
        found = [Heartbeat(self.name, self._write()[ending], 0.0)]
        try:
            now = self._path(ending).stat().st_mtime
        except OSError:  # nothing can be written there
            return found
        for path in sorted(self._folder.glob(f"*.{ending}")):
            if path == self._path(ending):
                continue
            with suppress(OSError):  # it has ended meanwhile
                seconds = max(0.0, now - path.stat().st_mtime)
                if seconds >= FORGOTTEN_SECONDS:
                    path.unlink()
                else:
                    found.append(Heartbeat(path.stem, path.read_text(encoding="utf-8"), seconds))
        return found

    # ---- files ----

    def _path(self, ending: str) -> Path:
        return self._folder / f"{self.name}.{ending}"

    def _write_on(self) -> None:
        while not self._ends.wait(SECONDS):
            self._write()

    def _write(self) -> dict[str, str]:
        """Write what is to be told now, but for a server that has ended; returns it."""
        texts = self._tell(self.name)
        with self._files:
            if self._ends.is_set():
                return texts
            for ending, text in texts.items():
                try:
                    write_atomically(self._path(ending), text)
                except WriteError as error:
                    log.warning("what this server tells the others could not be written: %s", error)
                    with suppress(OSError):  # what was written last is told again: a full disk is no silence
                        os.utime(self._path(ending))
        return texts
