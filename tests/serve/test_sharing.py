"""Several servers on one folder: a session goes on on any of them with the same tokens, one of them at a time."""

import os
import threading
import time
from contextlib import ExitStack

import httpx2 as httpx
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

from sinkstream.records.files import WriteError
from sinkstream.serve import heartbeats
from sinkstream.serve.files import SessionFiles
from sinkstream.serve.health import health_of_all
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
    with pytest.raises(ValueError, match=r"^spill=None is not accepted.*accepted: a --spill folder$"):
        ServeSettings(shared=True)
    with pytest.raises(ValueError, match=r"^write='idle' is not accepted.*accepted: --write turn$"):
        ServeSettings(shared=True, spill=tmp_path, write="idle")
    assert ServeSettings(shared=True, spill=tmp_path).shared


def test_figures_are_those_of_all_servers_by_name(two, model, tmp_path, monkeypatch):
    (one, other), services = two
    for client, count in ((one, 1), (other, 2)):
        for _ in range(count):
            say(client, opened(client), "x", 2)
    names = [service._beats.name for service in services]

    def requests(client) -> dict[str, float]:
        families = {f.name: f for f in text_string_to_metric_families(client.get("../metrics", cast_to=str))}
        assert set(families["sinkstream_ttft_seconds"].samples[0].labels) == {"le", "replica"}
        return {
            s.labels["replica"]: s.value for s in families["sinkstream_requests"].samples if s.name.endswith("total")
        }

    requests(other)  # has written its figures
    assert requests(one) == dict(zip(names, (1, 2))) == requests(other)
    services[1]._beats._ends.set()
    monkeypatch.setattr(heartbeats, "GONE_SECONDS", 0)
    assert requests(one) == {names[0]: 1}, "a server that has written nothing for long is gone"
    services[1]._beats.stop()
    assert [path.stem for path in tmp_path.glob("*.prom")] == [names[0]]


def test_the_health_is_that_of_all_servers(model, tmp_path, monkeypatch):
    """One that is silent is gone, the other one answers; whoever requires all of them is refused."""
    services = [make_service(model, resident=2, spill=tmp_path, shared=True, replicas=2) for _ in range(2)]
    names = [service._beats.name for service in services]

    def health(address: str, **params) -> tuple[int, dict]:
        answer = httpx.get(address + "/health", params=params)
        return answer.status_code, answer.json()

    with served(services[0]) as one:
        code, body = health(one)
        assert (code, body["status"], body["serving"], body["expected"]) == (200, "degraded", 1, 2)
        with served(services[1]) as other:
            for address, name in ((one, names[0]), (other, names[1])):
                code, body = health(address, require="all")
                assert (code, body["status"], body["serving"], body["running"]) == (200, "ok", 2, 0)
                assert {r["replica"]: r["state"] for r in body["replicas"]} == dict.fromkeys(names, "serves")
                assert body["replicas"][0]["replica"] == name and body["replicas"][0]["heard_seconds"] == 0
            services[1]._beats._ends.set()  # as if it were killed
            monkeypatch.setattr(heartbeats, "GONE_SECONDS", 0)
            code, body = health(one)
            assert (code, body["status"]) == (200, "degraded")
            assert {r["replica"]: r["state"] for r in body["replicas"]} == dict(zip(names, ("serves", "gone")))
            assert health(one, require="all")[0] == 503
            assert health(one, require="some")[0] == 400
            monkeypatch.setattr(heartbeats, "FORGOTTEN_SECONDS", 0)
            assert [r["replica"] for r in health(one)[1]["replicas"]] == names[:1]
        monkeypatch.undo()
        kept = services[0].scheduler
        monkeypatch.setattr(type(kept), "alive", property(lambda self: False))
        assert health(one)[0] == 503 and health(one)[1]["status"] == "failed"
        monkeypatch.undo()
        assert health(one)[0] == 200, "control"
    assert not list(tmp_path.glob("*.health"))


def test_a_server_without_others_is_healthy_while_its_scheduler_runs(model):
    service = make_service(model)
    with served(service) as address:
        found = httpx.get(address + "/health")
        assert found.status_code == 200 and found.json()["status"] == "ok" and "replicas" not in found.json()
        service.scheduler.stop()
        found = httpx.get(address + "/health")
        assert found.status_code == 503 and found.json()["status"] == "failed"


def test_a_full_disk_is_no_silence(tmp_path, monkeypatch):
    def full(path, text):
        raise WriteError("no space left")

    one, other = (heartbeats.Heartbeats(tmp_path, lambda name: {"health": name}) for _ in range(2))
    one._write()
    other._write()
    old = time.time() - 60
    for name in (one.name, other.name):
        os.utime(tmp_path / f"{name}.health", (old, old))
    assert [beat.gone for beat in one.read("health")] == [False, True], "control: nothing was told meanwhile"
    monkeypatch.setattr(heartbeats, "write_atomically", full)
    other._write()
    assert [(beat.name, beat.gone) for beat in one.read("health")] == [(one.name, False), (other.name, False)]
    one.stop()
    other.stop()
    assert not list(tmp_path.iterdir())


def test_a_server_that_has_ended_tells_nothing(tmp_path):
    """/health may be asked while the server ends: the others would take it for one that is gone, for two minutes."""
    beats = heartbeats.Heartbeats(tmp_path, lambda name: {"health": name})
    beats.start()
    assert [beat.name for beat in beats.read("health")] == [beats.name] and list(tmp_path.iterdir())
    beats.stop()
    assert [beat.text for beat in beats.read("health")] == [beats.name]
    assert not list(tmp_path.iterdir())


def test_a_session_that_is_written_while_the_folder_is_listed_is_not_taken_for_deleted(tmp_path, monkeypatch):
    """The thread of the disk writes it after the listing, and frees its claim."""
    files, session = SessionFiles(tmp_path, 10**9, shared=True), Session("me")
    scan = os.scandir

    def listed_before(folder):
        found = list(scan(folder))
        monkeypatch.setattr(os, "scandir", scan)
        files.write(session, b"data")
        return iter(found)

    monkeypatch.setattr(os, "scandir", listed_before)
    assert files.changes() == ([], [])
    assert files.changes() == ([], []) and files.current(session.id)


def test_a_copy_for_which_there_is_no_room_leaves_nothing_in_memory(model, tmp_path):
    service = make_service(model, resident=2, spill=tmp_path, shared=True, disk_mb=0)
    with served(service) as address:
        client = client_of(address)
        session = opened(client)
        say(client, session, "one")
        with pytest.raises(APIStatusError) as error:
            client.post(f"/sessions/{session}/fork", cast_to=object)
        assert error.value.status_code == 429
        assert service.store.spill.counts().ram == 0 and list(service.store.sessions) == [session]


@pytest.mark.parametrize("text", ["[1]", '{"state": "serves"}', "no JSON"])
def test_what_another_release_tells_of_its_health_is_a_replica_that_failed(text):
    beats = type("Beats", (), {"read": lambda self, ending: [heartbeats.Heartbeat("a", text, 0.0)]})()
    found = health_of_all(beats, 1)
    assert found.status == "failed" and found.about["replicas"][0]["state"] == "failed"
