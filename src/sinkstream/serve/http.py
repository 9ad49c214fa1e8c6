"""What every route asks of its request: the service and the owner."""

from typing import Annotated

from fastapi import Depends, Request

from sinkstream.serve.service import Service


def service_of(request: Request) -> Service:
    """The service behind the application."""
    return request.app.state.service


def owner(request: Request) -> str:
    """The owner that the request's API key stands for. Raises APIError 401 or 429."""
    return request.app.state.keys.owner(request.headers.get("authorization"))


Served = Annotated[Service, Depends(service_of)]
Owner = Annotated[str, Depends(owner)]
