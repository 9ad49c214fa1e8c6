"""One request on one session: find it, feed what is new, write the replies, note what the stream holds then."""

import math
import time
from collections.abc import Generator, Iterator
from dataclasses import replace

import torch

from sinkstream.engine.inputs import end_tokens
from sinkstream.models import LoadedModel
from sinkstream.serve.errors import invalid
from sinkstream.serve.events import Context, Done, Emit, Started, TextPiece
from sinkstream.serve.lanes import Lane, prefill_tokens
from sinkstream.serve.planning import Call, Plan, Planner
from sinkstream.serve.post import Post
from sinkstream.serve.reply import Reply
from sinkstream.serve.scheduler import WAITING, Work
from sinkstream.serve.sessions import Session, Turn, digest_of, last_turn
from sinkstream.serve.template import Message
from sinkstream.serve.token_texts import TokenTexts
from sinkstream.serve.tools import ToolFormat, with_calls

TOLD = 80  # characters of a turn's user message, where the turn is told to have come back


class Conversations:
    """Serves calls; used by the scheduler's thread only.

    Parameters
    ----------
    loaded : LoadedModel
    planner : Planner
    tools : ToolFormat or None
        How the model writes calls of tools, where that is known.
    post : Post
        What others have written is delivered before a prompt is fed: it does not wait for the prompt.
    """

    def __init__(self, loaded: LoadedModel, planner: Planner, tools: ToolFormat | None, post: Post):
        self.loaded, self.planner, self.tools, self.post = loaded, planner, tools, post
        self.template, self.settings, self.residence = planner.template, planner.settings, planner.residence
        self.prefill_tokens = prefill_tokens(loaded.model)
        self.texts = TokenTexts(loaded.tokenizer)
        end = getattr(loaded.tokenizer, "eos_token_id", None)
        self.ends = frozenset([*end_tokens(loaded.model), *([] if end is None else [end])])

    def run(self, call: Call, emit: Emit) -> Work:
        """Serve one call; what happens is told to `emit`. Raises APIError."""
        branch: list[tuple[Session, Turn]] = []
        try:
            while (plan := self.planner.plan(call, branch)) is None:
                yield WAITING
        except BaseException:
            for copy, _ in branch:
                self.planner.forget(copy)
            raise
        session = plan.session
        try:
            emit(Started(session.id))
            done = yield from (self._serve(call, plan, emit) if plan.pinning is None else self._pin(plan, emit))
        finally:
            session.used = time.time()
            unknown = bool(branch) and session.response != call.response  # a copy that no client can name
            unknown = unknown or session.id not in self.planner.store.sessions  # abandoned meanwhile
            if not call.keep or unknown or (session.sink is None and session.found_by != "id"):
                self.planner.forget(session)
            else:
                self.residence.release(session)
        while self.settings.shared and not self.residence.spill.written(session.id):
            yield WAITING  # a turn that was answered is one that another server finds
        emit(done)

    # ---- feeding and writing ----

    def _serve(self, call: Call, plan: Plan, emit: Emit) -> Generator[str | None, None, Done]:
        session, lane = plan.session, plan.lane
        reused = lane.seen
        fed: list[int] = []
        last = session.turns[-1] if session.turns else None
        tokens, turns = len(last.ids) if last else 0, session.turns_seen
        try:
            yield from self._feed(call, plan, fed)
        except BaseException:
            if last is not None:
                del last.ids[tokens:]
            self._unfeed(session, lane, reused, turns)
            raise
        self._note_messages(session, plan.new, "" if call.reply is None else None)
        before = self._tell(plan, len(fed), reused, emit)
        if call.reply is None:
            return Done(reused + len(fed), reused, 0, before)
        if not lane.seen:
            raise invalid("the prompt is empty; accepted: at least one token", "prompt")
        options, texts, written = call.reply, {}, 0
        start = lane.dump() if options.choices > 1 else b""
        for index in reversed(range(options.choices)):  # the session goes on with choice 0
            if index < options.choices - 1:
                lane.undump(start)
            prompt = torch.tensor(fed, dtype=torch.int64)  # on the host: a copy to a device would wait for the forward
            reply = Reply(lane, prompt, options, index, self.loaded.tokenizer, self.texts, self.ends, emit)
            if call.begins:
                emit(TextPiece(index, call.begins))
            try:
                yield from reply.run()
                if rest := self._rest(call, reply):
                    emit(TextPiece(index, rest))
            except BaseException:
                if index:  # choice 0, with which the session goes on, has not begun: it stays empty
                    lane.undump(start)
                    empty = Reply(lane, prompt, options, 0, self.loaded.tokenizer, self.texts, self.ends, emit)
                    self._note_reply(call, session, lane, empty)
                raise
            finally:  # a reply whose client has gone stays as far as it was written
                texts[index] = self._text(call, reply)
                written += reply.tokens
                if index == 0:
                    self._note_reply(call, session, lane, reply)
        context = self._tell(plan, len(fed), reused, emit)
        context = replace(context, first_eviction=before.first_eviction or context.first_eviction)
        return Done(reused + len(fed), reused, written, context, texts)

    def _pin(self, plan: Plan, emit: Emit) -> Generator[str | None, None, Done]:
        session, lane, pinning = plan.session, plan.lane, plan.pinning
        assert pinning is not None, "a text is pinned"
        begun, fed = lane.seen > 0, list[int]()
        try:
            yield from pinning.feed(lane, self.planner.sink_of(pinning.opening), self._prefill, fed)
        except BaseException:
            if not begun:
                self.residence.drop(session.id)
                session.sink = None
            raise
        return Done(len(fed), 0, 0, self._tell(plan, len(fed), 0, emit))

    def _feed(self, call: Call, plan: Plan, fed: list[int]) -> Work:
        session, lane = plan.session, plan.lane
        if call.prompt is not None:
            opening = self.template.encode(plan.opening or "")
            ids = self.template.encode(call.prompt) if isinstance(call.prompt, str) else list(call.prompt)
            yield from self._prefill(lane, [*opening, *ids], [len(opening)], fed)
            return
        ids, begins = self.template.encode(plan.opening or ""), list[int]()
        turns = _turns_of(session, plan)
        question = max((i for i, piece in enumerate(plan.pieces) if piece.turn), default=None)
        for i, piece in enumerate(plan.pieces):
            own = self.template.encode(piece.text)
            if piece.turn:
                if i == question and call.reply is not None and self.planner.recall is not None:
                    yield from self._prefill(lane, ids, begins, fed)  # a long prompt pushes turns out
                    yield None
                    ids, begins = [], []
                    self._choose(plan, len(own))
                begins.append(len(ids))
                session.turns_seen += 1
                recalled = plan.recalled if i == question else []
                numbers = [turn.number for turn in recalled]
                start = lane.seen + len(ids)
                session.turns.append(replace(next(turns), start=start, number=session.turns_seen, recalled=numbers))
                for earlier in recalled:
                    ids += earlier.ids
            if session.turns:
                session.turns[-1].ids.extend(own)
            ids += own
        if call.begins:
            own = self.template.encode(call.begins)
            if session.turns:
                session.turns[-1].ids.extend(own)
            ids += own
        yield from self._prefill(lane, ids, begins, fed)

    def _choose(self, plan: Plan, tokens: int) -> None:
        """Choose the turns that come back before a question of so many tokens."""
        recall, session, lane = self.planner.recall, plan.session, plan.lane
        users = [message for message in plan.new if message["role"] == "user"]
        if recall is None or not users:
            return
        self.planner.counts(session, lane)
        stays = lane.seen + tokens + recall.slots - (self.settings.cap - lane.sink)
        leaving = [turn for turn in session.turns[:-1] if turn.start < stays]
        plan.recalled = recall.choose(session, users[-1]["content"], leaving)

    def _unfeed(self, session: Session, lane: Lane, reused: int, turns: int) -> None:
        """Take back a part of a prompt; a session that cannot be what it was goes on with what is left of it."""
        fed = lane.seen - reused
        session.turns_seen = turns
        session.turns = [turn for turn in session.turns if turn.number <= turns]
        session.archive = [turn for turn in session.archive if turn.number <= turns]
        self.planner.forget_index(session.id)
        if fed < 0 or not reused:  # the engine has cleared the stream, or it had not begun
            self.residence.drop(session.id)
            self.planner.archive_evicted(session, math.inf, written=True)
            session.sink, session.turn, session.held = None, [], None
            session.counts = {"seen": 0, "kept": 0, "evicted": 0}
            return
        try:
            lane.rewind(fed)
        except ValueError:  # a long prompt has pushed out what was there
            session.turn, session.held = [], None
        self.planner.counts(session, lane, written=True)

    def _prefill(self, lane: Lane, ids: list[int], begins: list[int], fed: list[int]) -> Generator[None, None, None]:
        """Feed tokens, at some of whose places turns begin, chunk by chunk: a piece of its own would be a forward."""
        for first in range(0, len(ids), self.prefill_tokens):
            part = ids[first : first + self.prefill_tokens]
            for begin in begins:
                if first <= begin < first + len(part):
                    lane.begin_turn(begin - first)
            self.post.deliver_urgent()
            lane.prefill(part)
            fed += part
            if first + len(part) < len(ids):
                yield

    # ---- what the stream holds then ----

    def _note_messages(self, session: Session, new: list[Message], held: str | None) -> None:
        for message in new:
            session.digest = digest_of(session.digest, message)
        has_turn = any(message["role"] == "user" for message in new)
        session.turn = last_turn(new) if has_turn else [*session.turn, *new]
        if held is not None and new:
            session.held = self.template.render([*session.head, *session.turn], session.tools)

    def _note_reply(self, call: Call, session: Session, lane: Lane, reply: Reply) -> None:
        held = reply.held()
        if call.prompt is None:
            base = self.template.render([*session.head, *session.turn], session.tools, reply=True)
            form = self.tools if session.tools else None
            message = with_calls({"role": "assistant", "content": self._text(call, reply)}, form, call.response)
            session.held = base + call.begins + held
            if session.turns and session.turns[-1].number == session.turns_seen:
                session.turns[-1].ids.extend(reply.kept)
            session.turn = [*session.turn, message]
            session.digest = digest_of(session.digest, message)
        session.response = call.response
        self.planner.counts(session, lane)

    def _text(self, call: Call, reply: Reply) -> str:
        """What a client is told of a reply."""
        return call.begins + reply.text.text + self._rest(call, reply)

    def _rest(self, call: Call, reply: Reply) -> str:
        """What ends a forced call that is complete: the reply was stopped there."""
        if not (call.begins and self.tools and reply.text.stopped):
            return ""
        text = call.begins + reply.text.text + self.tools.closing
        try:
            return self.tools.closing if self.tools.calls(text) else ""
        except ValueError:
            return ""

    def _tell(self, plan: Plan, sent: int, reused: int, emit: Emit) -> Context:
        session, lane = plan.session, plan.lane
        self.planner.counts(session, lane)
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
            recalled=tuple({"turn": t.number, "tokens": len(t), "text": t.text} for t in plan.recalled),
        )
        emit(context)
        return context


def _turns_of(session: Session, plan: Plan) -> Iterator[Turn]:
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
        before = session.response if place == 0 else None
        yield Turn(0, digests[i], digests[i + 1], list(earlier), before, text=plan.new[i]["content"][:TOLD])
