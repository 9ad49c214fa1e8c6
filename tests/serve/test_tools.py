"""Calls of tools: taken out of a reply where the template says how they are written; text otherwise."""

import json

import pytest
from openai import BadRequestError
from openai.types.chat import ChatCompletion
from serving import client_of, loaded, make_service, served, user
from tool_case import CALL, TEMPLATE, TOOLS, Planned

from sinkstream.serve import conversation
from sinkstream.serve.schemas import ChatMessage
from sinkstream.serve.tools import CallFilter, Tagged, WholeJson, tool_format, with_calls


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


# ---- what a reply holds ----


@pytest.mark.parametrize(
    ("form", "text", "before", "expected"),
    [
        (Tagged(), CALL, "", [("rain", {"day": 3})]),
        (Tagged(), f"I look.\n{CALL}\n{CALL}", "I look.", [("rain", {"day": 3})] * 2),
        (Tagged(), '<tool_call>\n{"name": "now"}\n</tool_call>', "", [("now", {})]),
        (WholeJson(), ' {"name": "rain", "parameters": {"day": 3}}', "", [("rain", {"day": 3})]),
    ],
)
def test_calls_are_taken_out(form, text, before, expected):
    message = with_calls(assistant(text), form, "chatcmpl_0123456789abcdef")
    calls = message["tool_calls"]
    assert [(c["function"]["name"], c["function"]["arguments"]) for c in calls] == expected
    assert message["content"] == before and len({c["id"] for c in calls}) == len(calls)
    assert with_calls(assistant(text), None, "r") == assistant(text), "no tools were given"


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (Tagged(), "It rains."),
        (Tagged(), "<tool_call>rain</tool_call>"),
        (Tagged(), '<tool_call>{"name": "rain"'),
        (Tagged(), '<tool_call>{"name": 3}</tool_call>'),
        (Tagged(), '<tool_call>{"name": "rain", "arguments": 3}</tool_call>'),
        (Tagged(), f"{CALL} and more"),
        (WholeJson(), '{"rain": 1}'),
        (WholeJson(), 'I say {"name": "rain", "parameters": {}}'),
    ],
)
def test_what_is_no_call_stays_text(form, text):
    assert with_calls(assistant(text), form, "r") == assistant(text)
    calling = CallFilter(form, "r")
    sent = "".join(calling.push(character) for character in text)
    rest, calls = calling.finish()
    assert sent + rest == text and not calls


def test_a_stream_shows_nothing_of_a_call():
    calling = CallFilter(Tagged(), "r")
    sent = "".join(calling.push(character) for character in f"I < you. {CALL}")
    assert sent == "I < you.", "the space before a call is no text, as in a reply that is not streamed"
    rest, calls = calling.finish()
    assert rest == "" and calls[0]["function"] == {"name": "rain", "arguments": {"day": 3}}


def test_the_format_is_that_of_the_template():
    assert isinstance(tool_format(TEMPLATE), Tagged)
    llama = '{% if tools %}Respond with {"name": function, "parameters": values}{% endif %}'
    assert isinstance(tool_format(llama), WholeJson)
    assert tool_format("{{ tools }}") is None and tool_format("<tool_call>") is None and tool_format(None) is None


def test_arguments_reach_the_template_as_an_object():
    def sent(arguments: str) -> object:
        call = {"id": "c", "type": "function", "function": {"name": "rain", "arguments": arguments}}
        return ChatMessage(role="assistant", tool_calls=[call]).plain()["tool_calls"][0]["function"]["arguments"]

    assert sent('{"day": 3}') == {"day": 3} and sent("3") == "3" and sent("no json") == "no json"


def test_arguments_that_no_template_can_take_stay_a_text(client):
    """Nested deeper than Python's stack, or than a session's file can be; half of a surrogate pair."""
    for arguments in ("[" * 100_000, '{"a":' * 600 + "1" + "}" * 600, '{"a": "\\ud800"}', '{"\\udc00": 1}', "9" * 9000):
        call = {"id": "c", "type": "function", "function": {"name": "rain", "arguments": arguments}}
        plain = ChatMessage(role="assistant", tool_calls=[call]).plain()["tool_calls"][0]["function"]["arguments"]
        assert plain == arguments
    Planned.said = ["dry"]
    called = {
        "role": "assistant",
        "content": "",
        "tool_calls": [call | {"function": {"name": "rain", "arguments": "["}}],
    }
    messages = [user("wet?"), called, {"role": "tool", "tool_call_id": "c", "content": "no"}, user("so?")]
    assert ask(client, messages).choices[0].message.content == "dry", "control"


@pytest.mark.parametrize(
    "text", ['{"name": "f", "arguments": ' + "[" * 5000, '{"name": "f", "arguments": {"a": "\\ud800"}}']
)
def test_a_reply_that_no_parser_or_template_can_take_is_no_call(text):
    message = {"role": "assistant", "content": f"<tool_call>{text}</tool_call>"}
    assert with_calls(message, Tagged(), "resp_x") == message


def test_tools_that_are_nested_without_end_are_refused(client):
    schema: dict = {}
    for _ in range(150):
        schema = {"items": schema}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    with pytest.raises(BadRequestError, match="tools is nested deeper than 100 levels; accepted: less"):
        ask(client, [user("x")], tools=tools)


# ---- a conversation ----


@pytest.fixture
def client(monkeypatch):
    monkeypatch.setattr(conversation, "Reply", Planned)
    with served(make_service(loaded(template=TEMPLATE), cap=640)) as address:
        yield client_of(address)


def ask(client, messages: list, tools=TOOLS, **more) -> ChatCompletion:
    return client.chat.completions.create(model="tiny-llama", messages=messages, tools=tools, **more)


def test_a_conversation_with_a_tool_computes_new_tokens_only(client):
    Planned.said[:] = [CALL, "It is wet."]
    messages: list = [user("Rain?")]
    first = ask(client, messages)
    choice = first.choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    call = choice.message.tool_calls[0]
    assert call.function.name == "rain" and json.loads(call.function.arguments) == {"day": 3}
    pinned = f"<t>{json.dumps(TOOLS)}\n"
    assert first.usage.context["pinned"] == len(pinned)
    messages += [choice.message.model_dump(exclude_none=True)]
    messages += [{"role": "tool", "tool_call_id": call.id, "content": "wet"}]
    second = ask(client, messages)
    assert second.choices[0].message.content == "It is wet." and second.choices[0].finish_reason == "stop"
    assert second.usage.context["sent"] == len("\n<t>wet\n<a>"), "the call is in the stream already"
    assert second.usage.context["reused"] == first.usage.prompt_tokens + len(CALL)


def test_a_call_is_streamed_in_one_piece(client):
    Planned.said[:] = [f"I look. {CALL}"]
    chunks = [c for c in ask(client, [user("Rain?")], stream=True) if c.choices]
    text = "".join(c.choices[0].delta.content or "" for c in chunks)
    calls = [call for c in chunks for call in c.choices[0].delta.tool_calls or []]
    assert text == "I look." and len(calls) == 1 and calls[0].function.name == "rain"
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


NAMED = {"type": "function", "function": {"name": "rain"}}
ARGUMENTS = ' {"day": 3}}\n</tool_call> and more that is not read'


SNOW = {"type": "function", "function": {"name": "snow"}}
NEEDS_DAY = [{"type": "function", "function": {"name": "rain", "parameters": {"required": ["day"]}}}]
NEEDS_TEXT = [
    {"function": {"name": "rain", "parameters": {"required": ["d"], "properties": {"d": {"type": "string"}}}}}
]


@pytest.mark.parametrize(
    ("choice", "said", "tools", "stream"),
    [
        ("required", ARGUMENTS, TOOLS, False),
        (NAMED, ARGUMENTS, TOOLS, True),
        (NAMED, ARGUMENTS.removeprefix(' {"day":'), NEEDS_DAY, False),
        ("required", 'x"}}</tool_call>', NEEDS_TEXT, False),
        ("required", f'rain", "arguments":{ARGUMENTS}', [*TOOLS, SNOW], True),
    ],
)
def test_a_forced_reply_begins_as_a_call_and_ends_with_it(client, choice, said, tools, stream):
    Planned.said[:] = [said, "It is wet."]
    answer = ask(client, [user("Rain?")], tool_choice=choice, stream=stream, tools=tools)
    if stream:
        chunks = [c for c in answer if c.choices]
        assert not any(c.choices[0].delta.content for c in chunks)
        (call,) = [call for c in chunks for call in c.choices[0].delta.tool_calls or []]
        message = {"role": "assistant", "content": "", "tool_calls": [call.model_dump(exclude={"index"})]}
        assert chunks[-1].choices[0].finish_reason == "tool_calls"
    else:
        assert answer.choices[0].finish_reason == "tool_calls"
        message = answer.choices[0].message.model_dump(exclude_none=True)
    (call,) = message["tool_calls"]
    expected = {"d": "x"} if tools is NEEDS_TEXT else {"day": 3}
    assert call["function"]["name"] == "rain" and json.loads(call["function"]["arguments"]) == expected
    given = {"role": "tool", "tool_call_id": call["id"], "content": "wet"}
    later = ask(client, [user("Rain?"), message, given], tools=tools)
    end = "\n</tool_call>" if tools is NEEDS_TEXT else "</tool_call>"
    assert later.usage.context["sent"] == len(f"{end}\n<t>wet\n<a>"), "all but the end of the call is there"


def test_a_forced_call_that_the_model_does_not_complete_is_text():
    with served(make_service(loaded(template=TEMPLATE), cap=640)) as address:
        answer = ask(client_of(address), [user("Rain?")], tool_choice=NAMED, max_tokens=8)
    choice = answer.choices[0]
    assert choice.message.content.startswith('<tool_call>\n{"name": "rain", "arguments":')
    assert choice.finish_reason == "length" and not choice.message.tool_calls
    assert WholeJson().beginning("rain") == '{"name": "rain", "parameters":'
    assert Tagged().beginning(None) == '<tool_call>\n{"name": "'
    assert WholeJson().beginning("rain", '{"day":') == '{"name": "rain", "parameters": {"day":'


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"tool_choice": "sometimes"}, "tool_choice 'sometimes' is not served"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice 'allowed_tools' is not served"),
        ({"tool_choice": {"type": "function", "function": {"name": "snow"}}}, "accepted: rain"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools of type 'custom' are not served"),
        ({"tools": [], "tool_choice": "required"}, "there are no tools in this request"),
    ],
)
def test_what_cannot_be_forced_is_refused_by_name(client, more, words):
    given = {"model": "tiny-llama", "messages": [user("Rain?")], "tools": TOOLS} | more
    with pytest.raises(BadRequestError, match=words) as refused:
        client.chat.completions.create(**given)
    assert refused.value.param in ("tools", "tool_choice")


def test_a_session_keeps_the_tools_that_it_began_with(client):
    Planned.said[:] = ["Yes.", "No.", "Well."]
    opened = client.post("/sessions", body={"tools": TOOLS, "messages": []}, cast_to=object)["id"]
    for tools in (TOOLS, TOOLS, None):
        more = {"tools": tools} if tools else {}
        client.chat.completions.create(
            model="tiny-llama", messages=[user("Rain?")], extra_body={"session_id": opened} | more
        )
    with pytest.raises(BadRequestError, match="tools differ from those of the session"):
        client.chat.completions.create(
            model="tiny-llama", messages=[user("Snow?")], tools=[SNOW], extra_body={"session_id": opened}
        )


def test_without_tools_a_reply_is_text(client):
    Planned.said[:] = [CALL]
    answer = client.chat.completions.create(model="tiny-llama", messages=[user("Rain?")])
    assert answer.choices[0].message.content == CALL and answer.choices[0].finish_reason == "stop"


def test_tools_are_refused_where_the_template_would_leave_them_out():
    """A model whose template knows no tools would answer as if none were given."""
    silent = TEMPLATE.replace("tools", "nothing")
    with served(make_service(loaded(template=silent), cap=64)) as address:
        client = client_of(address)
        for call in (
            lambda: ask(client, [user("Rain?")]),
            lambda: client.post("/sessions", body={"tools": TOOLS, "messages": []}, cast_to=object),
        ):
            with pytest.raises(BadRequestError, match="tools are not served") as refused:
                call()
            assert refused.value.param == "tools"
        assert ask(client, [user("Rain?")], tool_choice="none", max_tokens=2).usage.completion_tokens <= 2
