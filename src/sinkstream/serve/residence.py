"""Which sessions hold a stream that is ready to decode: a fixed number of lanes, whose memory is taken at the start.

A session that is not in use gives its lane up when another one needs it; its stream is spilled, and comes back to any
lane.
"""

from collections.abc import Callable
from contextlib import suppress

from sinkstream.serve.errors import APIError, busy
from sinkstream.serve.files import SpillFull, damaged
from sinkstream.serve.lanes import Lane, Lanes
from sinkstream.serve.sessions import Session
from sinkstream.serve.spill import Spill

RETRY_SECONDS = 30


class Residence:
    """Lanes and who holds them. Used by the scheduler's thread only.

    Parameters
    ----------
    lanes : Lanes
    spill : Spill
    give_up : callable
        Deletes the session that is worth least and returns True, or returns False if there is none.
    each_turn : bool
        Whether a session is written to disk after each of its turns; its next one waits until it is.
    """

    def __init__(self, lanes: Lanes, spill: Spill, give_up: Callable[[set[str]], bool], each_turn: bool = False):
        self._each_turn = each_turn
        self.lanes, self.spill, self._give_up = lanes, spill, give_up
        self._held: dict[str, tuple[Session, Lane]] = {}  # least recently used first
        self._free: list[Lane] = list(lanes)
        self.busy: set[str] = set()
        self._unwritten: set[str] = set()  # resident sessions that went on since they were written to disk

    def acquire(self, session: Session, *, wait: bool = False) -> Lane | None:
        """The lane with a session's stream, for its only user; None if it must be waited for.

        With `wait` the disk is waited for here. In a shared folder the session is claimed until it is written; what
        another server has claimed or written meanwhile must be waited for, or looked up again.

        Raises
        ------
        APIError
            429 if nothing can be spilled; 409 if the session's file is damaged, or pins more than a lane has slots for.
        """
        if wait:
            self.spill.wait()
        if session.id in self.busy or not self.spill.written(session.id):
            return None
        files = self.spill.files
        if not files.claims.claim(session.id):
            return None
        lane = None
        try:
            lane = self._lane_of(session, wait) if files.current(session.id) else None
        finally:
            if lane is None:
                self.free(session)
        return lane

    def _lane_of(self, session: Session, wait: bool) -> Lane | None:
        assert session.sink is not None, "the number of pinned tokens is known"
        if session.sink > self.lanes.most_pinned:
            raise APIError(
                409,
                f"session {session.id!r} pins {session.sink} tokens, and this server has {self.lanes.most_pinned} slots"
                " for them; accepted: a new session, or a server with --pinned as before",
                code="session_pins_too_much",
            )
        spilled = session.counts["seen"] > 0 and session.id not in self._held
        if spilled and self.spill.where(session.id) is None:
            raise damaged(session.id)
        if spilled and not wait and not self.spill.ready(session.id):
            return None
        if session.id in self._held:
            lane = self._held.pop(session.id)[1]
        else:
            found = self._vacant(session.sink)
            if found is None:
                return None
            lane = found
            try:
                if spilled:
                    lane.undump(self.spill.get(session.id))
            except BaseException as error:
                lane.reset()
                self._free.append(lane)
                if isinstance(error, ValueError):  # a stream of another model, policy or cap
                    raise damaged(session.id) from error
                raise
        self.spill.changes(session.id)
        self._held[session.id] = session, lane
        self.busy.add(session.id)
        return lane

    def release(self, session: Session) -> None:
        """The session is not in use any more; it keeps its lane until another one needs it."""
        self.busy.discard(session.id)
        if session.id not in self._held:
            self.keep_known(session)
            return
        self._unwritten.add(session.id)
        if self._each_turn:
            self._write(session.id)

    def keep_known(self, session: Session) -> None:
        """Write a session that has no stream yet to a shared folder, so that the other servers know it."""
        files = self.spill.files
        if files.shared:
            with suppress(SpillFull):
                files.write(session, b"")

    def free(self, session: Session) -> None:
        """Let other servers go on with an idle session, unless its latest turn is not written yet."""
        spill, session_id = self.spill, session.id
        written = spill.written(session_id) and (spill.on_disk(session_id) or not session.counts["seen"])
        if written and session_id not in self.busy:
            spill.files.claims.free(session_id)

    def write_one(self) -> bool:
        """Write a resident session that is not in use to disk, where a killed server finds it; False if none is left.

        Its lane stays its own.
        """
        waiting = [i for i in self._held if i in self._unwritten and i not in self.busy]
        if not waiting or self.spill.files.folder is None:
            return False
        return self._write(waiting[0])

    def _write(self, session_id: str) -> bool:
        """Begin to write a resident session; False if the disk is full or behind."""
        session, lane = self._held[session_id]
        try:
            if not session.counts["seen"]:
                self.keep_known(session)
            elif not self.spill.write_soon(session, lane.dump()):
                return False
        except SpillFull:
            return False
        self._unwritten.discard(session_id)
        return True

    def drop(self, session_id: str) -> None:
        """Forget a session's stream, wherever it is."""
        self.busy.discard(session_id)
        self._clear(session_id)
        self.spill.drop(session_id)

    def replaced(self, session_id: str, deleted: bool) -> None:
        """Another server has gone on with a session, or deleted it."""
        self._clear(session_id)
        self.spill.replaced(session_id, deleted)

    def _clear(self, session_id: str) -> None:
        self._unwritten.discard(session_id)
        held = self._held.pop(session_id, None)
        if held is not None:
            held[1].reset()
            self._free.append(held[1])

    def where(self, session_id: str) -> str:
        """ "resident", "ram", "disk" or "new"."""
        return "resident" if session_id in self._held else self.spill.where(session_id) or "new"

    def dump(self, session: Session) -> bytes | None:
        """A copy of an idle session's stream; None if it has not begun."""
        if session.id in self._held:
            return self._held[session.id][1].dump()
        if not session.counts["seen"]:
            return None
        return self.spill.get(session.id) if self.spill.where(session.id) else None

    def spill_all(self) -> list[str]:
        """Spill every stream to disk; returns the ids of those for which there was no room."""
        left = []
        for session_id in list(self._held):
            self.busy.discard(session_id)
            try:
                self._spill(session_id)
            except SpillFull:
                left.append(session_id)
        return left + self.spill.to_disk()

    @property
    def resident(self) -> int:
        """Sessions that hold a lane."""
        return len(self._held)

    @property
    def bytes(self) -> int:
        """Memory of all lanes, in bytes."""
        return self.lanes.bytes

    # ---- lanes ----

    def _vacant(self, sink: int) -> Lane | None:
        """An empty lane for so many pinned tokens, which an idle session may have to give up."""
        if not self._free and not self._make_vacant():
            return None
        lane = min(self._free, key=lambda lane: lane.stream)  # neighbours are stepped together at the least cost
        self._free.remove(lane)
        lane.reset(sink)
        return lane

    def _make_vacant(self) -> bool:
        """Ensure that a lane is free; False if all sessions are in use."""
        idle = next((session_id for session_id in self._held if session_id not in self.busy), None)
        if idle is None:
            return False
        while True:
            try:
                self._spill(idle)
                return True
            except SpillFull:
                if not self._give_up(self.busy):
                    raise busy("no session can be spilled: RAM and disk are full", RETRY_SECONDS) from None
                if idle not in self._held:  # it was the one that was given up
                    return True

    def _spill(self, session_id: str) -> None:
        session, lane = self._held[session_id]
        if session.counts["seen"] and not (self.spill.ram_limit == 0 and self.spill.on_disk(session_id)):
            self.spill.put(session, lane.dump())
        del self._held[session_id]
        self._unwritten.discard(session_id)
        lane.reset()
        self._free.append(lane)
