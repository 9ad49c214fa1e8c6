"""Claims: several servers on one folder of sessions, one of them at a time going on with a session."""

from pathlib import Path
from threading import Lock

from filelock import FileLock, Timeout


class Claims:
    """The sessions of a folder that this server goes on with; the claims of a server that dies end with it.

    Parameters
    ----------
    folder : Path or None
        Shared with other servers; None: all sessions are this server's own.
    """

    def __init__(self, folder: Path | None):
        self._folder, self._locks, self._guard = folder, dict[str, FileLock](), Lock()

    def claim(self, session_id: str) -> bool:
        """Whether this server may go on with a session; the others may not until it is freed."""
        with self._guard:
            if self._folder is None or session_id in self._locks:
                return True
            lock = FileLock(self._folder / f"{session_id}.lock", timeout=0, thread_local=False)
            try:
                lock.acquire()
            except Timeout:
                return False
            self._locks[session_id] = lock
            return True

    def holds(self, session_id: str) -> bool:
        """Whether this server has claimed a session."""
        with self._guard:
            return session_id in self._locks

    def free(self, session_id: str) -> None:
        """Let others go on with a session, if it was claimed."""
        with self._guard:
            lock = self._locks.pop(session_id, None)
            if lock is not None:
                lock.release()

    def end(self, session_id: str) -> None:
        """A session is deleted."""
        if self._folder is not None:
            (self._folder / f"{session_id}.lock").unlink(missing_ok=True)
        self.free(session_id)
