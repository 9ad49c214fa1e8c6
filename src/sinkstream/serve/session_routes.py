"""/v1/sessions: open, append, fork, save, load, undo, delete, stats."""

import asyncio
from typing import Any

from fastapi import APIRouter, Request

from sinkstream.serve.errors import invalid
from sinkstream.serve.events import Done
from sinkstream.serve.http import Owner, Served
from sinkstream.serve.listen import Listener
from sinkstream.serve.planning import Call
from sinkstream.serve.schemas import AppendRequest, NameRequest, PinRequest, SessionRequest
from sinkstream.serve.service import Service, deleted
from sinkstream.serve.template import SYSTEM_ROLES
from sinkstream.serve.tool_choice import tools_of

router = APIRouter(prefix="/v1/sessions")


@router.post("", status_code=201)
async def open_session(body: SessionRequest, request: Request, who: Owner, service: Served) -> dict[str, Any]:
    """Open a session with a system prompt, tools and messages, all of which may be absent."""
    messages = [message.plain() for message in body.messages]
    head = [message for message in messages if message["role"] in SYSTEM_ROLES]
    if head != messages[: len(head)]:
        raise invalid("system messages come first in a session", "messages")
    view = await asyncio.wrap_future(service.open_session(who, head, tools_of(body.tools, None)))
    if len(messages) > len(head):
        try:
            await _feed(service, request, who, view["id"], messages[len(head) :])
        except BaseException:  # the client has no id of the session
            service.abandon(view["id"])
            raise
        view = await asyncio.wrap_future(service.with_session(who, view["id"], service.view))
    return view


@router.get("")
async def list_sessions(who: Owner, service: Served) -> dict[str, Any]:
    """The sessions that this key has opened, and the names of saved ones."""

    def work() -> dict[str, Any]:
        data = [service.view(session) for session in service.store.of(who)]
        return {"object": "list", "data": data, "saved": service.store.saved(who)}

    return await asyncio.wrap_future(service.scheduler.call(work))


@router.post("/load", status_code=201)
async def load(body: NameRequest, who: Owner, service: Served) -> dict[str, Any]:
    """A new session from a saved one."""
    return await asyncio.wrap_future(service.load(who, body.name))


@router.get("/{session_id}")
async def stats(session_id: str, who: Owner, service: Served) -> dict[str, Any]:
    """What a session holds: tokens seen, kept, evicted and pinned; turns; where its stream is."""
    return await asyncio.wrap_future(service.scheduler.call(lambda: service.view(service.store.get(who, session_id))))


@router.post("/{session_id}/append")
async def append(
    session_id: str,
    body: AppendRequest,
    request: Request,
    who: Owner,
    service: Served,
) -> dict[str, Any]:
    """Feed messages without a reply."""
    await _feed(service, request, who, session_id, [message.plain() for message in body.messages])
    return await asyncio.wrap_future(service.with_session(who, session_id, service.view))


@router.post("/{session_id}/pin")
async def pin(session_id: str, body: PinRequest, request: Request, who: Owner, service: Served) -> dict[str, Any]:
    """Add a text to the system prompt; held turns are fed again behind it, evicted ones may be recalled."""
    await _done(service, request, Call(who, session=session_id, pin=body.text))
    return await asyncio.wrap_future(service.with_session(who, session_id, service.view))


@router.post("/{session_id}/fork", status_code=201)
async def fork(session_id: str, who: Owner, service: Served) -> dict[str, Any]:
    """A copy that goes on by itself."""
    return await asyncio.wrap_future(service.with_session(who, session_id, service.fork))


@router.post("/{session_id}/undo")
async def undo(session_id: str, who: Owner, service: Served) -> dict[str, Any]:
    """Take back the last turn; what was evicted meanwhile stays so."""
    return await asyncio.wrap_future(service.with_session(who, session_id, service.undo))


@router.post("/{session_id}/save")
async def save(session_id: str, body: NameRequest, who: Owner, service: Served) -> dict[str, Any]:
    """Write a copy to the server's disk under a name."""
    return await asyncio.wrap_future(service.with_session(who, session_id, lambda s: service.save(s, body.name)))


@router.delete("/{session_id}")
async def delete(session_id: str, who: Owner, service: Served) -> dict[str, Any]:
    """Delete a session and its files; also damaged ones, of which nothing but the id is known."""
    files = service.store.spill.files
    if session_id not in service.store.sessions and files.damaged(session_id):
        await asyncio.wrap_future(service.scheduler.call(lambda: files.delete(session_id)))
        return deleted(session_id)
    return await asyncio.wrap_future(service.with_session(who, session_id, service.delete))


async def _feed(service: Service, request: Request, who: str, session_id: str, messages: list[dict]) -> None:
    await _done(service, request, Call(who, messages=tuple(messages), session=session_id))


async def _done(service: Service, request: Request, call: Call) -> None:
    """Carry out a call without a reply. Raises APIError."""
    listener = Listener(service, [call])
    await listener.first(request)
    events = await listener.all(request)
    assert isinstance(events[-1], Done), "a call ends with Done"
