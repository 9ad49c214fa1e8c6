"""From the scheduler's thread to the event loop: what a request hears, in order, until its client goes away."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import replace
from typing import Any

from starlette.requests import Request

from sinkstream.serve.errors import APIError
from sinkstream.serve.events import Context, Done, Emit, Ended, Event, Failed, Started, TextPiece
from sinkstream.serve.planning import Call
from sinkstream.serve.scheduler import Job
from sinkstream.serve.service import Service


class Listener:
    """The events of one request, which may be several calls.

    Parameters
    ----------
    service : Service
    calls : sequence of Call
        Served side by side; choice j of call i is told as choice i * choices + j.
    whole : bool
        Whether pieces of text are of use only together: they wake nobody.
    """

    def __init__(self, service: Service, calls: Sequence[Call], *, whole: bool = False):
        self._loop, self._post, self._whole = asyncio.get_running_loop(), service.post, whole
        self._pending: deque[Event] = deque()
        self._waiting: asyncio.Future[None] | None = None  # of the loop
        self._jobs: list[Job] = []
        self._left = len(calls)
        try:
            for i, call in enumerate(calls):
                offset = i * (call.reply.choices if call.reply else 1)
                self._jobs.append(service.submit(call, self._emit(offset)))
        except APIError:
            self.cancel()
            raise

    @property
    def ended(self) -> bool:
        """Whether all events have been told."""
        return not self._left

    def cancel(self) -> None:
        """The client has gone."""
        for job in self._jobs:
            job.cancel()

    async def first(self, request: Request) -> Event:
        """The first event. Raises APIError if the request is refused, or its client goes away before."""
        try:
            await _unless_gone(request, self._some())
        except BaseException:
            self.cancel()
            raise
        event = self._pending.popleft()
        if isinstance(event, Failed):
            self.cancel()
            raise event.error
        return event

    async def events(self) -> AsyncIterator[list[Event]]:
        """All events up to the last `Done`, or a `Failed`, as many at once as have come since the last ones.

        Pieces of text that have come one after the other are one piece. Whoever stops to listen cancels the calls.
        """
        try:
            while self._left:
                await self._some()
                heard = self._heard()
                self._left -= sum(isinstance(event, Done) for event in heard)
                yield heard
                if isinstance(heard[-1], Failed):
                    return
        finally:
            self.cancel()

    async def all(self, request: Request) -> list[Event]:
        """All events, unless the client goes away meanwhile. Raises APIError if the request fails."""
        heard: list[Event] = []

        async def hear() -> None:
            async for events in self.events():
                if isinstance(events[-1], Failed):
                    raise events[-1].error
                heard.extend(events)

        try:
            await _unless_gone(request, hear())
            return heard
        finally:
            self.cancel()

    # ---- in the event loop ----

    async def _some(self) -> None:
        """Wait until there is an event."""
        while not self._pending:
            self._waiting = self._loop.create_future()
            await self._waiting

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def _heard(self) -> list[Event]:
        """What has come, up to a `Failed`."""
        heard: list[Event] = []
        texts: list[TextPiece] = []
        while self._pending and not (heard and isinstance(heard[-1], Failed)):
            event = self._pending.popleft()
            if texts and not (isinstance(event, TextPiece) and event.index == texts[0].index):
                heard.append(joined(texts))
                texts = []
            if isinstance(event, TextPiece):
                texts.append(event)
            else:
                heard.append(event)
        return [*heard, joined(texts)] if texts else heard

    # ---- in the scheduler's thread ----

    def _emit(self, offset: int) -> Emit:
        def emit(event: Event) -> None:
            if offset and isinstance(event, (TextPiece, Ended)):
                event = replace(event, index=event.index + offset)
            self._pending.append(event)
            if not self._whole or not isinstance(event, TextPiece):
                self._post.add(self._loop, self._wake, urgent=not isinstance(event, (Started, Context)))

        return emit


def joined(pieces: Sequence[TextPiece]) -> TextPiece:
    """Pieces of one choice as one."""
    if len(pieces) == 1:
        return pieces[0]
    text, logprobs = "".join(piece.text for piece in pieces), tuple(one for piece in pieces for one in piece.logprobs)
    return TextPiece(pieces[0].index, text, logprobs)


async def _unless_gone(request: Request, hearing: Coroutine[Any, Any, None]) -> None:
    """Hear something. Raises APIError if the client goes away meanwhile."""
    gone, heard = asyncio.create_task(_disconnected(request)), asyncio.create_task(hearing)
    try:
        await asyncio.wait({gone, heard}, return_when=asyncio.FIRST_COMPLETED)
        if not heard.done():
            raise APIError(499, "the client has gone", code="client_gone")
        heard.result()
    finally:
        gone.cancel()
        heard.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
