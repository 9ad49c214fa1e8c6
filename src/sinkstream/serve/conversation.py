"""One request on one session: find it, feed what is new, write the replies, note what the stream holds then."""

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace

import torch

from sinkstream.engine.decoder import StreamDecoder
from sinkstream.engine.inputs import end_tokens
from sinkstream.models import LoadedModel
from sinkstream.serve.errors import busy, invalid
from sinkstream.serve.events import Context, Done, Emit, Started
from sinkstream.serve.reply import Reply, ReplyOptions
from sinkstream.serve.residence import RETRY_SECONDS, Residence
from sinkstream.serve.scheduler import WAITING, Work
from sinkstream.serve.sessions import Session, Turn, digest_of, digests_of, last_turn, new_id, split_head
from sinkstream.serve.settings import ServeSettings
from sinkstream.serve.spill import SpillFull
from sinkstream.serve.store import SessionStore
from sinkstream.serve.template import ChatTemplate, Message, Piece

LEAST_SINK = 4  # without the first tokens of a stream models collapse
PREFILL_TOKENS = {"cpu": 128}  # of one turn of the scheduler
DEFAULT_PREFILL_TOKENS = 1024


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


@dataclass
class _Plan:
    """How a call goes on with its session: what is taken back, then what is fed."""

    session: Session
    decoder: StreamDecoder
    pieces: list[Piece]
    opening: str | None = None
    new: list[Message] = field(default_factory=list)


class Conversations:
    """Serves calls; used by the scheduler's thread only.

    Parameters
    ----------
    loaded : LoadedModel
    template : ChatTemplate
    settings : ServeSettings
    store : SessionStore
    residence : Residence
    evicted : callable
        Told how many tokens were evicted.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        template: ChatTemplate,
        settings: ServeSettings,
        store: SessionStore,
        residence: Residence,
        evicted: Callable[[int], None],
    ):
        self.loaded, self.template, self.settings = loaded, template, settings
        self.store, self.residence, self.evicted = store, residence, evicted
        self.prefill_tokens = PREFILL_TOKENS.get(loaded.model.device.type, DEFAULT_PREFILL_TOKENS)
        end = getattr(loaded.tokenizer, "eos_token_id", None)
        self.ends = frozenset([*end_tokens(loaded.model), *([] if end is None else [end])])

    def run(self, call: Call, emit: Emit) -> Work:
        """Serve one call; what happens is told to `emit`. Raises APIError."""
        branch: list[tuple[Session, Turn]] = []
        while (plan := self._plan(call, branch)) is None:
            yield WAITING
        session = plan.session
        emit(Started(session.id))
        try:
            yield from self._serve(call, plan, emit)
        finally:
            session.used = time.time()
            self.residence.release(session)
            if not call.keep or (session.sink is None and session.found_by != "id"):
                self.forget(session)

    def forget(self, session: Session) -> None:
        """Delete a session."""
        self.residence.drop(session.id)
        self.store.sessions.pop(session.id, None)

    def counts(self, session: Session, decoder: StreamDecoder) -> None:
        """Note what a session's stream holds now."""
        stats, before = decoder.stats(), session.counts["evicted"]
        session.counts = {name: stats[name] for name in ("seen", "kept", "evicted")}
        session.forget_evicted(decoder.state.schedules[0].oldest if stats["evicted"] else 0)
        self.evicted(max(0, stats["evicted"] - before))

    # ---- which session, and what is new ----

    def _plan(self, call: Call, branch: list[tuple[Session, Turn]]) -> _Plan | None:
        """The session with its decoder and what is to be fed; None if another request has to end first.

        A copy of a session that had to be made is kept in `branch`.
        """
        if call.prompt is not None:
            return self._plan_prompt(call)
        messages, replies = list(call.messages), call.reply is not None
        digests = digests_of(messages, call.tools)
        session, turn = branch[0] if branch else self._find(call, digests)
        if turn is not None and not branch and session is not None:
            branch.append(self._branch(session, turn))
            session, turn = branch[0]
        if session is None or session.sink is None:
            return self._plan_opening(call, session, messages)
        decoder = self.residence.acquire(session)
        if decoder is None:
            return None
        try:
            place = {digest: i for i, digest in enumerate(digests)}
            if turn is not None:
                return self._plan_again(session, decoder, turn, messages, replies)
            held = place.get(session.digest, 0)
            if session.found_by == "messages" and not held:  # the last turn is asked again, or changed
                turn = session.turns[-1]
                return self._plan_again(session, decoder, turn, messages[place[turn.before] :], replies)
            if session.found_by != "messages" and held == len(messages):
                held = 0  # new messages that repeat the conversation by chance
            return self._plan_next(session, decoder, messages[held:], replies)
        except BaseException:
            self.residence.release(session)
            raise

    def _find(self, call: Call, digests: Sequence[str]) -> tuple[Session | None, Turn | None]:
        if call.session is not None:
            return self.store.get(call.owner, call.session), None
        if call.previous is not None:
            return self.store.by_response(call.owner, call.previous)
        return self.store.find(call.owner, digests, self.residence.busy), None

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

    def _plan_opening(self, call: Call, session: Session | None, messages: list[Message]) -> _Plan | None:
        """A conversation that begins."""
        head, new = split_head(messages)
        tools = call.tools
        if session is not None:
            head, tools = head or session.head, tools or session.tools
        if not new:
            raise invalid("messages hold no message but the system's; accepted: at least one of a user", "messages")
        opening, pieces = self.template.opening(head, tools, new, reply=call.reply is not None)
        sink = max(LEAST_SINK, len(self.template.encode(opening)))
        if sink > self.settings.cap // 2:
            raise invalid(
                f"system prompt and tools take {sink} tokens, which are never evicted; accepted: at most"
                f" {self.settings.cap // 2}, half of the {self.settings.cap} slots of a session",
                "messages",
                "pinned_prompt_too_long",
            )
        fresh = session or Session(call.owner, found_by=call.found_by)
        plan = self._begin(fresh, sink)
        if plan is None:
            return None
        fresh.head, fresh.tools, fresh.digest = head, tools, digests_of(head, tools)[-1]
        return replace(plan, pieces=pieces, opening=opening, new=new)

    def _plan_prompt(self, call: Call) -> _Plan | None:
        """A completion: its prompt is the text of one turn."""
        session = self.store.get(call.owner, call.session) if call.session else None
        if session is not None and session.sink is not None:
            decoder = self.residence.acquire(session)
            return None if decoder is None else _Plan(session, decoder, [])
        return self._begin(session or Session(call.owner, kind="text", found_by=call.found_by), LEAST_SINK)

    def _begin(self, session: Session, sink: int) -> _Plan | None:
        known = session.id in self.store.sessions
        before, session.sink = session.sink, sink
        try:
            decoder = self.residence.acquire(session)
            if decoder is not None and not known:
                self.store.add(session, self.residence.busy, self.forget)
        except BaseException:
            session.sink = before
            self.residence.drop(session.id)
            raise
        if decoder is None:
            session.sink = before
            return None
        return _Plan(session, decoder, [])

    def _plan_next(self, session: Session, decoder: StreamDecoder, new: list[Message], replies: bool) -> _Plan:
        """A conversation that goes on."""
        before = [*session.head, *session.turn]
        pieces = None
        if session.held is not None:
            pieces = self.template.continuing(before, session.tools, session.held, new, reply=replies)
        if pieces is not None:
            return _Plan(session, decoder, pieces, new=new)
        if session.held is None or not session.turns:  # without turns the last one is cut, and stays as it is
            pieces = self.template.resuming(session.head, session.turn, session.tools, new, reply=replies)
            return _Plan(session, decoder, pieces, new=new)
        return self._plan_again(session, decoder, session.turns[-1], [*session.turn, *new], replies)

    def _plan_again(
        self, session: Session, decoder: StreamDecoder, turn: Turn, new: list[Message], replies: bool
    ) -> _Plan:
        """Take back everything from a turn on, and go on from there."""
        self.rewind(session, decoder, turn)
        pieces = self.template.resuming(session.head, session.turn, session.tools, new, reply=replies)
        return _Plan(session, decoder, pieces, new=new)

    def rewind(self, session: Session, decoder: StreamDecoder, turn: Turn) -> None:
        """Take back everything from a turn on."""
        decoder.rewind(decoder.state.counters[0].seen - turn.start)
        place = session.turns.index(turn)
        session.turns_seen -= len(session.turns) - place
        session.turns = session.turns[:place]
        session.turn, session.digest, session.response = turn.previous, turn.before, turn.response
        session.held = None
        self.counts(session, decoder)

    # ---- feeding and writing ----

    def _serve(self, call: Call, plan: _Plan, emit: Emit) -> Work:
        session, decoder = plan.session, plan.decoder
        reused = decoder.state.counters[0].seen
        fed: list[int] = []
        try:
            yield from self._feed(call, plan, fed)
        except BaseException:
            self._unfeed(session, decoder, reused)
            raise
        self._note_messages(session, plan.new, "" if call.reply is None else None)
        context = self._tell(session, decoder, len(fed), reused, emit)
        if call.reply is None:
            emit(Done(reused + len(fed), reused, 0, context))
            return
        if not decoder.state.counters[0].seen:
            raise invalid("the prompt is empty; accepted: at least one token", "prompt")
        options, texts, written = call.reply, {}, 0
        start = decoder.dump() if options.choices > 1 else b""
        for index in reversed(range(options.choices)):  # the session goes on with choice 0
            if index < options.choices - 1:
                decoder.undump(start)
            prompt = torch.tensor(fed, dtype=torch.int64, device=decoder.state.device)
            reply = Reply(decoder, prompt, options, index, self.loaded.tokenizer, self.ends, emit)
            try:
                yield from reply.run()
            finally:  # a reply whose client has gone stays as far as it was written
                texts[index] = reply.text.text
                written += reply.tokens
                if index == 0:
                    self._note_reply(call, session, decoder, reply)
        context = self._tell(session, decoder, len(fed), reused, emit)
        emit(Done(reused + len(fed), reused, written, context, texts))

    def _feed(self, call: Call, plan: _Plan, fed: list[int]) -> Work:
        session, decoder = plan.session, plan.decoder
        if call.prompt is not None:
            ids = self.template.encode(call.prompt) if isinstance(call.prompt, str) else list(call.prompt)
            decoder.begin_turn()
            yield from self._prefill(decoder, ids, fed)
            return
        if plan.opening:
            yield from self._prefill(decoder, self.template.encode(plan.opening), fed)
        turns = self._turns_of(session, plan)
        for piece in plan.pieces:
            if piece.turn:
                decoder.begin_turn()
                session.turns.append(replace(next(turns), start=decoder.state.counters[0].seen))
                session.turns_seen += 1
            yield from self._prefill(decoder, self.template.encode(piece.text), fed)

    def _unfeed(self, session: Session, decoder: StreamDecoder, reused: int) -> None:
        """Take back a part of a prompt; a session that cannot be what it was goes on with what is left of it."""
        fed = decoder.state.counters[0].seen - reused
        kept = [turn for turn in session.turns if turn.start < reused]
        session.turns_seen -= len(session.turns) - len(kept)
        session.turns = kept
        if fed < 0 or not reused:  # the engine has cleared the stream, or it had not begun
            self.residence.drop(session.id)
            session.sink, session.turns, session.turn, session.held = None, [], [], None
            session.counts = {"seen": 0, "kept": 0, "evicted": 0}
            return
        try:
            decoder.rewind(fed)
        except ValueError:  # a long prompt has pushed out what was there
            session.turn, session.held = [], None
        self.counts(session, decoder)

    def _prefill(self, decoder: StreamDecoder, ids: list[int], fed: list[int]) -> Generator[None, None, None]:
        for first in range(0, len(ids), self.prefill_tokens):
            part = ids[first : first + self.prefill_tokens]
            decoder.prefill(part)
            fed += part
            yield

    def _turns_of(self, session: Session, plan: _Plan):
        """The turns that the pieces begin, without their start; digests where they are known."""
        begun = sum(piece.turn for piece in plan.pieces)
        users = [i for i, message in enumerate(plan.new) if message["role"] == "user"]
        if begun != len(users):
            for _ in range(begun):
                yield Turn(0, "", "", [], None)
            return
        digests = [session.digest]
        for message in plan.new:
            digests.append(digest_of(digests[-1], message))
        for place, i in enumerate(users):
            earlier = session.turn if place == 0 else plan.new[users[place - 1] : i]
            yield Turn(0, digests[i], digests[i + 1], list(earlier), session.response if place == 0 else None)

    # ---- what the stream holds then ----

    def _note_messages(self, session: Session, new: list[Message], held: str | None) -> None:
        for message in new:
            session.digest = digest_of(session.digest, message)
        has_turn = any(message["role"] == "user" for message in new)
        session.turn = last_turn(new) if has_turn else [*session.turn, *new]
        if held is not None and new:
            session.held = self.template.render([*session.head, *session.turn], session.tools)

    def _note_reply(self, call: Call, session: Session, decoder: StreamDecoder, reply: Reply) -> None:
        held = reply.held()
        if call.prompt is None:
            base = self.template.render([*session.head, *session.turn], session.tools, reply=True)
            message = {"role": "assistant", "content": reply.text.text}
            session.held = base + held
            session.turn = [*session.turn, message]
            session.digest = digest_of(session.digest, message)
        session.response = call.response
        self.counts(session, decoder)

    def _tell(self, session: Session, decoder: StreamDecoder, sent: int, reused: int, emit: Emit) -> Context:
        self.counts(session, decoder)
        counts = session.counts
        first = bool(counts["evicted"]) and not session.announced
        session.announced = session.announced or first
        context = Context(
            session=session.id,
            sent=sent,
            reused=reused,
            evicted=counts["evicted"],
            evicted_turns=session.evicted_turns,
            pinned=min(session.sink or 0, counts["kept"]),
            kept=counts["kept"],
            cap=self.settings.cap,
            first_eviction=first,
        )
        emit(context)
        return context
