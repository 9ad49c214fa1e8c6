"""/v1/responses: text in, text out, gone on with by `previous_response_id`."""

import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request

from sinkstream.serve.errors import invalid
from sinkstream.serve.events import Context, Done, Ended, Event, Failed, TextPiece
from sinkstream.serve.http import STREAMED, Owner, Served
from sinkstream.serve.listen import Listener
from sinkstream.serve.options import response_options
from sinkstream.serve.planning import Call
from sinkstream.serve.schemas import ChatMessage, ResponseRequest
from sinkstream.serve.service import check_model, model_name
from sinkstream.serve.sessions import new_id
from sinkstream.serve.sse import EventStream, sse

router = APIRouter(prefix="/v1")


@router.post("/responses", responses=STREAMED)
async def responses(body: ResponseRequest, request: Request, who: Owner, service: Served):
    """Respond to an input of any length; both values of `truncation` are accepted, since nothing ever overflows."""
    if body.model is not None:
        check_model(service, body.model)
    if body.previous_response_id and body.instructions:
        raise invalid(
            "instructions are pinned when a conversation begins; accepted: without previous_response_id", "instructions"
        )
    for name in ("tools", "include"):  # clients send empty ones
        if getattr(body, name):
            raise invalid(f"{name} of a response is not served; accepted: none", name, "unsupported_value")
    call = Call(
        who,
        messages=tuple(_messages(body)),
        previous=body.previous_response_id,
        response=new_id("resp"),
        reply=response_options(body, service.settings, service.vocab),
        found_by="messages" if body.store is False else "response",
    )
    listener = Listener(service, [call], whole=not body.stream)
    shape = _Response(body, call.response, model_name(service.loaded))
    try:
        await listener.first()
        if not body.stream:
            return shape.whole(await listener.all(request))
    except BaseException:
        listener.cancel()
        raise
    return EventStream(shape.stream(listener))


def _messages(body: ResponseRequest) -> list[dict[str, Any]]:
    head = [{"role": "system", "content": body.instructions}] if body.instructions else []
    if isinstance(body.input, str):
        return [*head, {"role": "user", "content": body.input}]
    return head + [ChatMessage(role=item.role, content=item.content).plain() for item in body.input]


class _Response:
    """How a response is written in JSON."""

    def __init__(self, body: ResponseRequest, response: str, model: str):
        self.body, self.response, self.model, self.created = body, response, model, int(time.time())
        self.item = new_id("msg")

    def whole(self, events: list[Event]) -> dict[str, Any]:
        """The body of a response that is complete."""
        text = "".join(e.text for e in events if isinstance(e, TextPiece))
        reason = next(e.reason for e in events if isinstance(e, Ended))
        return self._about(text, reason, next(e for e in events if isinstance(e, Done)))

    async def stream(self, listener: Listener) -> AsyncIterator[bytes]:
        """The response as server-sent events."""
        number, heard = 0, []

        def event(kind: str, **more: Any) -> bytes:
            nonlocal number
            body = {"type": kind, "sequence_number": number, **more}
            number += 1
            return sse(body, kind)

        place = {"output_index": 0, "item_id": self.item}
        yield event("response.created", response=self._about(None))
        yield event("response.in_progress", response=self._about(None))
        yield event("response.output_item.added", output_index=0, item=self._item(None))
        yield event("response.content_part.added", **place, content_index=0, part=_part(""))
        async for events in listener.events():
            heard += events
            for one in events:
                if isinstance(one, TextPiece) and one.text:
                    yield event("response.output_text.delta", **place, content_index=0, delta=one.text, logprobs=[])
                elif isinstance(one, Context):
                    yield event("response.context", context=vars(one))
                elif isinstance(one, Failed):
                    error = one.error
                    yield event("error", code=error.code, message=error.message, param=error.param)
                    return
        whole = self.whole(heard)
        text = whole["output"][0]["content"][0]["text"]
        yield event("response.output_text.done", **place, content_index=0, text=text, logprobs=[])
        yield event("response.content_part.done", **place, content_index=0, part=_part(text))
        yield event("response.output_item.done", output_index=0, item=whole["output"][0])
        yield event(f"response.{whole['status']}", response=whole)

    def _about(self, text: str | None, reason: str | None = None, done: Done | None = None) -> dict[str, Any]:
        status = "in_progress" if reason is None else "completed" if reason == "stop" else "incomplete"
        return {
            "id": self.response,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "model": self.model,
            "output": [] if text is None else [self._item(text, status)],
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": self.body.instructions,
            "max_output_tokens": self.body.max_output_tokens,
            "metadata": self.body.metadata or {},
            "parallel_tool_calls": False,
            "previous_response_id": self.body.previous_response_id,
            "temperature": self.body.temperature,
            "top_p": self.body.top_p,
            "tool_choice": "none",
            "tools": [],
            "truncation": self.body.truncation or "auto",
            "usage": None if done is None else _usage(done),
        }

    def _item(self, text: str | None, status: str = "in_progress") -> dict[str, Any]:
        content = [] if text is None else [_part(text)]
        return {"id": self.item, "type": "message", "role": "assistant", "status": status, "content": content}


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(done: Done) -> dict[str, Any]:
    usage = done.usage()
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": usage["prompt_tokens_details"],
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
        "context": usage["context"],
    }
