"""Functions in /v1/responses, with the official client: calls out, what they gave back in."""

import json

import pytest
from openai import BadRequestError
from serving import client_of, loaded, make_service, served
from tool_case import CALL, TEMPLATE, TOOLS, Planned

from sinkstream.serve import conversation
from sinkstream.serve.service import Service
from sinkstream.serve.sessions import split_head

FUNCTIONS = [{"type": "function", **TOOLS[0]["function"], "strict": True}]
GAVE = "wet"
NEXT = f"\n<t>{GAVE}\n<a>"  # what is new for the template once a call was answered


@pytest.fixture
def service(monkeypatch) -> Service:
    monkeypatch.setattr(conversation, "Reply", Planned)
    return make_service(loaded(template=TEMPLATE), cap=640)


@pytest.fixture
def client(service):
    with served(service) as address:
        yield client_of(address)


def respond(client, given, **more):
    return client.responses.create(model="tiny-llama", input=given, tools=FUNCTIONS, **more)


def output(call) -> dict:
    return {"type": "function_call_output", "call_id": call.call_id, "output": GAVE}


def test_a_call_comes_as_an_item_and_what_it_gave_is_all_that_is_computed(client, service):
    Planned.said[:] = [CALL, "It is wet."]
    first = respond(client, "Rain?")
    (call,) = first.output
    assert call.type == "function_call" and call.name == "rain" and json.loads(call.arguments) == {"day": 3}
    assert first.status == "completed" and first.output_text == "" and first.tools[0].name == "rain"
    second = respond(client, [output(call)], previous_response_id=first.id)
    assert second.output_text == "It is wet." and [item.type for item in second.output] == ["message"]
    assert second.usage.context["sent"] == len(NEXT)
    (session,) = service.store.sessions.values()
    assert session.tools == TOOLS, "as chat templates take them"
    assert [m["role"] for m in split_head(session.turn)[1]] == ["user", "assistant", "tool", "assistant"]


@pytest.mark.parametrize(("text", "store"), [("", False), ("I look.", True)])
def test_a_stream_has_the_typed_events_and_its_items_can_be_sent_again(client, text, store):
    Planned.said[:] = [f"{text}{CALL}", "It is wet."]
    question = {"role": "user", "content": "Rain?"}
    events = list(respond(client, [question], stream=True, store=store))
    assert [e.sequence_number for e in events] == list(range(len(events)))
    kinds = [e.type.removeprefix("response.") for e in events if e.type != "response.context"]
    a_call = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]
    if text:
        assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == text
        message = ["output_item.added", "content_part.added", "output_text.delta"]
        assert kinds[2:5] == message and kinds[-8:-5] == ["output_text.done", "content_part.done", "output_item.done"]
    assert kinds[:2] == ["created", "in_progress"] and kinds[-5:] == [*a_call, "completed"]
    assert text or len(kinds) == 7
    response = events[-1].response
    done = [e.item for e in events if e.type == "response.output_item.done"]
    assert done == response.output and [e.output_index for e in events if e.type.endswith("item.done")] == [
        *range(len(done))
    ]
    call = response.output[-1]
    (told,) = [e for e in events if e.type == "response.function_call_arguments.done"]
    assert told.arguments == call.arguments and told.item_id == call.id
    again = [question, *(item.model_dump() for item in response.output), output(call)]
    second = respond(client, again, store=store)
    assert second.output_text == "It is wet."
    assert second.usage.context["sent"] == len(NEXT), "the client sends everything again, and nothing is computed twice"


def test_a_forced_call_and_a_forbidden_one(client):
    Planned.said[:] = [' {"day": 3}}\n</tool_call> and more', CALL]
    forced = respond(client, "Rain?", tool_choice={"type": "function", "name": "rain"})
    assert [item.type for item in forced.output] == ["function_call"]
    assert json.loads(forced.output[0].arguments) == {"day": 3} and forced.tool_choice.name == "rain"
    forbidden = respond(client, "Rain?", tool_choice="none")
    assert forbidden.output_text == CALL, "no call was asked for"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools of type 'web_search' are not served; accepted: function"),
        ({"tools": [{"type": "function"}]}, "a tool has no name"),
        ({"tool_choice": "sometimes"}, "tool_choice 'sometimes' is not served"),
        ({"tool_choice": {"type": "function", "name": "snow"}}, "tool_choice names 'snow'; accepted: rain"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice 'web_search' is not served"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input items of type 'reasoning' are not served"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "has no call_id"),
        ({"text": {"format": {"type": "json_object"}}}, "text of a response is not served; accepted: the format text"),
        ({"reasoning": {"effort": "low"}}, "reasoning: Extra inputs are not permitted"),
    ],
)
def test_what_is_not_served_is_refused_by_name(client, more, words):
    with pytest.raises(BadRequestError, match=words) as refused:
        client.responses.create(**{"model": "tiny-llama", "input": "Rain?", "tools": FUNCTIONS} | more)
    assert refused.value.type == "invalid_request_error" and refused.value.param
