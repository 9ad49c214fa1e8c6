"""Which tools a request gives, and which of them the reply has to call."""

import json
from dataclasses import replace
from typing import Any

from sinkstream.serve.errors import invalid
from sinkstream.serve.planning import Call
from sinkstream.serve.tools import ToolFormat

Tools = list[dict[str, Any]] | None
CHOICES = "accepted: auto, none, required, or one function"


def tools_of(tools: Tools, choice: str | dict[str, Any] | None) -> Tools:
    """The tools that a chat is given in the form of /v1/chat/completions; none for the choice none.

    Raises
    ------
    APIError
        For tools that are no functions.
    """
    for tool in tools or ():
        if tool.get("type", "function") != "function":
            raise invalid(
                f"tools of type {tool['type']!r} are not served; accepted: function", "tools", "unsupported_value"
            )
    return tools or None if choice != "none" else None


def flat_tools(tools: Tools) -> Tools:
    """The tools of /v1/responses, which have no object `function`, as chat templates take them.

    `strict` is left out: arguments are not held to their schema. Raises APIError for tools that are no functions.
    """
    for tool in tools_of(tools, None) or ():
        if not isinstance(tool.get("name"), str):
            raise invalid("a tool has no name; accepted: type, name, description and parameters", "tools")
    names = ("name", "description", "parameters")
    return [
        {"type": "function", "function": {name: tool[name] for name in names if tool.get(name) is not None}}
        for tool in tools or ()
    ] or None


def with_choice(call: Call, choice: str | dict[str, Any] | None, form: ToolFormat | None) -> Call:
    """A call whose reply begins as the choice says: with a call of a tool if one is forced.

    Parameters
    ----------
    call : Call
        With a reply.
    choice : str, dict or None
        "auto", "none", "required", or an object that names a function.
    form : ToolFormat or None
        How the model writes calls; None: not known.

    Raises
    ------
    APIError
        For another choice, without the tool, or if it is not known how the model writes calls.
    """
    if choice in (None, "auto", "none"):
        return call
    given = {name: tool for tool in call.tools or () if (name := _name(tool)) is not None}
    names = [*given]
    if choice == "required":
        name = names[0] if len(names) == 1 else None
    elif isinstance(choice, dict) and choice.get("type") == "function":
        name = _name(choice)
        if name is None:
            raise invalid("tool_choice names no function; accepted: its name", "tool_choice")
        if name not in names:
            known = ", ".join(names) or "none, there are no tools in this request"
            raise invalid(f"tool_choice names {name!r}; accepted: {known}", "tool_choice")
    else:
        what = choice.get("type") if isinstance(choice, dict) else choice
        raise invalid(f"tool_choice {what!r} is not served; {CHOICES}", "tool_choice", "unsupported_value")
    if not given:
        raise invalid("tool_choice forces a call, and there are no tools in this request", "tool_choice")
    if form is None:
        raise invalid(
            "tool_choice cannot force a call: this model's chat template does not say how it writes calls; accepted:"
            " auto, none",
            "tool_choice",
            "unsupported_value",
        )
    assert call.reply is not None, "a choice is about a reply"
    reply = replace(call.reply, stop=(*call.reply.stop, form.closing)) if form.closing else call.reply
    return replace(call, reply=reply, begins=form.beginning(name, _arguments(given[name]) if name else ""))


def _arguments(tool: dict[str, Any]) -> str:
    """The beginning of arguments that a tool accepts: its first required parameter, and a text's opening quote."""
    parameters = tool.get("function", tool).get("parameters")
    required = parameters.get("required") if isinstance(parameters, dict) else None
    if not (isinstance(required, list) and required and isinstance(required[0], str)):
        return ""
    properties = parameters.get("properties")
    found = properties.get(required[0]) if isinstance(properties, dict) else None
    text = isinstance(found, dict) and found.get("type") == "string"
    return f"{{{json.dumps(required[0], ensure_ascii=False)}:" + (' "' if text else "")


def _name(tool: dict[str, Any]) -> str | None:
    """Name of a tool, or of the function of a choice, which /v1/responses writes without an object `function`."""
    function = tool.get("function", tool)
    found = function.get("name") if isinstance(function, dict) else None
    return found if isinstance(found, str) else None
