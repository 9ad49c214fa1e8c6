"""Who may ask, how often and how much: API keys, rates and the size of a body."""

import hmac
import time
from collections.abc import Sequence

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sinkstream.serve.errors import APIError, busy
from sinkstream.serve.service import owner_of


class Keys:
    """The API keys of a server; without any, everybody is the same owner.

    Parameters
    ----------
    keys : sequence of str
    rate : int
        Most requests a minute of one key; 0: no limit.
    """

    def __init__(self, keys: Sequence[str], rate: int):
        self._keys, self._rate = [key.encode() for key in keys], rate
        self._buckets: dict[str, tuple[float, float]] = {}  # tokens left, when

    def owner(self, authorization: str | None) -> str:
        """The owner of a request, by its Authorization header. Raises APIError 401 or 429."""
        given = (authorization or "").removeprefix("Bearer ").strip().encode()
        if not self._keys:
            return self._counted(owner_of(""))
        matches = [hmac.compare_digest(given, key) for key in self._keys]  # all of them, whatever the first says
        if not any(matches):
            raise APIError(401, "the API key is missing or wrong", code="invalid_api_key")
        return self._counted(owner_of(self._keys[matches.index(True)].decode()))

    def _counted(self, owner: str) -> str:
        if self._rate:
            now = time.monotonic()
            left, since = self._buckets.get(owner, (float(self._rate), now))
            left = min(self._rate, left + (now - since) * self._rate / 60)
            if left < 1:
                wait = int((1 - left) * 60 / self._rate) + 1
                raise busy(f"more than {self._rate} requests in a minute", wait)
            self._buckets[owner] = left - 1, now
        return owner


class BodyLimit:
    """Middleware that ends the reading of a body that is too large.

    Parameters
    ----------
    app : ASGI application
    limit : int
        Bytes.
    """

    def __init__(self, app: ASGIApp, limit: int):
        self.app, self.limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        read = 0

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b"")) if message["type"] == "http.request" else 0
            if read > self.limit:
                raise HTTPException(413, f"the body is larger than {self.limit:,} bytes, the most that is accepted")
            return message

        await self.app(scope, limited, send)
