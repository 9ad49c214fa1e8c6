"""Files of sessions: what is on disk, within a limit."""

import hashlib
import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sinkstream.records.files import WriteError, write_atomically
from sinkstream.records.json_files import parse_json
from sinkstream.serve.errors import APIError
from sinkstream.serve.sessions import Session
from sinkstream.serve.sharing import Claims

FORMAT = 1
DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError)  # raised where a file is not what was written
SESSION_KEY = re.compile(r"sess_[A-Za-z0-9_-]{1,64}")
Stamp = tuple[int, int, int]  # inode, time and size of a file: a file that was replaced has another one


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
    shared : bool
        Whether other servers write to the folder too.

    Raises
    ------
    ValueError
        If the folder cannot be made.

    Attributes
    ----------
    sizes : dict
        Bytes of the stream of each file.
    claims : Claims
    """

    def __init__(self, folder: Path | None, limit: int, shared: bool = False):
        self.folder, self.limit, self.shared = folder, limit, shared and folder is not None
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                os.chmod(folder, 0o700)
            except OSError as error:
                raise ValueError(
                    f"--spill {folder}: cannot be written: {error.strerror}; accepted: a folder that may be made, or"
                    " --no-spill"
                ) from None
        self.claims = Claims(folder if self.shared else None)
        self._stamps: dict[str, Stamp] = {}  # of the JSON files as this server has read or written them
        self.sizes = self._sizes()

    def lock(self) -> None:
        """Keep other servers from the folder as long as this process lives. Raises ValueError if one has it.

        What a server that was killed has left half-written there is deleted.
        """
        if self.folder is None:
            return
        self._lock = FileLock(self.folder / ".lock", timeout=0)
        try:
            self._lock.acquire()
        except Timeout:
            raise ValueError(
                f"the sessions of {self.folder} are in use by another server; accepted: another --spill FOLDER"
            ) from None
        self._delete_leftovers(self.folder)

    def _delete_leftovers(self, folder: Path) -> None:
        """Delete temporary files, and streams that no JSON names: it would have been written after them."""
        named: dict[str, str | None] = {}  # by session; None: its JSON is damaged, and may name any
        for path in folder.glob("*.json"):
            named[path.stem] = None
            with suppress(*DAMAGE):
                named[path.stem] = self._header(path.stem)["stream"]
        for path in folder.glob("*.*.safetensors"):
            key = path.name.split(".")[0]
            if key not in named or named[key] not in (None, path.name):
                path.unlink(missing_ok=True)
        for path in (*folder.glob(".sess_*.tmp"), *folder.glob(".saved_*.tmp")):
            path.unlink(missing_ok=True)
        self.sizes = self._sizes()

    @property
    def total(self) -> int:
        """Bytes of all streams."""
        return sum(list(self.sizes.values()))

    def write(self, session: Session, data: bytes, name: str | None = None) -> None:
        """Write a session; `name` is that of a saved copy. Raises SpillFull if it cannot be written."""
        key = name or session.id
        self.check_room(key, len(data))
        self.store(key, session.record(), data)
        self.sizes[key] = len(data)

    def check_room(self, key: str, size: int) -> None:
        """Raise SpillFull if so many bytes may not be written."""
        if self.folder is None or self.total - self.sizes.get(key, 0) + size > self.limit:
            raise SpillFull

    def store(self, key: str, record: dict[str, Any], data: bytes) -> None:
        """Write the files of a session, given its record; from any thread. Raises SpillFull if the disk refuses."""
        assert self.folder is not None, "room was checked"
        digest = _sha256(data)
        stream = self.folder / f"{key}.{digest[:16]}.safetensors"
        header = {"format": FORMAT, "sha256": digest, "stream": stream.name, "session": record}
        header["session_sha256"] = _record_sha256(record)
        try:
            write_atomically(stream, data)
            write_atomically(self.folder / f"{key}.json", json.dumps(header))
        except WriteError as error:
            raise SpillFull from error
        for old in self.folder.glob(f"{key}.*.safetensors"):
            if old != stream:
                old.unlink(missing_ok=True)
        if self.shared:
            self._stamps[key] = _stamp((self.folder / f"{key}.json").stat())
            self.claims.free(key)  # what is written others may go on with

    def read(self, key: str) -> tuple[Session, bytes]:
        """A session and the bytes of its stream. Raises APIError 409 if they are not what was written."""
        assert self.folder is not None, "what was written has a folder"
        try:
            header = self._header(key)
            data = (self.folder / header["stream"]).read_bytes()
            session = Session.of(header["session"])
            whole = header["format"] == FORMAT and header["sha256"] == _sha256(data)
        except DAMAGE:
            raise damaged(key) from None
        if not whole:
            raise damaged(key)
        return session, data

    def sessions(self) -> list[Session]:
        """All sessions that were spilled, saved copies left out; damaged files are left where they are."""
        found = []
        for path in sorted(self.folder.glob("sess_*.json")) if self.folder else []:
            with suppress(*DAMAGE):
                found.append(Session.of(self._header(path.stem)["session"]))
        return found

    def damaged(self, key: str) -> bool:
        """Whether there is a session of this id whose JSON is not what was written."""
        if self.folder is None or not SESSION_KEY.fullmatch(key) or not (self.folder / f"{key}.json").is_file():
            return False
        try:
            Session.of(self._header(key)["session"])
        except DAMAGE:
            return True
        return False

    def _header(self, key: str) -> dict[str, Any]:
        """The JSON of a session. Raises an exception of `DAMAGE` where it is not what was written."""
        assert self.folder is not None, "what was written has a folder"
        header = parse_json((self.folder / f"{key}.json").read_text(encoding="utf-8"))
        known = _record_sha256(header["session"])
        if header.get("session_sha256", known) != known:  # files of before 2026-11-27, 16:00 UTC have none
            raise ValueError(key)
        return header

    def delete(self, key: str) -> None:
        """Delete a session's files, if there are any."""
        self.sizes.pop(key, None)
        self._stamps.pop(key, None)
        if self.folder is None:
            return
        (self.folder / f"{key}.json").unlink(missing_ok=True)
        for path in self.folder.glob(f"{key}.*.safetensors"):
            path.unlink(missing_ok=True)
        self.claims.end(key)

    # ---- what other servers do in the folder ----

    def current(self, key: str) -> bool:
        """Whether a session's file is the one that this server knows; always so in a folder of its own."""
        if not self.shared or self.folder is None:
            return True
        try:
            found = _stamp((self.folder / f"{key}.json").stat())
        except OSError:
            found = None
        return found == self._stamps.get(key)

    def changes(self) -> tuple[list[Session], list[str]]:
        """Sessions that other servers have written since the last time, and the ids of those that they have deleted."""
        if not self.shared or self.folder is None:
            return [], []
        known = list(self._stamps)  # before the folder is listed: the thread of the disk writes sessions meanwhile
        found: dict[str, Stamp] = {}
        for entry in os.scandir(self.folder):
            if entry.name.endswith(".json"):
                with suppress(OSError):  # deleted meanwhile
                    found[entry.name.removesuffix(".json")] = _stamp(entry.stat())
        gone = [key for key in known if key not in found and not self.claims.holds(key)]
        for key in gone:
            self._stamps.pop(key, None)
            self.sizes.pop(key, None)
        written = []
        for key, stamp in found.items():
            if self._stamps.get(key) == stamp or self.claims.holds(key):
                continue
            self._stamps[key] = stamp
            with suppress(*DAMAGE):
                header = self._header(key)
                self.sizes[key] = (self.folder / header["stream"]).stat().st_size
                written += [Session.of(header["session"])] if key.startswith("sess_") else []
        return written, [key for key in gone if key.startswith("sess_")]

    def _sizes(self) -> dict[str, int]:
        """Bytes of the streams that lie in the folder beside their JSON, by session."""
        found = [] if self.folder is None else self.folder.glob("*.*.safetensors")
        return {
            path.with_suffix("").stem: path.stat().st_size
            for path in found
            if path.with_suffix("").with_suffix(".json").exists()
        }


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _record_sha256(record: dict[str, Any]) -> str:
    return _sha256(json.dumps(record, sort_keys=True).encode())


def _stamp(stat: os.stat_result) -> Stamp:
    return stat.st_ino, stat.st_mtime_ns, stat.st_size
