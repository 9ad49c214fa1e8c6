"""What every route asks of its request: the service and the owner."""

from typing import Annotated, Any

from fastapi import Depends, Request

from sinkstream.serve.errors import APIError
from sinkstream.serve.service import Service


async def service_of(request: Request) -> Service:
    """The service behind the application."""
    return request.app.state.service


async def check_host(request: Request) -> None:
    """Refuse a request under a name that is not the server's. Raises APIError 403."""
    hosts = request.app.state.hosts
    if hosts is not None and request.url.hostname not in hosts:
        raise APIError(403, f"host {request.url.hostname!r} is not this server's name", code="wrong_host")


async def owner(request: Request) -> str:
    """The owner that the request's API key stands for. Raises APIError 401 or 429."""
    return request.app.state.keys.owner(request.headers.get("authorization"))


#: What routes say of an answer that may be streamed.
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}

Served = Annotated[Service, Depends(service_of)]
Owner = Annotated[str, Depends(owner)]
