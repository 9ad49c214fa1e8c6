"""Conversations over HTTP with the official client: what a session says is what the engine says alone."""

import threading

import pytest
from openai import NotFoundError
from serving import BIAS, CAP, SYSTEM, Alone, client_of, loaded, make_service, served, user

TEXTS = ["Hello you", "And then what?", "x", "Tell me about 12 foxes", "Why?", "a longer message, of some words"] * 3


@pytest.fixture(scope="module")
def model():
    return loaded()


@pytest.fixture(scope="module")
def address(model):
    with served(make_service(model, resident=2)) as found:
        yield found


@pytest.fixture
def client(address):
    return client_of(address)


def chat(client, messages, **more):
    options = {"temperature": 0, "max_tokens": 12, "logit_bias": BIAS} | more
    return client.chat.completions.create(model="tiny-llama", messages=messages, **options)


def streamed(client, messages, **more) -> str:
    return "".join(c.choices[0].delta.content or "" for c in chat(client, messages, stream=True, **more) if c.choices)


def test_a_conversation_of_many_caps_equals_the_engine_alone(client, model):
    alone, messages, contexts = Alone(model), [SYSTEM], []
    for i, text in enumerate(TEXTS):
        messages.append(user(text))
        if i % 2:
            reply = streamed(client, messages)
        else:
            answer = chat(client, messages)
            reply = answer.choices[0].message.content
            contexts.append(answer.usage)
        assert reply == alone.say(text), f"turn {i}"
        messages.append({"role": "assistant", "content": reply})
    assert alone.engine.stats()["seen"] > 4 * CAP and contexts[-1].context["evicted_turns"] > 10
    assert contexts[-1].context["pinned"] == len("<s>Be brief.\n")
    for usage in contexts[1:]:
        assert usage.prompt_tokens_details.cached_tokens > usage.context["sent"] > 0, "old turns are not computed again"
        assert usage.context["kept"] <= CAP
        assert usage.prompt_tokens + usage.completion_tokens == usage.context["kept"] + usage.context["evicted"]


def test_a_session_by_its_id_takes_new_messages_only(client, address, model):
    session = client.post("/sessions", body={"messages": [SYSTEM]}, cast_to=object)
    alone = Alone(model)
    for text in TEXTS[:8]:
        answer = chat(client, [user(text)], extra_body={"session_id": session["id"]})
        assert answer.choices[0].message.content == alone.say(text)
    stats = client.get(f"/sessions/{session['id']}", cast_to=object)
    assert stats["tokens"]["seen"] == alone.engine.stats()["seen"]
    assert stats["turns"] == {"seen": 8, "evicted": alone.evicted_turns} and alone.evicted_turns > 3


def test_sessions_that_take_turns_do_not_disturb_each_other(address, model):
    """Three sessions in two places of memory, in three threads."""
    expected, found = {}, {}

    def talk(name: str) -> None:
        client, messages, replies = client_of(address), [{"role": "system", "content": f"You are {name}"}], []
        for text in TEXTS[:7]:
            messages.append(user(f"{name} {text}"))
            replies.append(streamed(client, messages))
            messages.append({"role": "assistant", "content": replies[-1]})
        found[name] = replies

    for name in ("Ann", "Bo", "Cy"):
        alone = Alone(model, f"You are {name}")
        expected[name] = [alone.say(f"{name} {text}") for text in TEXTS[:7]]
    threads = [threading.Thread(target=talk, args=(name,)) for name in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == expected
    assert len({tuple(replies) for replies in expected.values()}) == 3


def test_a_message_longer_than_the_window_streams_through(client, model):
    alone, messages = Alone(model), [SYSTEM]
    for text in ("short", "long " * 60, "and now?", "x"):
        messages.append(user(text))
        answer = chat(client, messages)
        assert answer.choices[0].message.content == alone.say(text)
        messages.append({"role": "assistant", "content": answer.choices[0].message.content})
        assert answer.usage.context["kept"] <= CAP


def test_a_last_turn_that_is_asked_again_or_changed_is_computed_from_there(client, model):
    messages = [{"role": "system", "content": "Regen"}, user("one")]
    first = chat(client, messages)
    assert chat(client, messages).choices[0].message.content == first.choices[0].message.content
    messages += [{"role": "assistant", "content": first.choices[0].message.content}, user("two")]
    second = chat(client, messages)
    messages[-1] = user("another two")
    changed = chat(client, messages)
    alone = Alone(model, "Regen")
    alone.say("one")
    assert changed.choices[0].message.content == alone.say("another two") != second.choices[0].message.content
    assert changed.usage.context["session"] == second.usage.context["session"]
    assert changed.usage.context["sent"] == len("<u>another two\n<a>")


def test_a_reply_that_a_client_changes_is_fed_from_there(client, model):
    messages = [{"role": "system", "content": "Edit"}, user("one")]
    chat(client, messages)
    messages += [{"role": "assistant", "content": "something else"}, user("two")]
    changed = chat(client, messages)
    alone = Alone(model, "Edit")
    alone._feed("<u>one\n<a>something else\n")
    assert changed.choices[0].message.content == alone.say("two")


def test_the_first_eviction_is_told_once(client):
    messages, told = [{"role": "system", "content": "Tell"}], []
    for text in TEXTS[:6]:
        messages.append(user(text))
        reply = ""
        for chunk in chat(client, messages, stream=True):
            reply += chunk.choices[0].delta.content or ""
            context = (chunk.model_extra or {}).get("context")
            if context and context["first_eviction"]:
                told.append((text, context["evicted"]))
        messages.append({"role": "assistant", "content": reply})
    assert len(told) == 1 and told[0][1] > 0


def test_the_first_eviction_is_told_in_a_whole_reply_too(client):
    """Also where the prompt itself pushes tokens out, before the reply."""
    messages = [{"role": "system", "content": "Tell all"}, user("a long message " * 12)]
    contexts = []
    for _ in range(2):
        answer = chat(client, messages)
        contexts.append(answer.usage.model_extra["context"])
        messages += [{"role": "assistant", "content": answer.choices[0].message.content}, user("again")]
    assert [context["first_eviction"] for context in contexts] == [True, False]
    assert contexts[0]["evicted"] > 0


def test_without_a_system_prompt_the_first_tokens_are_the_sink(client, model):
    alone, messages = Alone(model, None), []
    for text in TEXTS[:6]:
        messages.append(user(f"no system {text}"))
        answer = chat(client, messages)
        assert answer.choices[0].message.content == alone.say(f"no system {text}")
        messages.append({"role": "assistant", "content": answer.choices[0].message.content})
    assert answer.usage.context["pinned"] == 4


def test_a_system_prompt_of_more_than_half_the_cap_is_refused(client):
    with pytest.raises(Exception, match="never evicted; accepted: at most 48") as error:
        chat(client, [{"role": "system", "content": "x" * 60}, user("hi")])
    assert error.value.status_code == 400 and error.value.code == "pinned_prompt_too_long"


def test_fewer_pinned_slots_are_reserved_where_the_server_is_told_so():
    """A lane is as much smaller; replies are those of before."""
    system, few = "Be brief, please.", 24
    services = [make_service(pinned=pinned) for pinned in (few, None)]
    assert [service.lanes.most_pinned for service in services] == [few, CAP // 2]
    assert services[0].lanes.bytes < services[1].lanes.bytes
    alone = Alone(loaded(), system)
    with served(services[0]) as address:
        client, messages = client_of(address), [{"role": "system", "content": system}]
        for text in TEXTS[:4]:
            messages.append(user(text))
            answer = chat(client, messages)
            assert answer.choices[0].message.content == alone.say(text)
            messages.append({"role": "assistant", "content": answer.choices[0].message.content})
        with pytest.raises(Exception, match=f"accepted: at most {few} of the {CAP} slots"):
            chat(client, [{"role": "system", "content": "x" * few}, user("hi")])
    with pytest.raises(ValueError, match=f"pinned=49 is not accepted; accepted: at most {CAP // 2}, half of the"):
        make_service(pinned=49)


def test_a_session_that_was_found_by_its_messages_goes_on_by_its_id(client, model):
    """Its id is told in `usage`; the last turn must not be taken for one that is asked again."""
    first = chat(client, [SYSTEM, user("one")])
    session = first.usage.model_extra["context"]["session"]
    alone = Alone(model)
    assert first.choices[0].message.content == alone.say("one")
    second = chat(client, [user("two")], extra_body={"session_id": session})
    assert second.choices[0].message.content == alone.say("two")
    assert second.usage.model_extra["context"]["reused"] > len("<s>" + SYSTEM["content"]) + 8
    assert session in [found["id"] for found in client.get("/sessions", cast_to=object)["data"]]
    with pytest.raises(NotFoundError, match="previous response"):
        client.responses.create(model=model.name, input="x", previous_response_id=chat(client, [user("z")]).id)
