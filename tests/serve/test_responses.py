"""/v1/responses with the official client: a conversation that is gone on with by the id of its last response."""

from types import MappingProxyType

import pytest
from openai import APIStatusError
from serving import Alone, client_of, loaded, make_service, served

TEXTS = ["Hello you", "And then what?", "x", "Tell me about foxes", "Why so?", "a longer message, of words"]


@pytest.fixture(scope="module")
def model():
    return loaded()


@pytest.fixture(scope="module")
def client(model):
    with served(make_service(model)) as address:
        yield client_of(address)


def respond(client, text, previous=None, **more):
    first = {} if previous else {"instructions": "Be brief."}
    options = {"model": "tiny-llama", "temperature": 0, "max_output_tokens": 12} | first | more
    return client.responses.create(input=text, previous_response_id=previous, **options)


def without_unknown(text: str) -> str:
    """A reply of the engine as the client sees it."""
    return text.replace("<unk>", "")


class Plain(Alone):
    """Without a bias, which the API of responses does not have."""

    bias = MappingProxyType({})


def test_a_conversation_of_responses_equals_the_engine_alone(client, model):
    alone, previous = Plain(model), None
    for i, text in enumerate(TEXTS):
        if i % 2:
            events = list(respond(client, text, previous, stream=True))
            assert [e.sequence_number for e in events] == list(range(len(events)))
            answer = events[-1].response
            assert events[-1].type == "response.incomplete"
            assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == answer.output_text
        else:
            answer = respond(client, [{"role": "user", "content": text}] if i else text, previous)
        assert answer.output_text == without_unknown(alone.say(text))
        assert answer.status == "incomplete" and answer.incomplete_details.reason == "max_output_tokens"
        previous = answer.id
    assert answer.usage.input_tokens_details.cached_tokens > 0 and alone.evicted_turns


def test_an_earlier_response_can_be_gone_on_with_in_another_way(client, model):
    first = respond(client, "one")
    second = respond(client, "two", first.id)
    other = respond(client, "another two", first.id, truncation="disabled")
    again = respond(client, "three", second.id)
    alone, branch = Plain(model), Plain(model)
    assert first.output_text == without_unknown(alone.say("one"))
    branch.say("one")
    assert second.output_text == without_unknown(alone.say("two"))
    assert other.output_text == without_unknown(branch.say("another two"))
    assert again.output_text == without_unknown(alone.say("three"))


def test_what_is_not_known_or_served_is_refused(client):
    with pytest.raises(APIStatusError) as error:
        respond(client, "x", "resp_unknown")
    assert error.value.status_code == 404
    first = respond(client, "x")
    assert respond(client, "x", tools=[], include=[]).status, "clients send empty ones"
    for wrong in (
        {"instructions": "Be long.", "previous_response_id": first.id},
        {"tools": [{"type": "web_search"}]},
        {"include": ["reasoning.encrypted_content"]},
    ):
        with pytest.raises(APIStatusError) as error:
            client.responses.create(model="tiny-llama", input="x", **wrong)
        assert error.value.status_code == 400


def test_a_branch_that_writes_no_reply_leaves_no_session(model, monkeypatch):
    service = make_service(model, resident=2)
    with served(service) as address:
        client = client_of(address)
        first = respond(client, "one")
        respond(client, "two", first.id)
        before = set(service.store.sessions)

        def fails(*_):
            raise RuntimeError("out of luck")

        for owner, name in ((service.conversations, "_feed"), (service.planner, "rewind")):
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, fails)
                with pytest.raises(APIStatusError) as error:
                    respond(client, "three", first.id)
                assert error.value.status_code == 500 and set(service.store.sessions) == before
        assert respond(client, "three", first.id).status and len(service.store.sessions) == 2
