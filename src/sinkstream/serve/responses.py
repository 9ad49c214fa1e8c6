"""/v1/responses: text and calls of functions, gone on with by `previous_response_id`."""

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
from sinkstream.serve.response_items import function_calls, messages_of
from sinkstream.serve.schemas import ResponseRequest
from sinkstream.serve.service import check_model, model_name
from sinkstream.serve.sessions import new_id
from sinkstream.serve.sse import EventStream, sse
from sinkstream.serve.tool_choice import flat_tools, tools_of, with_choice
from sinkstream.serve.tools import CallFilter, ToolFormat

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
    if body.include:  # clients send an empty one
        raise invalid("include of a response is not served; accepted: none", "include", "unsupported_value")
    if set(body.text or {}) - {"format"} or ((body.text or {}).get("format") or {"type": "text"}) != {"type": "text"}:
        raise invalid("text of a response is not served; accepted: the format text", "text", "unsupported_value")
    call = Call(
        who,
        messages=tuple(messages_of(body)),
        tools=tools_of(flat_tools(body.tools), body.tool_choice),
        previous=body.previous_response_id,
        response=new_id("resp"),
        reply=response_options(body, service.settings, service.vocab),
        found_by="messages" if body.store is False else "response",
    )
    call = with_choice(call, body.tool_choice, service.tools)
    form = service.tools if body.tool_choice != "none" and (body.tools or body.previous_response_id) else None
    listener = Listener(service, [call], whole=not body.stream)
    shape = _Response(body, call.response, model_name(service.loaded), form)
    try:
        await listener.first(request)
        if not body.stream:
            return shape.whole(await listener.all(request))
    except BaseException:
        listener.cancel()
        raise
    return EventStream(shape.stream(listener))


class _Response:
    """How a response is written in JSON.

    Parameters
    ----------
    form : ToolFormat or None
        How calls are written in its text; None: its text is all of it.
    """

    def __init__(self, body: ResponseRequest, response: str, model: str, form: ToolFormat | None):
        self.body, self.response, self.model, self.created = body, response, model, int(time.time())
        self.item = new_id("msg")
        self._filter = None if form is None else CallFilter(form, response)
        self._number = 0

    def whole(self, events: list[Event]) -> dict[str, Any]:
        """The body of a response that is complete."""
        text = "".join(self._visible(e.text) for e in events if isinstance(e, TextPiece))
        rest, calls = self._rest()
        return self._complete(text + rest, calls, events)

    async def stream(self, listener: Listener) -> AsyncIterator[bytes]:
        """The response as server-sent events."""
        text, heard = "", list[Event]()
        yield self._sse("response.created", response=self._about())
        yield self._sse("response.in_progress", response=self._about())
        async for events in listener.events():
            heard += events
            for event in events:
                if isinstance(event, TextPiece):
                    piece = self._visible(event.text)
                    for told in self._text_events(piece, begun=bool(text)):
                        yield told
                    text += piece
                elif isinstance(event, Context):
                    yield self._sse("response.context", context=vars(event))
                elif isinstance(event, Failed):
                    error = event.error
                    yield self._sse("error", code=error.code, message=error.message, param=error.param)
                    return
        rest, calls = self._rest()
        for told in self._text_events(rest, begun=bool(text), always=not calls):
            yield told
        whole = self._complete(text + rest, calls, heard)
        for place, item in enumerate(whole["output"]):
            for told in self._message_ends(item) if item["type"] == "message" else self._call_events(place, item):
                yield told
        yield self._sse(f"response.{whole['status']}", response=whole)

    # ---- the text, and the calls in it ----

    def _visible(self, piece: str) -> str:
        """What of a piece of text is no part of a call."""
        return piece if self._filter is None else self._filter.push(piece)

    def _rest(self) -> tuple[str, list[dict[str, Any]]]:
        """The rest of the text, and the items of the calls."""
        rest, calls = ("", []) if self._filter is None else self._filter.finish()
        return rest, function_calls(calls)

    def _complete(self, text: str, calls: list[dict[str, Any]], events: list[Event]) -> dict[str, Any]:
        reason = next(e.reason for e in events if isinstance(e, Ended))
        status = "completed" if reason == "stop" or calls else "incomplete"
        message = [self._message(text, status)] if text or not calls else []
        return self._about(status, [*message, *calls], next(e for e in events if isinstance(e, Done)))

    # ---- events of a stream ----

    def _sse(self, kind: str, **more: Any) -> bytes:
        body = {"type": kind, "sequence_number": self._number, **more}
        self._number += 1
        return sse(body, kind)

    def _text_events(self, piece: str, *, begun: bool, always: bool = False) -> list[bytes]:
        """A piece of the message, which begins with the first one; with `always` it begins without one too."""
        place, told = {"output_index": 0, "item_id": self.item}, []
        if (piece or always) and not begun:
            told.append(self._sse("response.output_item.added", output_index=0, item=self._message(None)))
            told.append(self._sse("response.content_part.added", **place, content_index=0, part=_part("")))
        if piece:
            told.append(self._sse("response.output_text.delta", **place, content_index=0, delta=piece, logprobs=[]))
        return told

    def _message_ends(self, item: dict[str, Any]) -> list[bytes]:
        place, text = {"output_index": 0, "item_id": self.item, "content_index": 0}, item["content"][0]["text"]
        return [
            self._sse("response.output_text.done", **place, text=text, logprobs=[]),
            self._sse("response.content_part.done", **place, part=_part(text)),
            self._sse("response.output_item.done", output_index=0, item=item),
        ]

    def _call_events(self, index: int, item: dict[str, Any]) -> list[bytes]:
        place, arguments = {"output_index": index, "item_id": item["id"]}, item["arguments"]
        begun = item | {"arguments": "", "status": "in_progress"}
        kind = "response.function_call_arguments"
        return [
            self._sse("response.output_item.added", output_index=index, item=begun),
            self._sse(f"{kind}.delta", **place, delta=arguments),
            self._sse(f"{kind}.done", **place, name=item["name"], arguments=arguments),
            self._sse("response.output_item.done", output_index=index, item=item),
        ]

    # ---- objects ----

    def _about(self, status: str = "in_progress", output: list | None = None, done: Done | None = None):
        body = self.body
        return {
            "id": self.response,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "model": self.model,
            "output": output or [],
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "parallel_tool_calls": bool(body.tools),
            "previous_response_id": body.previous_response_id,
            "temperature": body.temperature,
            "top_p": body.top_p,
            "tool_choice": body.tool_choice or ("auto" if body.tools else "none"),
            "tools": body.tools or [],
            "truncation": body.truncation or "auto",
            "usage": None if done is None else _usage(done),
        }

    def _message(self, text: str | None, status: str = "in_progress") -> dict[str, Any]:
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
