"""Spilled sessions: streams that are not ready to decode, in RAM or on disk, within limits.

The disk is written and read by a thread of its own, so that nobody who decodes waits for it.
"""

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from sinkstream.serve.files import SessionFiles, SpillFull
from sinkstream.serve.sessions import Session

PENDING_BYTES = 512 * 2**20  # of streams that wait to be written after a turn; a slower disk is written in idle times
log = logging.getLogger(__name__)


@dataclass
class SpillCounts:
    """How much is spilled."""

    ram: int
    ram_bytes: int
    disk: int
    disk_bytes: int


@dataclass
class Writing:
    """A stream that is being written."""

    session: Session
    data: bytes
    done: Future[None]
    size_before: int | None  # of the file that it replaces


class Spill:
    """Streams of idle sessions, least recently used ones on disk. Used by one thread.

    Parameters
    ----------
    files : SessionFiles
    ram_limit : int
        Most bytes in RAM, streams that are being written left out.
    settled : callable
        Called from the disk's thread whenever a stream was written or read, or could not be.
    """

    def __init__(self, files: SessionFiles, ram_limit: int, settled: Callable[[], None] = lambda: None):
        self.files, self.ram_limit, self._settled = files, ram_limit, settled
        self._ram: dict[str, tuple[Session, bytes]] = {}  # oldest first
        self._writing: dict[str, Writing] = {}
        self._reading: dict[str, Future[bytes]] = {}
        self._asked: set[str] = set()  # whether they are ready, since the latest `forget_unasked`
        self._current = set(files.sizes)  # whose file is what its stream is
        self._refused = False  # whether the disk refused the latest write
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="sinkstream-disk")

    # ---- where a stream is ----

    def where(self, session_id: str) -> str | None:
        """ "ram", "disk" or None."""
        self._settle()
        if session_id in self._ram:
            return "ram"
        return "disk" if session_id in self._writing or session_id in self.files.sizes else None

    def ready(self, session_id: str) -> bool:
        """Whether `get` has not to wait; if it would have to, the file is being read from now on."""
        self._settle()
        if session_id in self._ram or session_id in self._writing:
            return True
        self._asked.add(session_id)
        if session_id not in self._reading:
            self._reading[session_id] = self._disk.submit(lambda: self.files.read(session_id)[1])
            self._reading[session_id].add_done_callback(lambda _: self._settled())
        return self._reading[session_id].done()

    def forget_unasked(self) -> None:
        """Let go of what was read for requests that have ended: whoever waits for a file asks again in every round."""
        if self._reading:
            self._reading = {key: reading for key, reading in self._reading.items() if key in self._asked}
        self._asked.clear()

    def on_disk(self, session_id: str) -> bool:
        """Whether a session's file is what its stream is, or will be once it is written."""
        self._settle()
        return session_id in self._current

    def written(self, session_id: str) -> bool:
        """Whether nothing of a session is still being written."""
        self._settle()
        return session_id not in self._writing

    def get(self, session_id: str) -> bytes:
        """The bytes of a stream. Raises APIError if its file is damaged."""
        if session_id in self._ram:
            return self._ram[session_id][1]
        if session_id in self._writing:
            return self._writing[session_id].data
        reading = self._reading.pop(session_id, None)
        return reading.result() if reading is not None else self.files.read(session_id)[1]

    # ---- to RAM and to disk ----

    def put(self, session: Session, data: bytes) -> None:
        """Keep a stream. Raises SpillFull if there is room neither in RAM nor on disk; nothing is lost then."""
        self.make_room(len(data))
        if len(data) <= self.ram_limit:
            self._ram[session.id] = session, data
        elif session.id not in self._writing and session.id not in self._current:
            self._write(session, data)

    def make_room(self, size: int) -> None:
        """Move streams from RAM to disk until so many bytes fit into RAM. Raises SpillFull."""
        self._settle()
        while self._ram and self.ram_bytes + size > self.ram_limit:
            oldest = next(iter(self._ram))
            if oldest not in self._current and oldest not in self._writing:
                self._write(*self._ram[oldest])
            del self._ram[oldest]

    def write_soon(self, session: Session, data: bytes) -> bool:
        """Begin to write a stream that stays where it is; False if the disk is behind. Raises SpillFull."""
        self._settle()
        if not self.files.shared and sum(len(one.data) for one in self._writing.values()) + len(data) > max(
            PENDING_BYTES, len(data)
        ):
            return False
        self._write(session, data)
        return True

    def changes(self, session_id: str) -> None:
        """The stream goes on: it is not in RAM any more, and its file is what it was before the turn."""
        self._ram.pop(session_id, None)
        self._reading.pop(session_id, None)
        self._current.discard(session_id)

    def replaced(self, session_id: str, deleted: bool) -> None:
        """Another server has written a session's file, or deleted it: what is held of it here is out of date."""
        self.changes(session_id)
        if not deleted:
            self._current.add(session_id)

    def drop(self, session_id: str) -> None:
        """Forget a stream."""
        self.changes(session_id)
        if self._writing.pop(session_id, None) is None:
            self.files.delete(session_id)
        else:  # after it was written
            self.files.sizes.pop(session_id, None)
            self._disk.submit(self.files.delete, session_id)

    def to_disk(self) -> list[str]:
        """Write everything that is in RAM to disk, and wait; returns the ids for which there was no room."""
        self._settle()
        self._refused = False  # an earlier refusal must not cost a stream: each is written now or lost
        for session_id, (session, data) in list(self._ram.items()):
            with suppress(SpillFull):  # it stays in RAM then
                if session_id not in self._current and session_id not in self._writing:
                    self._write(session, data)
                del self._ram[session_id]
        self.wait()
        return list(self._ram)

    def wait(self) -> None:
        """Wait until everything is written, and what was dropped is deleted."""
        self._disk.submit(lambda: None).result()  # one thread: it comes last
        self._settle()

    # ---- how much ----

    @property
    def ram_bytes(self) -> int:
        """Bytes of the streams in RAM."""
        return sum(len(data) for _, data in list(self._ram.values()))

    def counts(self) -> SpillCounts:
        """How much is spilled; from any thread."""
        return SpillCounts(len(self._ram), self.ram_bytes, len(self.files.sizes), self.files.total)

    # ---- the thread of the disk ----

    def _write(self, session: Session, data: bytes) -> None:
        """Begin to write. Raises SpillFull where it is known beforehand that there is no room."""
        self.files.check_room(session.id, len(data))
        if self._refused:
            self._refused = False  # the next one tries again
            raise SpillFull
        record, earlier = session.record(), self._writing.get(session.id)
        if earlier is not None:
            earlier.done.exception()
        done = self._disk.submit(self.files.store, session.id, record, data)
        self._writing[session.id] = Writing(session, data, done, self.files.sizes.get(session.id))
        done.add_done_callback(lambda _: self._settled())
        self.files.sizes[session.id] = len(data)
        self._current.add(session.id)

    def _settle(self) -> None:
        """Take note of what was written, or could not be."""
        for session_id, one in list(self._writing.items()):
            if not one.done.done():
                continue
            del self._writing[session_id]
            if one.done.exception() is not None:
                log.warning("a session could not be written to disk: %s", one.done.exception())
                self._refused = True
                self.files.sizes.pop(session_id, None)
                if one.size_before is not None:
                    self.files.sizes[session_id] = one.size_before
                if session_id in self._current:  # it has not gone on since: nothing else may hold it
                    self._ram[session_id] = one.session, one.data
                self._current.discard(session_id)
