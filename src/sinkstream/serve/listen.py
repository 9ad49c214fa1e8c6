"""From the scheduler's thread to the event loop: what a request hears, in order, until its client goes away."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

from starlette.requests import Request

from sinkstream.serve.errors import APIError
from sinkstream.serve.events import Done, Emit, Ended, Event, Failed, TextPiece
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
    """

    def __init__(self, service: Service, calls: Sequence[Call]):
        self._loop, self._queue = asyncio.get_running_loop(), asyncio.Queue[Event]()
        self._jobs: list[Job] = []
        self._left = len(calls)
        try:
            for i, call in enumerate(calls):
                offset = i * (call.reply.choices if call.reply else 1)
                self._jobs.append(service.submit(call, self._emit(offset)))
        except APIError:
            self.cancel()
            raise

    def cancel(self) -> None:
        """The client has gone."""
        for job in self._jobs:
            job.cancel()

    async def first(self) -> Event:
        """The first event. Raises APIError if the request is refused."""
        event = await self._queue.get()
        if isinstance(event, Failed):
            self.cancel()
            raise event.error
        return event

    async def events(self) -> AsyncIterator[Event]:
        """All events up to the last `Done`, or a `Failed`; whoever stops to listen cancels the calls."""
        try:
            while self._left:
                event = await self._queue.get()
                self._left -= isinstance(event, Done)
                yield event
                if isinstance(event, Failed):
                    return
        finally:
            self.cancel()

    async def all(self, request: Request) -> list[Event]:
        """All events, unless the client goes away meanwhile. Raises APIError if the request fails."""
        gone = asyncio.create_task(_disconnected(request))
        heard: list[Event] = []

        async def hear() -> None:
            async for event in self.events():
                if isinstance(event, Failed):
                    raise event.error
                heard.append(event)

        hearing = asyncio.create_task(hear())
        try:
            await asyncio.wait({gone, hearing}, return_when=asyncio.FIRST_COMPLETED)
            if not hearing.done():
                raise APIError(499, "the client has gone", code="client_gone")
            hearing.result()
            return heard
        finally:
            gone.cancel()
            hearing.cancel()
            self.cancel()

    def _emit(self, offset: int) -> Emit:
        def emit(event: Event) -> None:
            if isinstance(event, TextPiece | Ended) and offset:
                event = replace(event, index=event.index + offset)
            if not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._queue.put_nowait, event)

        return emit


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
