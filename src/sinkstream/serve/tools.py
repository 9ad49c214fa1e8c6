"""Calls of tools in a reply: taken out of its text where the chat template says how the model writes them."""

import json
from abc import ABC, abstractmethod
from typing import Any

from sinkstream.registry import Registry
from sinkstream.serve.json_values import parsed
from sinkstream.serve.template import Message

Calls = list[tuple[str, dict[str, Any]]]  # name and arguments
FORMATS: Registry[type["ToolFormat"]] = Registry("format of tool calls")


class ToolFormat(ABC):
    """How a family of models writes calls.

    Attributes
    ----------
    sign : str
        What its chat templates hold.
    opening : str
        Text with which calls begin.
    closing : str
        Text with which a call ends; empty if nothing but its own end tells.
    """

    sign: str
    opening: str
    closing: str = ""

    @abstractmethod
    def begin(self, text: str) -> int:
        """Index from which a text may hold a call, or the beginning of one; the length of the text if there is none."""

    @abstractmethod
    def calls(self, text: str) -> Calls:
        """The calls of a text from `begin` on. Raises ValueError if it is something else."""

    @abstractmethod
    def beginning(self, name: str | None, arguments: str = "") -> str:
        """The text with which a call begins.

        Parameters
        ----------
        name : str or None
            Of the tool; None: the text ends before it.
        arguments : str
            The beginning of their JSON.
        """


@FORMATS.register("tagged")
class Tagged(ToolFormat):
    """``<tool_call>{"name": …, "arguments": {…}}</tool_call>``, one or several, at the end of a reply.

    Source: chat templates of Hermes, Qwen and SmolLM.
    """

    sign = opening = "<tool_call>"
    closing = "</tool_call>"

    def begin(self, text: str) -> int:
        found = text.find(self.opening)
        return found if found >= 0 else len(text) - _overlap(text, self.opening)

    def calls(self, text: str) -> Calls:
        found: Calls = []
        for part in text.split(self.opening)[1:]:
            inside, closed, after = part.partition(self.closing)
            if not closed or after.strip():
                raise ValueError("text beside the calls")
            found.append(_call(inside, "arguments"))
        return found

    def beginning(self, name: str | None, arguments: str = "") -> str:
        return f"{self.opening}\n{_beginning(name, 'arguments', arguments)}"


@FORMATS.register("json")
class WholeJson(ToolFormat):
    """The whole reply is ``{"name": …, "parameters": {…}}``.

    Source: chat templates of Llama 3.1 and 3.2.
    """

    sign = '"parameters"'
    opening = "{"

    def begin(self, text: str) -> int:
        return 0 if not text.strip() or text.lstrip().startswith(self.opening) else len(text)

    def calls(self, text: str) -> Calls:
        return [_call(text, "parameters")]

    def beginning(self, name: str | None, arguments: str = "") -> str:
        return _beginning(name, "parameters", arguments)


def tool_format(template: Any) -> ToolFormat | None:
    """The format of a tokenizer's chat template; None if it is not known, or the template takes no tools."""
    text = json.dumps(template, ensure_ascii=False).replace('\\"', '"') if template else ""
    if "tools" not in text:
        return None
    return next((kind() for _, kind in FORMATS.items() if kind.sign in text), None)


def with_calls(message: Message, form: ToolFormat | None, response: str) -> Message:
    """A message of the assistant with its calls taken out of its text, as its client sends it again.

    Parameters
    ----------
    form : ToolFormat or None
        None: no tools were given.
    response : str
        Id of the response, from which the ids of the calls follow.
    """
    if form is None:
        return message
    text = message["content"]
    begin = form.begin(text)
    try:
        calls = form.calls(text[begin:]) if text[begin:].strip() else []
    except ValueError:
        return message
    if not calls:
        return message
    listed = [
        {"id": f"call_{response[-12:]}_{i}", "type": "function", "function": {"name": name, "arguments": given}}
        for i, (name, given) in enumerate(calls)
    ]
    return {"role": "assistant", "content": text[:begin].rstrip(), "tool_calls": listed}


def told(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Calls as the API tells them: the arguments are a text."""
    return [
        call
        | {"function": call["function"] | {"arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)}}
        for call in calls
    ]


def plain_calls(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Calls as chat templates take them: arguments that are the text of an object become that object."""
    return [
        call | {"function": _plain(call["function"])} if isinstance(call.get("function"), dict) else call
        for call in calls
    ]


def _plain(function: dict[str, Any]) -> dict[str, Any]:
    try:
        given = parsed(function.get("arguments", ""))
    except (TypeError, ValueError):
        return function
    return function | {"arguments": given} if isinstance(given, dict) else function


def _call(text: str, arguments: str) -> tuple[str, dict[str, Any]]:
    found = parsed(text)
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        raise ValueError("no call")
    given = found.get(arguments, {})
    if not isinstance(given, dict):
        raise ValueError("no arguments")
    return found["name"], given


def _beginning(name: str | None, field: str, arguments: str) -> str:
    """As templates write it; the next token may begin with a space."""
    if name is None:
        return '{"name": "'
    return f'{{"name": {json.dumps(name, ensure_ascii=False)}, "{field}":{arguments and " "}{arguments}'


def _overlap(text: str, opening: str) -> int:
    """Length of the longest end of a text with which the opening begins."""
    longest = min(len(text), len(opening) - 1)
    return next((n for n in range(longest, 0, -1) if opening.startswith(text[-n:])), 0)


class CallFilter:
    """The text of a streamed reply without what may be a call.

    Parameters
    ----------
    form : ToolFormat
    response : str
        Id of the response.
    """

    def __init__(self, form: ToolFormat, response: str):
        self._form, self._response = form, response
        self._text, self._sent = "", 0

    def push(self, piece: str) -> str:
        """Take a piece; returns the text that can be sent now."""
        self._text += piece
        return self._send(len(self._text[: self._form.begin(self._text)].rstrip()))  # `with_calls` leaves spaces out

    def finish(self) -> tuple[str, list[dict[str, Any]]]:
        """The rest of the text, and the calls."""
        message = with_calls({"role": "assistant", "content": self._text}, self._form, self._response)
        calls = message.get("tool_calls", [])
        return ("" if calls else self._send(len(self._text))), calls

    def _send(self, end: int) -> str:
        end = max(self._sent, end)
        piece, self._sent = self._text[self._sent : end], end
        return piece
