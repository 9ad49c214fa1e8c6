"""Which session a request belongs to, and what of it is new: found, taken back, and turned into text to feed."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from sinkstream.serve.errors import APIError, busy, invalid
from sinkstream.serve.files import SpillFull
from sinkstream.serve.lanes import LEAST_SINK, Lane
from sinkstream.serve.pinning import Pinning
from sinkstream.serve.recall import Recall
from sinkstream.serve.reply import ReplyOptions
from sinkstream.serve.residence import RETRY_SECONDS, Residence
from sinkstream.serve.sessions import ForgottenTurn, Session, Turn, digests_of, new_id, split_head
from sinkstream.serve.settings import ServeSettings
from sinkstream.serve.store import SessionStore
from sinkstream.serve.template import ChatTemplate, Message, Piece

log = logging.getLogger(__name__)
LOST = ("session_damaged", "session_pins_too_much")  # a stream that this server cannot go on with


class LostSession(Exception):
    """The stream of a session that was found by what its client has sent is lost."""

    def __init__(self, session: Session, error: APIError):
        super().__init__(error.message)
        self.session, self.error = session, error


@dataclass(frozen=True)
class Call:
    """What a request asks for.

    Attributes
    ----------
    messages : tuple of Message
        A chat: all of the conversation, or what is new in a session that is named.
    prompt : str, tuple of int or None
        A completion instead of a chat.
    reply : ReplyOptions or None
        None: the messages are fed and nothing is written.
    begins : str
        Text that the reply has to begin with: the beginning of a call of a tool.
    pin : str
        Text to be pinned in a session, instead of everything else.
    """

    owner: str
    messages: tuple[Message, ...] = ()
    tools: list | None = None
    prompt: str | tuple[int, ...] | None = None
    session: str | None = None
    previous: str | None = None
    response: str = field(default_factory=lambda: new_id("resp"))
    keep: bool = True
    found_by: str = "messages"
    reply: ReplyOptions | None = None
    begins: str = ""
    pin: str = ""


@dataclass
class Plan:
    """How a call goes on with its session: what is taken back, then what is fed; and what was recalled for it."""

    session: Session
    lane: Lane
    pieces: list[Piece]
    opening: str | None = None
    new: list[Message] = field(default_factory=list)
    recalled: list[ForgottenTurn] = field(default_factory=list)
    pinning: Pinning | None = None


class Planner:
    """Finds the sessions of calls; used by the scheduler's thread only.

    Parameters
    ----------
    template : ChatTemplate
    settings : ServeSettings
    store : SessionStore
    residence : Residence
    evicted : callable
        Told how many tokens were evicted.
    """

    def __init__(
        self,
        template: ChatTemplate,
        settings: ServeSettings,
        store: SessionStore,
        residence: Residence,
        evicted: Callable[[int], None],
    ):
        self.template, self.settings = template, settings
        self.store, self.residence, self.evicted = store, residence, evicted
        self.recall = Recall(template.tokenizer, settings.recalled) if settings.recalled else None

    def forget(self, session: Session) -> None:
        """Delete a session."""
        self.residence.drop(session.id)
        self.store.sessions.pop(session.id, None)
        self.forget_index(session.id)

    def forget_index(self, session_id: str) -> None:
        """Forget what recall remembers of a session, beside the session itself."""
        if self.recall is not None:
            self.recall.forget(session_id)

    def counts(self, session: Session, lane: Lane, *, written: bool = False) -> None:
        """Note what a session's stream holds now; `written`: the last turn is complete."""
        counts, before = lane.counts(), session.counts["evicted"]
        kept, gone = counts["kept"], counts["evicted"] + session.evicted_before
        session.counts = {"seen": counts["seen"] + session.evicted_before, "kept": kept, "evicted": gone}
        if counts["evicted"]:
            self.archive_evicted(session, lane.oldest, written=written)
        self.evicted(max(0, gone - before))

    def archive_evicted(self, session: Session, oldest: float, *, written: bool) -> None:
        """Keep the turns that begin before a token of the stream, as far as they may be recalled."""
        session.forget_evicted(oldest, self.settings.recalled, self.settings.recall_tokens, written=written)

    # ---- which session, and what is new ----

    def plan(self, call: Call, branch: list[tuple[Session, Turn]]) -> Plan | None:
        """The session with its lane and what is to be fed; None if another request has to end first.

        A copy of a session that had to be made is kept in `branch`.
        """
        if call.prompt is not None:
            return self._plan_prompt(call)
        if call.pin:
            return self._plan_pin(call)
        while True:
            try:
                return self._plan_chat(call, branch)
            except LostSession as lost:
                log.warning("%s; its client sends the whole conversation, which begins anew", lost.error.message)
                if not self.store.claimed(lost.session):
                    return None
                self.forget(lost.session)

    def _plan_chat(self, call: Call, branch: list[tuple[Session, Turn]]) -> Plan | None:
        messages, replies = list(call.messages), call.reply is not None
        digests = digests_of(messages, call.tools)
        session, turn = branch[0] if branch else self._find(call, digests)
        if session is not None and session.sink is not None and call.tools and call.tools != session.tools:
            raise invalid(
                "tools differ from those of the session, which are pinned; accepted: the same, none, or a new session",
                "tools",
            )
        if turn is not None and not branch and session is not None:
            if not self.store.claimed(session):
                return None
            branch.append(self._branch(session, turn))
            self.residence.free(session)
            session, turn = branch[0]
        if session is None or session.sink is None:
            return self._plan_opening(call, session, messages)
        try:
            lane = self.residence.acquire(session)
        except APIError as error:
            if error.code in LOST and call.session is None and call.previous is None:
                raise LostSession(session, error) from None
            raise
        if lane is None:
            return None
        try:
            self._note_known(call, session)
            place = {digest: i for i, digest in enumerate(digests)}
            if turn is not None:
                return self._plan_again(session, lane, turn, messages, replies)
            held = place.get(session.digest, 0)
            if session.found_by == "messages" and not held:  # the last turn is asked again, or changed
                turn = session.turns[-1]
                return self._plan_again(session, lane, turn, messages[place[turn.before] :], replies)
            if session.found_by != "messages" and held == len(messages):
                held = 0  # new messages that repeat the conversation by chance
            return self._plan_next(session, lane, messages[held:], replies)
        except BaseException:
            self.residence.release(session)
            raise

    def _find(self, call: Call, digests: Sequence[str]) -> tuple[Session | None, Turn | None]:
        if call.session is not None:
            return self.store.get(call.owner, call.session), None
        if call.previous is not None:
            return self.store.by_response(call.owner, call.previous)
        return self.store.find(call.owner, digests, self.residence.busy, call.found_by), None

    def _note_known(self, call: Call, session: Session) -> None:
        """A client that names a session sends what is new from now on, whatever it sent before."""
        if call.session is not None:
            session.found_by = "id"

    def _branch(self, session: Session, turn: Turn) -> tuple[Session, Turn]:
        """A copy of a session, to go on before one of its turns."""
        data = self.residence.dump(session)
        assert data is not None, "a session with a response has begun"
        copy = session.copy(found_by="response")
        self.store.add(copy, self.residence.busy, self.forget)
        try:
            self.store.spill.put(copy, data)
        except SpillFull:
            self.store.sessions.pop(copy.id, None)
            raise busy("there is no room for one more session", RETRY_SECONDS) from None
        return copy, copy.turns[session.turns.index(turn)]

    def _plan_opening(self, call: Call, session: Session | None, messages: list[Message]) -> Plan | None:
        """A conversation that begins."""
        head, new = split_head(messages)
        tools = call.tools
        if session is not None:
            head, tools = head or session.head, tools or session.tools
        if not new:
            raise invalid("messages hold no message but the system's; accepted: at least one of a user", "messages")
        opening, pieces = self.template.opening(head, tools, new, reply=call.reply is not None)
        sink = self.sink_of(opening)
        fresh = session or Session(call.owner, found_by=call.found_by)
        plan = self._begin(fresh, sink)
        if plan is None:
            return None
        fresh.head, fresh.tools, fresh.digest = head, tools, digests_of(head, tools)[-1]
        return replace(plan, pieces=pieces, opening=opening, new=new)

    def sink_of(self, opening: str) -> int:
        """How many tokens of a stream that begins with this text are pinned. Raises APIError if they are too many."""
        sink, most = max(LEAST_SINK, len(self.template.encode(opening))), self.settings.most_pinned
        if sink > most:
            raise invalid(
                f"system prompt and tools take {sink} tokens, which are never evicted; accepted: at most"
                f" {most} of the {self.settings.cap} slots of a session",
                "messages",
                "pinned_prompt_too_long",
            )
        return sink

    def _plan_pin(self, call: Call) -> Plan | None:
        """A session that is to have one more pinned text."""
        session = self.store.get(call.owner, call.session or "")
        if session.kind != "chat" or session.found_by == "messages":
            raise invalid("a text is pinned in a chat that its client knows by an id; accepted: such a session_id")
        pinning = Pinning(session, self.template, call.pin)
        sink = self.sink_of(pinning.opening)
        if session.sink is None:
            plan = self._begin(session, sink)
            return plan and replace(plan, pinning=pinning)
        lane = self.residence.acquire(session)
        return None if lane is None else Plan(session, lane, [], pinning=pinning)

    def _plan_prompt(self, call: Call) -> Plan | None:
        """A completion: its prompt is the text of one turn."""
        session = self.store.get(call.owner, call.session) if call.session else None
        if session is not None and session.sink is not None:
            lane = self.residence.acquire(session)
            if lane is None:
                return None
            self._note_known(call, session)
            return Plan(session, lane, [])
        if session is None:
            return self._begin(Session(call.owner, kind="text", found_by=call.found_by), LEAST_SINK)
        pinned = bool(session.head or session.tools)
        opening = self.template.pinned(session.head, session.tools) if pinned else ""
        plan = self._begin(session, self.sink_of(opening))
        return plan and replace(plan, opening=opening)

    def _begin(self, session: Session, sink: int) -> Plan | None:
        known = session.id in self.store.sessions
        before, session.sink = session.sink, sink
        try:
            lane = self.residence.acquire(session)
            if lane is not None and not known:
                self.store.add(session, self.residence.busy, self.forget)
        except BaseException:
            session.sink = before
            if not known:
                self.residence.drop(session.id)
            raise
        if lane is None:
            session.sink = before
            return None
        return Plan(session, lane, [])

    def _plan_next(self, session: Session, lane: Lane, new: list[Message], replies: bool) -> Plan:
        """A conversation that goes on."""
        before = [*session.head, *session.turn]
        pieces = None
        if session.held is not None:
            pieces = self.template.continuing(before, session.tools, session.held, new, reply=replies)
        if pieces is not None:
            return Plan(session, lane, pieces, new=new)
        if session.held is None or not session.turns:  # without turns the last one is cut, and stays as it is
            pieces = self.template.resuming(session.head, session.turn, session.tools, new, reply=replies)
            return Plan(session, lane, pieces, new=new)
        return self._plan_again(session, lane, session.turns[-1], [*session.turn, *new], replies)

    def _plan_again(self, session: Session, lane: Lane, turn: Turn, new: list[Message], replies: bool) -> Plan:
        """Take back everything from a turn on, and go on from there."""
        self.rewind(session, lane, turn)
        pieces = self.template.resuming(session.head, session.turn, session.tools, new, reply=replies)
        return Plan(session, lane, pieces, new=new)

    def rewind(self, session: Session, lane: Lane, turn: Turn) -> None:
        """Take back everything from a turn on."""
        lane.rewind(lane.seen - turn.start)
        self.forget_index(session.id)
        place = session.turns.index(turn)
        session.turns_seen -= len(session.turns) - place
        session.turns = session.turns[:place]
        session.turn, session.digest, session.response = turn.previous, turn.before, turn.response
        session.held = None
        self.counts(session, lane)
