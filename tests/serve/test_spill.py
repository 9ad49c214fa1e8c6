"""Sessions that are spilled, forked, saved, loaded, restarted or damaged go on with the same tokens, or say why not."""

import json
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable
from http.client import HTTPConnection

import processes
import pytest
from openai import APIStatusError
from serving import (
    BIAS,
    CAP,
    SYSTEM,
    TEXTS,
    Alone,
    client_of,
    loaded,
    make_service,
    opened,
    save_chat_model,
    say,
    served,
    slow_disk,
    user,
)

from sinkstream.serve.errors import APIError
from sinkstream.serve.files import SessionFiles, SpillFull
from sinkstream.serve.sessions import Session
from sinkstream.serve.spill import Spill

HEADER_WITHOUT_HASH = '{"session": {"owner": "me", "turns": []}, "stream": "S"}'


@pytest.fixture(scope="module")
def model():
    return loaded()


def wait_until(true: Callable[[], object]) -> None:
    """Wait for something that other threads bring about."""
    while not true():
        time.sleep(0.01)


def state(client, session: str) -> str:
    return client.get(f"/sessions/{session}", cast_to=object)["state"]


@pytest.mark.parametrize("ram_mb", [0, 100])
def test_spilled_sessions_go_on_with_the_same_tokens(model, tmp_path, ram_mb):
    with served(make_service(model, resident=1, ram_mb=ram_mb, spill=tmp_path)) as address:
        client = client_of(address)
        sessions = [(opened(client, name), Alone(model, name)) for name in ("one", "another", "third one")]
        for text in TEXTS:
            for session, alone in sessions:
                assert say(client, session, text) == alone.say(text)
        places = sorted(state(client, session) for session, _ in sessions)
        assert places == (["ram", "ram", "resident"] if ram_mb else ["disk", "disk", "resident"])


def test_a_restarted_server_goes_on_with_what_it_spilled(model, tmp_path):
    alone = Alone(model)
    for texts in (TEXTS[:3], TEXTS[3:]):
        with served(make_service(model, spill=tmp_path)) as address:
            client = client_of(address)
            found = client.get("/sessions", cast_to=object)["data"]
            session = found[0]["id"] if found else opened(client)
            for text in texts:
                assert say(client, session, text) == alone.say(text)
    assert (tmp_path.stat().st_mode & 0o777) == 0o700


def test_a_session_that_pins_more_than_the_server_has_slots_for_stays_where_it_is(model, tmp_path):
    alone = Alone(model)
    with served(make_service(model, spill=tmp_path)) as address:
        session = opened(client_of(address))
        assert say(client_of(address), session, TEXTS[0]) == alone.say(TEXTS[0])
    few = make_service(model, spill=tmp_path, pinned=8, resident=1)
    with served(few) as address:
        client = client_of(address)
        for _ in range(2):  # the lane is not lost
            with pytest.raises(APIStatusError, match="pins 13 tokens, and this server has 8 slots") as error:
                say(client, session, TEXTS[1])
            assert error.value.code == "session_pins_too_much"
        assert say(client, opened(client, "x"), TEXTS[0])
    with served(make_service(model, spill=tmp_path)) as address:
        assert say(client_of(address), session, TEXTS[1]) == alone.say(TEXTS[1])


def test_a_conversation_that_is_sent_again_goes_on_after_a_restart(model, tmp_path):
    messages, alone = [SYSTEM], Alone(model)
    for text in TEXTS[:3]:
        with served(make_service(model, spill=tmp_path)) as address:
            messages.append(user(text))
            answer = client_of(address).chat.completions.create(
                model="tiny-llama", messages=messages, temperature=0, max_tokens=12, logit_bias=BIAS
            )
            assert answer.choices[0].message.content == alone.say(text)
            messages.append({"role": "assistant", "content": answer.choices[0].message.content})
    assert answer.usage.context["reused"] > answer.usage.context["sent"]


def test_forks_and_saved_copies_go_their_own_ways(model, tmp_path):
    with served(make_service(model, spill=tmp_path)) as address:
        client, alone, other = client_of(address), Alone(model), Alone(model)
        session = opened(client)
        for text in TEXTS[:3]:
            assert say(client, session, text) == alone.say(text) == other.say(text)
        fork = client.post(f"/sessions/{session}/fork", cast_to=object)["id"]
        saved = client.post(f"/sessions/{session}/save", body={"name": "my-talk"}, cast_to=object)
        assert saved["name"] == "my-talk" and client.get("/sessions", cast_to=object)["saved"] == ["my-talk"]
        expected = alone.say("this way")
        assert say(client, session, "this way") == expected
        assert say(client, fork, "or quite another") == other.say("or quite another") != expected
        copy = client.post("/sessions/load", body={"name": "my-talk"}, cast_to=object)["id"]
        assert say(client, copy, "this way") == expected


def test_a_turn_can_be_taken_back(model, tmp_path):
    with served(make_service(model, spill=tmp_path, resident=1)) as address:
        client, alone = client_of(address), Alone(model)
        session = opened(client)
        assert say(client, session, "one") == alone.say("one")
        say(client, session, "a mistake")
        view = client.post(f"/sessions/{session}/undo", cast_to=object)
        assert view["turns"] == {"seen": 1, "evicted": 0}
        say(client, opened(client, "pushes the other one out"), "x")
        assert state(client, session) == "ram"
        assert say(client, session, "two") == alone.say("two")
        for _ in range(2):
            client.post(f"/sessions/{session}/undo", cast_to=object)
        with pytest.raises(APIStatusError) as error:
            client.post(f"/sessions/{session}/undo", cast_to=object)
        assert error.value.status_code == 409
        assert say(client, session, "one") == Alone(model).say("one")


def test_a_turn_is_taken_back_later_where_all_memory_is_in_use(model, tmp_path):
    """The session itself is not in use: 429, which clients ask again, and not 409."""
    with served(make_service(model, resident=1, max_tokens=900, spill=tmp_path)) as address:
        client = client_of(address)
        session = opened(client)
        say(client, session, TEXTS[0])
        given = {"model": client.models.list().data[0].id, "stream": True, "max_tokens": 900}
        stream = client.chat.completions.create(messages=[user(TEXTS[1])], **given)
        next(iter(stream))
        with pytest.raises(APIStatusError) as caught:
            client.post(f"/sessions/{session}/undo", cast_to=object)
        error, wait = caught.value, caught.value.response.headers.get("retry-after")
        assert (error.status_code, error.code, wait) == (429, "server_busy", "5")
        stream.close()


def test_messages_can_be_appended_without_a_reply(model):
    with served(make_service(model)) as address:
        client, alone = client_of(address), Alone(model)
        session = opened(client)
        body = {"messages": [user("my name is Ann"), {"role": "assistant", "content": "ok"}]}
        view = client.post(f"/sessions/{session}/append", body=body, cast_to=object)
        alone.engine.begin_turn()
        alone._feed("<u>my name is Ann\n<a>ok\n")
        assert view["tokens"]["seen"] == alone.engine.stats()["seen"]
        assert say(client, session, "who am I?") == alone.say("who am I?")


# ---- what goes wrong ----


def test_a_damaged_file_is_told_and_the_server_goes_on(model, tmp_path):
    service = make_service(model, resident=1, ram_mb=0, spill=tmp_path)
    with served(service) as address:
        client = client_of(address)
        damaged = opened(client)
        say(client, damaged, "x")
        healthy = opened(client)
        say(client, healthy, "y")
        while not service.store.spill.written(damaged):  # replies do not wait for the disk
            time.sleep(0.01)
        path = next(tmp_path.glob(f"{damaged}.*.safetensors"))
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        with pytest.raises(APIStatusError) as error:
            say(client, damaged, "z")
        assert error.value.status_code == 409 and error.value.code == "session_damaged"
        assert say(client, healthy, "z")
        assert client.delete(f"/sessions/{damaged}", cast_to=object)["deleted"]
        assert not list(tmp_path.glob(f"{damaged}*"))


@pytest.mark.parametrize("change", ["another cap", "no stream"])
def test_a_session_whose_stream_does_not_fit_or_is_gone_is_told_as_damaged(model, tmp_path, change):
    with served(make_service(model, spill=tmp_path)) as address:
        session = opened(client_of(address))
        say(client_of(address), session, "x")
    cap = 2 * CAP if change == "another cap" else CAP
    for path in tmp_path.glob(f"{session}.*.safetensors") if change == "no stream" else ():
        path.unlink()
    with served(make_service(model, spill=tmp_path, cap=cap, resident=1)) as address:
        client = client_of(address)
        with pytest.raises(APIStatusError) as error:
            say(client, session, "y")
        assert (error.value.status_code, error.value.code) == (409, "session_damaged")
        assert say(client, opened(client), "z"), "the lane is not lost"


@pytest.mark.parametrize("header", ["[]", "{}", '{"session": []}', HEADER_WITHOUT_HASH])
def test_a_header_that_lacks_something_is_damaged(tmp_path, header):
    (tmp_path / "sess_a.json").write_text(header)
    (tmp_path / "S").write_bytes(b"")
    files = SessionFiles(tmp_path, 10**9)
    assert len(files.sessions()) == (header == HEADER_WITHOUT_HASH)
    with pytest.raises(APIError) as error:
        files.read("sess_a")
    assert error.value.status == 409


def test_when_a_server_ends_an_earlier_refusal_costs_no_stream_and_each_lost_one_is_told_once(tmp_path, monkeypatch):
    files = SessionFiles(tmp_path, 8)
    spill, kept, large = Spill(files, 100), Session("me"), Session("me")
    store = files.store

    def refused(*_):
        raise SpillFull

    monkeypatch.setattr(files, "store", refused)
    assert spill.write_soon(kept, b"kept")
    spill.wait()
    monkeypatch.setattr(files, "store", store)
    spill.put(large, b"too large")
    assert spill.to_disk() == [large.id] and SessionFiles(tmp_path, 8).read(kept.id)[1] == b"kept"


def test_when_nothing_can_be_spilled_the_answer_is_429_and_nothing_is_lost(model, tmp_path):
    with served(make_service(model, resident=1, ram_mb=0, disk_mb=0, spill=tmp_path)) as address:
        client, alone = client_of(address), Alone(model)
        session = opened(client)
        assert say(client, session, "x") == alone.say("x")
        other = opened(client)
        with pytest.raises(APIStatusError) as error:
            say(client, other, "y")
        assert error.value.status_code == 429 and int(error.value.response.headers["retry-after"]) > 0
        assert say(client, session, "z") == alone.say("z")
        client.delete(f"/sessions/{session}", cast_to=object)
        assert say(client, other, "y")


def test_a_session_that_is_only_found_by_its_messages_makes_room(model):
    with served(make_service(model, resident=1, ram_mb=0, sessions=2)) as address:
        client = client_of(address)
        for text in ("a", "b", "c"):
            answer = client.chat.completions.create(model="tiny-llama", messages=[SYSTEM, user(text)], max_tokens=3)
            assert answer.usage.completion_tokens == 3


def test_a_full_disk_is_told_and_older_files_stay(tmp_path, monkeypatch):
    files = SessionFiles(tmp_path, 10**9)
    session = Session("me")
    files.write(session, b"first")

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(SpillFull):
            files.write(session, b"second")
        spill, held = Spill(files, 6), Session("me")
        spill.put(held, b"123456")
        spill.put(Session("me"), b"more")  # the other one is being written
        spill.wait()
        assert spill.get(held.id) == b"123456" and spill.where(held.id) == "ram", "nothing is lost"
        with pytest.raises(SpillFull):
            spill.put(Session("me"), b"and more")
        assert spill.get(held.id) == b"123456"
    assert files.read(session.id)[1] == b"first"
    assert [s.id for s in SessionFiles(tmp_path, 10**9).sessions()] == [session.id]


@pytest.mark.parametrize("folder", [False, True])
def test_the_end_of_a_server_alarms_only_where_sessions_were_to_be_kept(tmp_path, caplog, folder):
    with served(make_service(spill=tmp_path if folder else None, disk_mb=0)) as address:
        client = client_of(address)
        say(client, opened(client), "Hello you")
    lost = [record for record in caplog.records if "could not be spilled and is lost" in record.getMessage()]
    assert len(lost) == folder


def test_nobody_waits_for_a_disk_that_is_written(tmp_path, monkeypatch):
    files = SessionFiles(tmp_path, 10**9)
    go, spill, session = slow_disk(monkeypatch, files), Spill(files, 6), Session("me")
    spill.put(session, b"123456")
    spill.put(other := Session("me"), b"abcdef")  # this one pushes the first one out
    assert spill.where(session.id) == "disk" and spill.where(other.id) == "ram"
    assert spill.ready(session.id) and spill.get(session.id) == b"123456", "it is read from what waits to be written"
    assert not spill.written(session.id) and not list(tmp_path.iterdir())
    go.set()
    spill.wait()
    assert spill.written(session.id) and files.read(session.id)[1] == b"123456"
    assert not spill.ready(session.id) or spill.get(session.id) == b"123456"


def test_what_was_read_for_a_request_that_was_cancelled_is_let_go(model, tmp_path, monkeypatch):
    class Data(bytearray):
        """Bytes that a weak reference may be kept of."""

    service = make_service(model, spill=tmp_path, resident=1, ram_mb=0)
    files, read, asked, go, kept = service.store.spill.files, service.store.spill.files.read, [], threading.Event(), []

    def slowly(key):
        asked.append(key)
        go.wait()
        found = read(key)
        if kept:
            return found
        data = Data(found[1])
        kept.append(weakref.ref(data))
        return found[0], data

    with served(service) as address:
        client = client_of(address)
        session, other = opened(client), opened(client)
        say(client, session, "one")
        say(client, other, "two")  # the first session goes to disk
        monkeypatch.setattr(files, "read", slowly)
        gone = HTTPConnection(address.removeprefix("http://"))
        body = {"messages": [user("three")], "session_id": session}
        gone.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        wait_until(lambda: asked)
        gone.close()
        wait_until(lambda: not sum(service.scheduler.counts().values()))
        go.set()
        wait_until(lambda: kept)
        wait_until(lambda: kept[0]() is None)  # a stream that nobody asks for is not in memory
        assert say(client, session, "three") and asked == [session] * 2


def test_a_stream_that_went_on_is_written_again(tmp_path):
    spill, session = Spill(SessionFiles(tmp_path, 10**9), 0), Session("me")
    assert spill.write_soon(session, b"one turn")
    spill.wait()
    assert spill.on_disk(session.id)
    spill.changes(session.id)
    assert not spill.on_disk(session.id), "the file is that of the turn before"
    spill.put(session, b"two turns")
    spill.wait()
    assert spill.get(session.id) == b"two turns"
    spill.drop(session.id)
    spill.wait()
    assert not list(tmp_path.iterdir())


def test_a_session_that_is_dropped_while_it_is_written_leaves_no_file(tmp_path, monkeypatch):
    files = SessionFiles(tmp_path, 10**9)
    go, spill, session = slow_disk(monkeypatch, files), Spill(files, 0), Session("me")
    spill.put(session, b"data")
    spill.drop(session.id)
    go.set()
    spill.wait()
    assert not list(tmp_path.iterdir()) and files.total == 0 and spill.where(session.id) is None


def test_the_next_turn_waits_until_the_last_one_is_written(model, tmp_path, monkeypatch):
    """So that a server that is killed loses at most the turn in flight."""
    service = make_service(model, spill=tmp_path)
    go = slow_disk(monkeypatch, service.store.spill.files)
    with served(service) as address:
        client = client_of(address)
        session, other = opened(client), opened(client)
        say(client, session, "one")
        said: list[str] = []
        next_one = threading.Thread(target=lambda: said.append(say(client, session, "two")))
        next_one.start()
        say(client, other, "the others go on")
        assert next_one.is_alive() and not said
        go.set()
        next_one.join()
        assert said
    assert SessionFiles(tmp_path, 10**9).read(session)[0].turns_seen == 2


def test_a_half_written_session_is_the_one_before(tmp_path):
    """Killed between the stream and the JSON that names it."""
    files, session = SessionFiles(tmp_path, 10**9), Session("me")
    files.write(session, b"first")
    header = (tmp_path / f"{session.id}.json").read_text()
    files.write(session, b"second")
    assert len(list(tmp_path.iterdir())) == 2
    (tmp_path / f"{session.id}.{json.loads(header)['sha256'][:16]}.safetensors").write_bytes(b"first")
    (tmp_path / f"{session.id}.json").write_text(header)
    assert SessionFiles(tmp_path, 10**9).read(session.id)[1] == b"first"


# ---- the command ----


def start(arguments: list[str]) -> tuple[processes.Forked, str]:
    process = processes.start("-m", "sinkstream.cli", "serve", "--port", "0", *arguments)
    line = process.stdout.readline()
    assert "http://" in line, process.stderr.read()
    return process, line.partition("http://")[2].split()[0].join(["http://", ""])


@pytest.mark.slow
def test_the_command_spills_when_it_ends_and_survives_a_kill(tmp_path):
    folder = save_chat_model(tmp_path / "model")
    arguments = [
        "--model",
        str(folder),
        "--cap",
        str(CAP),
        "--recall",
        "none",
        "--spill",
        str(tmp_path / "spill"),
        "--device",
        "cpu",
    ]
    replies = []
    for end in (signal.SIGTERM, signal.SIGKILL, signal.SIGTERM):
        process, address = start(arguments)
        try:
            client = client_of(address)
            found = client.get("/sessions", cast_to=object)["data"]
            assert bool(found) == bool(replies)
            session = found[0]["id"] if found else opened(client)
            replies.append(say(client, session, "again"))
            if end == signal.SIGKILL:  # an idle server writes what it holds
                header = tmp_path / "spill" / f"{session}.json"
                seen = client.get(f"/sessions/{session}", cast_to=object)["tokens"]["seen"]
                while json.loads(header.read_text())["session"]["counts"]["seen"] < seen:
                    time.sleep(0.05)
        finally:
            os.kill(process.pid, end)
            process.wait()
    alone = Alone(loaded())
    assert replies == [alone.say("again") for _ in range(3)]
    assert len(set(replies)) == 3
