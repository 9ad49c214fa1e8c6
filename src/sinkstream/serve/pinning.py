"""A text is pinned in a session that has begun: a new stream begins with it, and every held turn is fed again."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from sinkstream.serve.lanes import Lane
from sinkstream.serve.scheduler import Work
from sinkstream.serve.sessions import Session, Turn, digest_of
from sinkstream.serve.template import ChatTemplate, Message

Prefill = Callable[[Lane, list[int], list[int], list[int]], Work]


def with_text(head: Sequence[Message], text: str) -> list[Message]:
    """System messages with one more text."""
    if not head:
        return [{"role": "system", "content": text}]
    return [*head[:-1], head[-1] | {"content": f"{head[-1]['content']}\n{text}"}]


class Pinning:
    """What a session is once a text is pinned in it.

    Turns are fed as the token ids that the stream holds. Turns that were evicted stay evicted, and may be recalled;
    turns that were read again for a question are not fed.

    Parameters
    ----------
    session : Session
    template : ChatTemplate
    text : str
    """

    def __init__(self, session: Session, template: ChatTemplate, text: str):
        self.session, self.template = session, template
        self.head = with_text(session.head, text)
        self.opening = template.pinned(self.head, session.tools)
        self._digest = digest_of(session.digest, [text])

    def feed(self, lane: Lane, sink: int, prefill: Prefill, fed: list[int]) -> Work:
        """Begin the stream anew with so many pinned tokens; the session is what it was until all is fed."""
        session = self.session
        begun = lane.seen > 0
        before, evicted = (lane.dump() if begun else b""), lane.counts()["evicted"]
        try:
            lane.reset(sink)
            ids, turns = self.template.encode(self.opening), []
            for turn in session.turns:
                turns.append(replace(turn, start=len(ids), ids=self._ids(turn), recalled=[]))
                ids += turns[-1].ids
            yield from prefill(lane, ids, [turn.start for turn in turns], fed)
        except BaseException:
            if begun:
                lane.reset(session.sink)
                lane.undump(before)
            raise
        if session.held is not None:
            session.held = self.opening + session.held.removeprefix(self._opening_before())
        session.head, session.sink, session.turns = self.head, sink, turns
        session.digest, session.evicted_before = self._digest, session.evicted_before + evicted

    def _opening_before(self) -> str:
        return self.template.pinned(self.session.head, self.session.tools)

    def _ids(self, turn: Turn) -> list[int]:
        """A turn's tokens; templates that write the system prompt into the first user message begin it differently."""
        if turn.number != 1:
            return turn.ids
        before, now = (self.template.lead(head, self.session.tools) for head in (self.session.head, self.head))
        ids = self.template.encode(before)
        if before == now or turn.ids[: len(ids)] != ids:
            return turn.ids
        return [*self.template.encode(now), *turn.ids[len(ids) :]]
