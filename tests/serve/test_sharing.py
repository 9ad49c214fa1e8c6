"""Several servers on one folder: a session goes on on any of them with the same tokens, one of them at a time."""

import threading
import time
from contextlib import ExitStack

import pytest
from openai import APIStatusError
from prometheus_client.parser import text_string_to_metric_families
from serving import (
    BIAS,
    SYSTEM,
    TEXTS,
    Alone,
    client_of,
    loaded,
    make_service,
    opened,
    say,
    served,
    slow_disk,
    user,
)

from sinkstream.serve import shared_metrics
from sinkstream.serve.files import SessionFiles
from sinkstream.serve.sessions import Session
from sinkstream.serve.settings import ServeSettings


@pytest.fixture(scope="module")
def model():
    return loaded()


@pytest.fixture
def two(model, tmp_path):
    """Clients of two servers on one folder, and the services."""
    services = [make_service(model, resident=2, spill=tmp_path, shared=True) for _ in range(2)]
    with ExitStack() as stack:
        yield [client_of(stack.enter_context(served(service))) for service in services], services


def test_a_session_goes_from_server_to_server(two, model):
    (one, other), services = two
    session, alone = opened(one), Alone(model)
    for client, text in zip([other, one, one, other, other, one], TEXTS):
        assert say(client, session, text) == alone.say(text)
    seen = alone.engine.stats()["seen"]
    for client in (one, other):
        assert client.get(f"/sessions/{session}", cast_to=object)["tokens"]["seen"] == seen
        assert [found["id"] for found in client.get("/sessions", cast_to=object)["data"]] == [session]
    assert alone.engine.stats()["evicted"], "control: the session forgets"
    other.delete(f"/sessions/{session}", cast_to=object)
    with pytest.raises(APIStatusError) as error:
        say(one, session, "x")
    assert error.value.status_code == 404 and not services[0].residence.resident


def test_forks_saved_copies_and_messages_are_found_on_the_other_server(two, model):
    (one, other), _ = two
    session, alone = opened(one), Alone(model)
    assert say(one, session, TEXTS[0]) == alone.say(TEXTS[0])
    other.post(f"/sessions/{session}/save", body={"name": "talk"}, cast_to=object)
    fork = other.post(f"/sessions/{session}/fork", cast_to=object)["id"]
    copy = one.post("/sessions/load", body={"name": "talk"}, cast_to=object)["id"]
    expected = alone.say(TEXTS[1])
    assert say(one, fork, TEXTS[1]) == say(other, copy, TEXTS[1]) == say(other, session, TEXTS[1]) == expected
    messages, alone = [SYSTEM], Alone(model)
    for client, text in zip([one, other, other, one], TEXTS):
        messages.append(user(text))
        answer = client.chat.completions.create(
            model="tiny-llama", messages=messages, temperature=0, max_tokens=12, logit_bias=BIAS
        )
        assert answer.choices[0].message.content == alone.say(text)
        messages.append({"role": "assistant", "content": answer.choices[0].message.content})
    assert answer.usage.context["reused"] > answer.usage.context["sent"]


def test_a_reply_ends_once_it_is_written_and_the_other_server_waits_for_it(two, model, monkeypatch):
    (one, other), services = two
    session, alone = opened(one), Alone(model)
    go = slow_disk(monkeypatch, services[0].store.spill.files)
    said: dict[str, str] = {}
    first = threading.Thread(target=lambda: said.update(first=say(one, session, TEXTS[0])))
    first.start()
    while services[0].store.spill.written(session):
        time.sleep(0.01)
    second = threading.Thread(target=lambda: said.update(second=say(other, session, TEXTS[1])))
    second.start()
    second.join(0.2)
    assert not said
    with pytest.raises(APIStatusError) as error:
        other.post(f"/sessions/{session}/undo", cast_to=object)
    assert error.value.code == "session_busy"
    go.set()
    first.join()
    second.join()
    assert said == {"first": alone.say(TEXTS[0]), "second": alone.say(TEXTS[1])}


def test_a_session_in_use_elsewhere_is_not_given_up(tmp_path):
    one, other = (SessionFiles(tmp_path, 10**9, shared=True) for _ in range(2))
    session = Session("me")
    assert one.claims.claim(session.id) and not other.claims.claim(session.id)
    one.write(session, b"data")
    assert [s.id for s in other.changes()[0]] == [session.id] and not one.changes()[0], "its own file is no news"
    assert other.claims.claim(session.id) and other.current(session.id), "what is written is free"
    other.delete(session.id)
    assert one.changes() == ([], [session.id]) and not list(tmp_path.iterdir())


def test_what_shared_sessions_need_is_refused_without_it(tmp_path):
    with pytest.raises(ValueError, match="accepted: a --spill folder and --write turn"):
        ServeSettings(shared=True)
    with pytest.raises(ValueError, match="write='idle'"):
        ServeSettings(shared=True, spill=tmp_path, write="idle")


def test_figures_are_those_of_all_servers_by_name(two, model, tmp_path, monkeypatch):
    (one, other), services = two
    for client, count in ((one, 1), (other, 2)):
        for _ in range(count):
            say(client, opened(client), "x", 2)
    names = [service.metrics._shared.name for service in services]

    def requests(client) -> dict[str, float]:
        families = {f.name: f for f in text_string_to_metric_families(client.get("../metrics", cast_to=str))}
        assert set(families["sinkstream_ttft_seconds"].samples[0].labels) == {"le", "replica"}
        return {
            s.labels["replica"]: s.value for s in families["sinkstream_requests"].samples if s.name.endswith("total")
        }

    requests(other)  # has written its figures
    assert requests(one) == dict(zip(names, (1, 2))) == requests(other)
    monkeypatch.setattr(shared_metrics, "GONE_SECONDS", -1)
    assert requests(one) == {names[0]: 1}, "a server that has written nothing for long is gone"
    services[1].metrics.stop()
    assert [path.stem for path in tmp_path.glob("*.prom")] == [names[0]]
