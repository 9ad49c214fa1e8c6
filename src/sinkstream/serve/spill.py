"""Spilled sessions: streams that are not ready to decode, in RAM or on disk, within limits."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from sinkstream.records.files import WriteError, write_atomically
from sinkstream.serve.errors import APIError
from sinkstream.serve.sessions import Session

FORMAT = 1


class SpillFull(Exception):
    """There is no room for one more spilled session."""


def damaged(session_id: str) -> APIError:
    """A 409: the file of a session cannot be read."""
    return APIError(
        409,
        f"the file of session {session_id!r} is damaged or was written with another model or policy; delete it and"
        " begin a new session",
        code="session_damaged",
    )


class SessionFiles:
    """Two files a session: its stream (a snapshot), named by its hash, and JSON, which is written last and names it.

    Parameters
    ----------
    folder : Path or None
        Made if need be, for its owner only; None: nothing can be written.
    limit : int
        Most bytes of all streams.
    """

    def __init__(self, folder: Path | None, limit: int):
        self.folder, self.limit = folder, limit
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            os.chmod(folder, 0o700)
        self.sizes = {path.stem: size for path, size in self._streams().items()}

    def lock(self) -> None:
        """Keep other servers from the folder as long as this process lives. Raises ValueError if one has it."""
        if self.folder is None:
            return
        self._lock = FileLock(self.folder / ".lock", timeout=0)
        try:
            self._lock.acquire()
        except Timeout:
            raise ValueError(
                f"the sessions of {self.folder} are in use by another server; accepted: another --spill FOLDER"
            ) from None

    @property
    def total(self) -> int:
        """Bytes of all streams."""
        return sum(self.sizes.values())

    def write(self, session: Session, data: bytes, name: str | None = None) -> None:
        """Write a session; `name` is that of a saved copy. Raises SpillFull if it cannot be written."""
        if self.folder is None or self.total - self.sizes.get(name or session.id, 0) + len(data) > self.limit:
            raise SpillFull
        key, digest = name or session.id, hashlib.sha256(data).hexdigest()
        stream = self.folder / f"{key}.{digest[:16]}.safetensors"
        header = {"format": FORMAT, "sha256": digest, "stream": stream.name, "session": session.record()}
        try:
            write_atomically(stream, data)
            write_atomically(self.folder / f"{key}.json", json.dumps(header))
        except WriteError as error:
            raise SpillFull from error
        for old in self.folder.glob(f"{key}.*.safetensors"):
            if old != stream:
                old.unlink(missing_ok=True)
        self.sizes[key] = len(data)

    def read(self, key: str) -> tuple[Session, bytes]:
        """A session and the bytes of its stream. Raises APIError 409 if they are not what was written."""
        assert self.folder is not None, "what was written has a folder"
        try:
            header = json.loads((self.folder / f"{key}.json").read_text(encoding="utf-8"))
            data = (self.folder / header["stream"]).read_bytes()
            session = Session.of(header["session"])
        except (OSError, ValueError, KeyError, TypeError):
            raise damaged(key) from None
        if header["format"] != FORMAT or hashlib.sha256(data).hexdigest() != header["sha256"]:
            raise damaged(key)
        return session, data

    def sessions(self) -> list[Session]:
        """All sessions that were spilled, saved copies left out; damaged files are left where they are."""
        found = []
        for path in sorted(self.folder.glob("sess_*.json")) if self.folder else []:
            try:
                found.append(Session.of(json.loads(path.read_text(encoding="utf-8"))["session"]))
            except (OSError, ValueError, KeyError, TypeError):
                continue
        return found

    def delete(self, key: str) -> None:
        """Delete a session's files, if there are any."""
        if self.sizes.pop(key, None) is None or self.folder is None:
            return
        (self.folder / f"{key}.json").unlink(missing_ok=True)
        for path in self.folder.glob(f"{key}.*.safetensors"):
            path.unlink(missing_ok=True)

    def _streams(self) -> dict[Path, int]:
        if self.folder is None:
            return {}
        return {
            path.with_suffix("").with_suffix(".json"): path.stat().st_size
            for path in self.folder.glob("*.*.safetensors")
            if path.with_suffix("").with_suffix(".json").exists()
        }


@dataclass
class SpillCounts:
    """How much is spilled."""

    ram: int
    ram_bytes: int
    disk: int
    disk_bytes: int


class Spill:
    """Streams of idle sessions, least recently used ones on disk.

    Parameters
    ----------
    files : SessionFiles
    ram_limit : int
        Most bytes in RAM.
    """

    def __init__(self, files: SessionFiles, ram_limit: int):
        self.files, self.ram_limit = files, ram_limit
        self._ram: dict[str, tuple[Session, bytes]] = {}  # oldest first

    def where(self, session_id: str) -> str | None:
        """ "ram", "disk" or None."""
        return "ram" if session_id in self._ram else "disk" if session_id in self.files.sizes else None

    def put(self, session: Session, data: bytes) -> None:
        """Keep a stream. Raises SpillFull if there is room neither in RAM nor on disk; nothing is lost then."""
        self.make_room(len(data))
        if len(data) <= self.ram_limit:
            self._ram[session.id] = session, data
        else:
            self.files.write(session, data)

    def make_room(self, size: int) -> None:
        """Move streams from RAM to disk until so many bytes fit into RAM. Raises SpillFull."""
        while self._ram and self.ram_bytes + size > self.ram_limit:
            oldest = next(iter(self._ram))
            session, data = self._ram[oldest]
            self.files.write(session, data)
            del self._ram[oldest]

    def get(self, session_id: str) -> bytes:
        """The bytes of a stream. Raises APIError if its file is damaged."""
        return self._ram[session_id][1] if session_id in self._ram else self.files.read(session_id)[1]

    def forget_ram(self, session_id: str) -> None:
        """The stream is resident again; a copy on disk stays, for a server that is killed."""
        self._ram.pop(session_id, None)

    def drop(self, session_id: str) -> None:
        """Forget a stream."""
        self._ram.pop(session_id, None)
        self.files.delete(session_id)

    def to_disk(self) -> list[str]:
        """Write everything that is in RAM to disk; returns the ids for which there was no room."""
        left = []
        for session_id, (session, data) in list(self._ram.items()):
            try:
                self.files.write(session, data)
                del self._ram[session_id]
            except SpillFull:
                left.append(session_id)
        return left

    @property
    def ram_bytes(self) -> int:
        """Bytes of the streams in RAM."""
        return sum(len(data) for _, data in self._ram.values())

    def counts(self) -> SpillCounts:
        """How much is spilled."""
        return SpillCounts(len(self._ram), self.ram_bytes, len(self.files.sizes), self.files.total)
