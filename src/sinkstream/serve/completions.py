"""/v1/chat/completions and /v1/completions."""

import time
from collections.abc import AsyncIterator, Iterable
from typing import Any

from fastapi import APIRouter, Request

from sinkstream.serve.errors import invalid
from sinkstream.serve.events import Context, Done, Ended, Event, Failed, TextPiece, TokenLogprob
from sinkstream.serve.http import STREAMED, Owner, Served
from sinkstream.serve.listen import Listener
from sinkstream.serve.options import reply_options
from sinkstream.serve.planning import Call
from sinkstream.serve.schemas import ChatRequest, CompletionRequest, Sampling
from sinkstream.serve.service import Service, check_model, model_name
from sinkstream.serve.sessions import new_id
from sinkstream.serve.sse import EventStream, encoded, sse
from sinkstream.serve.token_texts import TokenText
from sinkstream.serve.tool_choice import tools_of, with_choice
from sinkstream.serve.tools import CallFilter, ToolFormat, told, with_calls

router = APIRouter(prefix="/v1")
LEAST_LOGPROB = -9999.0  # JSON has no minus infinity
PLACE = "\0text\0"  # where the text goes in an event that is written beforehand


@router.post("/chat/completions", responses=STREAMED)
async def chat_completions(body: ChatRequest, request: Request, who: Owner, service: Served):
    """Reply to a conversation of any length: all of it, or what is new in the session `session_id`."""
    if body.model is not None:
        check_model(service, body.model)
    if body.response_format and body.response_format.get("type") != "text":
        raise invalid("response_format is not served; accepted: text", "response_format", "unsupported_value")
    if body.top_logprobs and not body.logprobs:
        raise invalid("top_logprobs without logprobs; accepted: with logprobs=true", "top_logprobs")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    reply = reply_options(body, service.settings, service.vocab, logprobs)
    call = Call(
        who,
        messages=tuple(message.plain() for message in body.messages),
        tools=tools_of(body.tools, body.tool_choice),
        session=body.session_id,
        response=new_id("chatcmpl"),
        reply=reply,
    )
    call = with_choice(call, body.tool_choice, service.tools)
    form = service.tools if body.tool_choice != "none" and (body.tools or body.session_id) else None
    return await _answer(Chat(call.response, model_name(service.loaded), form), body, [call], request, service)


@router.post("/completions", responses=STREAMED)
async def completions(body: CompletionRequest, request: Request, who: Owner, service: Served):
    """Continue a prompt of any length; in the session `session_id`, the text that is there already."""
    if body.model is not None:
        check_model(service, body.model)
    for name in ("echo", "suffix"):
        if getattr(body, name):
            raise invalid(f"{name} is not served; accepted: none", name, "unsupported_value")
    if body.best_of not in (None, body.n or 1):
        raise invalid(f"best_of={body.best_of} is not served; accepted: n", "best_of", "unsupported_value")
    prompts = [tuple(p) if isinstance(p, list) else p for p in _prompts(body.prompt)]
    if len(prompts) > service.settings.queue:
        raise invalid(f"{len(prompts)} prompts in one request; accepted: at most {service.settings.queue}", "prompt")
    if body.session_id is not None and len(prompts) > 1:
        raise invalid(f"{len(prompts)} prompts for one session; accepted: 1", "prompt")
    if any(isinstance(p, tuple) and p and max(p) >= service.vocab for p in prompts):
        raise invalid(f"a token of the prompt is not known; accepted: 0 to {service.vocab - 1}", "prompt")
    reply = reply_options(body, service.settings, service.vocab, body.logprobs)
    response = new_id("cmpl")
    calls = [
        Call(who, prompt=p, session=body.session_id, response=response, reply=reply, keep=body.session_id is not None)
        for p in prompts
    ]
    return await _answer(Text(response, model_name(service.loaded)), body, calls, request, service)


def _prompts(prompt: str | list[int] | list[str]) -> list[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise invalid("the prompt is empty; accepted: a text, token ids or a list of texts", "prompt")
    return [*prompt] if isinstance(prompt[0], str) else [prompt]


class Shape:
    """How a reply is written in JSON: what chat and completions have in common."""

    name, chunk_name = "", ""

    def __init__(self, response: str, model: str):
        self.response, self.model, self.created = response, model, int(time.time())
        self._frames: dict[int, tuple[bytes, bytes]] = {}  # by choice

    def whole(self, events: list[Event]) -> dict[str, Any]:
        """The body of a reply that is not streamed."""
        ended = sorted((e for e in events if isinstance(e, Ended)), key=lambda e: e.index)
        choices = []
        for end in ended:
            pieces = [e for e in events if isinstance(e, TextPiece) and e.index == end.index]
            logprobs = [entry for piece in pieces for entry in piece.logprobs]
            choices.append(self.choice(end, "".join(piece.text for piece in pieces), logprobs))
        done = [e for e in events if isinstance(e, Done)]
        return self._about(self.name) | {"choices": choices, "usage": usage_of(done)}

    def text(self, piece: TextPiece) -> bytes:
        """The event of new text."""
        index = piece.index
        if piece.logprobs or not piece.text or not self.repeats(index):
            return sse(self.chunk([self.piece(index, piece.text, piece.logprobs, None)]))
        if index not in self._frames:
            before, after = sse(self.chunk([self.piece(index, PLACE, (), None)])).split(encoded(PLACE).encode())
            self._frames[index] = before, after
        before, after = self._frames[index]
        return before + encoded(piece.text).encode() + after

    def repeats(self, index: int) -> bool:
        """Whether the next event of this choice differs in its text alone from those behind it."""
        return True

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """The body of one event of a stream."""
        return self._about(self.chunk_name) | {"choices": choices} | more

    def choice(self, end: Ended, text: str, logprobs: list[TokenLogprob]) -> dict[str, Any]:
        """One choice of a whole reply."""
        raise NotImplementedError

    def piece(self, index: int, text: str, logprobs: Iterable[TokenLogprob], reason: str | None) -> dict[str, Any]:
        """One choice of an event."""
        raise NotImplementedError

    def _about(self, name: str) -> dict[str, Any]:
        return {"id": self.response, "object": name, "created": self.created, "model": self.model}


class Chat(Shape):
    """/v1/chat/completions."""

    name, chunk_name = "chat.completion", "chat.completion.chunk"

    def __init__(self, response: str, model: str, tools: ToolFormat | None = None):
        super().__init__(response, model)
        self._tools = tools
        self._begun: set[int] = set()
        self._filters: dict[int, CallFilter] = {}

    def repeats(self, index: int) -> bool:
        return self._tools is None and index in self._begun

    def choice(self, end: Ended, text: str, logprobs: list[TokenLogprob]) -> dict[str, Any]:
        message = with_calls({"role": "assistant", "content": text}, self._tools, self.response) | {"refusal": None}
        reason = end.reason
        if message.get("tool_calls"):
            reason = "tool_calls"
            message |= {"content": message["content"] or None, "tool_calls": told(message["tool_calls"])}
        return {"index": end.index, "message": message, "logprobs": _chat_logprobs(logprobs), "finish_reason": reason}

    def piece(self, index: int, text: str, logprobs: Iterable[TokenLogprob], reason: str | None) -> dict[str, Any]:
        calls: list[dict[str, Any]] = []
        if self._tools is not None:
            calling = self._filters.setdefault(index, CallFilter(self._tools, self.response))
            text = calling.push(text)
            if reason is not None:
                rest, calls = calling.finish()
                text, reason = text + rest, "tool_calls" if calls else reason
        delta: dict[str, Any] = {"content": text} if text or index not in self._begun else {}
        if calls:
            delta["tool_calls"] = [{"index": i, **call} for i, call in enumerate(told(calls))]
        if index not in self._begun:
            self._begun.add(index)
            delta = {"role": "assistant", **delta}
        return {"index": index, "delta": delta, "logprobs": _chat_logprobs(logprobs), "finish_reason": reason}


class Text(Shape):
    """/v1/completions."""

    name, chunk_name = "text_completion", "text_completion"

    def choice(self, end: Ended, text: str, logprobs: list[TokenLogprob]) -> dict[str, Any]:
        return self.piece(end.index, text, logprobs, end.reason)

    def piece(self, index: int, text: str, logprobs: Iterable[TokenLogprob], reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": _text_logprobs(list(logprobs)), "finish_reason": reason}


def usage_of(done: list[Done]) -> dict[str, Any]:
    """The usage of one request, which may be several calls."""
    found = done[-1].usage()
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        found[name] = sum(d.usage()[name] for d in done)
    return found


async def _answer(shape: Shape, body: Sampling, calls: list[Call], request: Request, service: Service):
    listener = Listener(service, calls, whole=not body.stream)
    try:
        await listener.first(request)
        if not body.stream:
            return shape.whole(await listener.all(request))
    except BaseException:
        listener.cancel()
        raise
    include_usage = body.stream_options is not None and body.stream_options.include_usage
    return EventStream(_stream(shape, listener, include_usage))


async def _stream(shape: Shape, listener: Listener, include_usage: bool) -> AsyncIterator[bytes]:
    """The events of a stream as server-sent events; closed by the server if the client goes away."""
    done: list[Done] = []
    ended: list[Ended] = []
    told = b""
    async for events in listener.events():
        for event in events:
            if isinstance(event, TextPiece):
                told += shape.text(event)
            elif isinstance(event, Ended):
                ended.append(event)
            elif isinstance(event, Context):  # clients that know nothing of it see an empty piece of text
                told += sse(shape.chunk([shape.piece(0, "", (), None)], context=vars(event)), "context")
            elif isinstance(event, Failed):
                yield told + sse(event.error.body())
                return
            elif isinstance(event, Done):
                done.append(event)
        if told and not listener.ended:  # what comes last is sent in one piece
            yield told
            told = b""
    for end in sorted(ended, key=lambda end: end.index):  # last: some clients hear nothing after it
        told += sse(shape.chunk([shape.piece(end.index, "", (), end.reason)]))
    if include_usage:
        told += sse(shape.chunk([], usage=usage_of(done)))
    yield told + b"data: [DONE]\n\n"


def _text_logprobs(entries: list[TokenLogprob]) -> dict[str, Any] | None:
    if not entries:
        return None
    return {
        "tokens": [e.token.name for e in entries],
        "token_logprobs": [_finite(e.logprob) for e in entries],
        "top_logprobs": [{token.name: _finite(value) for token, value in e.top} for e in entries],
        "text_offset": [e.offset for e in entries],
    }


def _chat_logprobs(entries: Iterable[TokenLogprob]) -> dict[str, Any] | None:
    def one(token: TokenText, logprob: float) -> dict[str, Any]:
        return {"token": token.text, "logprob": _finite(logprob), "bytes": list(token.data)}

    found = [one(e.token, e.logprob) | {"top_logprobs": [one(*pair) for pair in e.top]} for e in entries]
    return {"content": found, "refusal": None} if found else None


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
