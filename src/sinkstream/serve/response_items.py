"""Items of /v1/responses: those of an input as messages of a chat, and the calls of a reply as items."""

from typing import Any

from sinkstream.serve.errors import invalid
from sinkstream.serve.schemas import ChatMessage, InputItem, ResponseRequest
from sinkstream.serve.template import Message
from sinkstream.serve.tools import told

NEEDED = {
    "message": ("role", "content"),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
}


def messages_of(body: ResponseRequest) -> list[Message]:
    """The messages of an input. Raises APIError for an item of another kind, or one that lacks a field."""
    found: list[Message] = []
    if body.instructions:
        found.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*found, {"role": "user", "content": body.input}]
    for place, item in enumerate(body.input):
        if item.type not in NEEDED:
            raise invalid(
                f"input items of type {item.type!r} are not served; accepted: {', '.join(NEEDED)}",
                f"input.{place}.type",
                "unsupported_value",
            )
        lacks = next((name for name in NEEDED[item.type] if getattr(item, name) is None), None)
        if lacks is not None:
            raise invalid(f"an input item of type {item.type!r} has no {lacks}", f"input.{place}.{lacks}")
        message = _message(item)
        if item.type == "function_call" and found and found[-1]["role"] == "assistant":
            message["content"] = found[-1]["content"]  # text and calls are one message of the assistant
            message["tool_calls"] = [*found.pop().get("tool_calls", []), *message["tool_calls"]]
        found.append(message)
    return found


def _message(item: InputItem) -> Message:
    if item.type == "function_call":
        function = {"name": item.name, "arguments": item.arguments}
        calls = [{"id": item.call_id, "type": "function", "function": function}]
        return ChatMessage(role="assistant", tool_calls=calls).plain()
    if item.type == "function_call_output":
        return ChatMessage(role="tool", content=item.output, tool_call_id=item.call_id).plain()
    assert item.role is not None, "was looked for"
    return ChatMessage(role=item.role, content=item.content).plain()


def function_calls(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The items of calls as `with_calls` finds them."""
    return [
        {
            "id": f"fc_{call['id'].removeprefix('call_')}",
            "type": "function_call",
            "call_id": call["id"],
            "name": call["function"]["name"],
            "arguments": call["function"]["arguments"],
            "status": "completed",
        }
        for call in told(calls)
    ]
