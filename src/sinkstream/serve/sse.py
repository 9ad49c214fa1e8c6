"""Server-sent events: how they are written, and the response that sends them."""

import json
from collections.abc import AsyncIterator
from typing import Any

from sse_starlette import EventSourceResponse
from starlette.types import Message, Send

encoded = json.JSONEncoder(ensure_ascii=False).encode
SEPARATOR = "\n"


def sse(body: dict[str, Any], event: str | None = None) -> bytes:
    """One event with a JSON body."""
    data = f"data: {encoded(body)}\n\n"  # JSON has no line breaks
    return (data if event is None else f"event: {event}\n{data}").encode()


class EventStream(EventSourceResponse):
    """Sends events as they come, several in one piece where several have come.

    Parameters
    ----------
    events : async iterator of bytes
        Closed if the client goes away or the server ends.
    """

    def __init__(self, events: AsyncIterator[bytes]):
        super().__init__(events, sep=SEPARATOR)

    async def _send_with_timeout(self, send: Send, message: Message) -> None:
        """Without a timeout: the scope of one costs more than the sending, for every token."""
        await send(message)
