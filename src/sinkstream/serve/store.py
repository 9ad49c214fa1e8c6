"""All sessions of a server: whose they are, how a request finds its own, and which is given up first."""

import re
import time
from collections.abc import Callable, Sequence

from sinkstream.serve.errors import APIError, busy, invalid, not_found
from sinkstream.serve.files import damaged
from sinkstream.serve.residence import RETRY_SECONDS
from sinkstream.serve.sessions import Session, Turn
from sinkstream.serve.spill import Spill

SAVED_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


class SessionStore:
    """Sessions by id.

    Parameters
    ----------
    limit : int
        Most sessions.
    idle_seconds : float
        After so long a session is deleted, unless its client knows it by id.
    spill : Spill
    replaced : callable
        Told the id of a session that another server has written to a shared folder, and whether it was deleted there.
    """

    def __init__(self, limit: int, idle_seconds: float, spill: Spill, replaced: Callable[[str, bool], None]):
        self.limit, self.idle_seconds, self.spill, self._replaced = limit, idle_seconds, spill, replaced
        files = spill.files
        self.sessions: dict[str, Session] = {
            s.id: s for s in (files.changes()[0] if files.shared else files.sessions())
        }

    def sync(self) -> None:
        """Take note of what other servers have done in a shared folder."""
        written, deleted = self.spill.files.changes()
        for session in written:
            self._replaced(session.id, False)
            self.sessions[session.id] = session
        for session_id in deleted:
            self._replaced(session_id, True)
            self.sessions.pop(session_id, None)

    def get(self, owner: str, session_id: str) -> Session:
        """A session of this owner. Raises APIError 404 for any other id, and 409 where its file is damaged."""
        self.sync()
        session = self.sessions.get(session_id)
        if session is None and self.spill.files.damaged(session_id):  # whose it was is not known; the id is a secret
            raise damaged(session_id)
        if session is None or session.owner != owner:
            raise not_found("session", session_id)
        return session

    def of(self, owner: str) -> list[Session]:
        """The sessions that an owner knows by their ids, the latest first."""
        self.sync()
        mine = [s for s in self.sessions.values() if s.owner == owner and s.found_by == "id"]
        return sorted(mine, key=lambda s: -s.used)

    def find(
        self, owner: str, digests: Sequence[str], busy_ids: set[str], found_by: str = "messages"
    ) -> Session | None:
        """The idle session that holds most of a conversation, given the digests of its first 0, 1, … messages.

        A session that goes on is preferred to one whose last turn is asked again or changed; one of responses only goes
        on, since a turn of it has its own id. One with nothing but its system prompt in common stays as it is.
        """
        self.sync()
        known = digests if found_by == "messages" else digests[:-1]
        place = {digest: i for i, digest in enumerate(known)}
        best, longest = None, 0
        for session in self.sessions.values():
            if session.owner != owner or session.found_by != found_by or session.id in busy_ids or not session.digest:
                continue
            found = 2 * place.get(session.digest, 0)
            if session.turns and found_by == "messages":
                last = session.turns[-1]
                again = place.get(last.asked, 0)
                changed = place.get(last.before, 0) if last.previous else 0
                found = max(found, 2 * max(again, changed) - 1)
            if found > longest:
                best, longest = session, found
        return best

    def by_response(self, owner: str, response: str) -> tuple[Session, Turn | None]:
        """The session that wrote a response, and the turn that came after it, if one did.

        Raises
        ------
        APIError
            404 if there is none, or the stream no longer holds the turn after it.
        """
        self.sync()
        for session in self.sessions.values():
            if session.owner == owner and session.found_by != "messages":  # those are not kept for their responses
                if session.response == response:
                    return session, None
                for turn in session.turns:
                    if turn.response == response:
                        return session, turn
        raise not_found("previous response", response)

    def add(self, session: Session, busy_ids: set[str], drop) -> None:
        """Add a session; another one is given up if there are too many. Raises APIError 429 if none can be."""
        if session.id not in self.sessions and len(self.sessions) >= self.limit:
            least = self.least(busy_ids)
            if least is None:
                raise busy(f"there are {len(self.sessions)} sessions, the most that are accepted", RETRY_SECONDS)
            drop(least)
        self.sessions[session.id] = session

    def least(self, busy_ids: set[str]) -> Session | None:
        """The idle session that is given up first: its client sends everything again, or else may have left."""
        idle = [s for s in self.sessions.values() if s.found_by != "id" and s.id not in busy_ids]
        idle.sort(key=lambda s: (s.found_by == "response", s.used))
        return next((s for s in idle if self.claimed(s)), None)

    def expired(self, busy_ids: set[str]) -> list[Session]:
        """Sessions that nobody has come back to for long; those that a client knows by id stay."""
        past, idle = time.time() - self.idle_seconds, (s for s in self.sessions.values() if s.id not in busy_ids)
        return [s for s in idle if s.found_by != "id" and s.used < past and self.claimed(s)]

    def claimed(self, session: Session) -> bool:
        """Whether this server may go on with a session as it knows it, or delete it; the others may not then."""
        files = self.spill.files
        held = files.claims.holds(session.id)
        if not files.claims.claim(session.id):
            return False
        if files.current(session.id):
            return True
        if not held:
            files.claims.free(session.id)
        return False

    # ---- saved copies ----

    def saved_key(self, owner: str, name: str) -> str:
        """File name of a saved copy. Raises APIError for a name that is not accepted."""
        if not SAVED_NAME.fullmatch(name):
            raise invalid(
                f"name={name!r} is not accepted; accepted: 1 to 64 letters, digits, - and _, a letter or digit first",
                "name",
            )
        return f"saved_{owner[:16]}_{name}"

    def saved(self, owner: str) -> list[str]:
        """Names of an owner's saved copies."""
        self.sync()
        prefix = f"saved_{owner[:16]}_"
        return sorted(key.removeprefix(prefix) for key in self.spill.files.sizes if key.startswith(prefix))

    def load(self, owner: str, name: str) -> tuple[Session, bytes]:
        """A saved copy. Raises APIError 404 if there is none."""
        self.sync()
        key = self.saved_key(owner, name)
        if key not in self.spill.files.sizes:
            raise not_found("saved session", name)
        session, data = self.spill.files.read(key)
        if session.owner != owner:
            raise APIError(404, f"saved session {name!r} is not known", code="saved_session_not_found")
        return session, data
