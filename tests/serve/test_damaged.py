"""Damaged files of sessions: told by id, and no obstacle to a client that sends the whole conversation again."""

import json

import pytest
from openai import APIStatusError
from serving import BIAS, CAP, SYSTEM, Alone, client_of, loaded, make_service, opened, say, served, user

from sinkstream.serve.files import SessionFiles
from sinkstream.serve.sessions import Session


@pytest.fixture(scope="module")
def model():
    return loaded()


def talk(client, messages: list[dict]) -> str:
    """The reply to a whole conversation."""
    answer = client.chat.completions.create(
        model="tiny-llama", messages=messages, temperature=0, max_tokens=8, logit_bias=BIAS
    )
    return answer.choices[0].message.content


def flip(path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


CHANGES = {
    "the stream": lambda folder: flip(next(folder.glob("*.safetensors"))),
    "no stream": lambda folder: next(folder.glob("*.safetensors")).unlink(),
    "another cap": None,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_conversation_that_is_sent_again_begins_anew(model, tmp_path, change):
    messages = [SYSTEM, user("Hello you")]
    with served(make_service(model, spill=tmp_path)) as address:
        messages += [{"role": "assistant", "content": talk(client_of(address), messages)}, user("And now?")]
    if CHANGES[change]:
        CHANGES[change](tmp_path)
    cap = 2 * CAP if change == "another cap" else CAP
    alone = Alone(model, cap=cap)
    alone.say("Hello you", tokens=8)
    with served(make_service(model, spill=tmp_path, cap=cap)) as address:
        client = client_of(address)
        assert talk(client, messages) == alone.say("And now?", tokens=8)
        health = client.get(address + "/health", cast_to=object)
        assert health["status"] == "ok" and len(list(tmp_path.glob("sess_*.json"))) == 1, "the lost one is deleted"


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[:-30],
        lambda text: "",
        lambda text: text.replace("Be brief", "Be grief"),
        lambda text: text.replace('"turns_seen": 1', '"turns_seen": 2'),
        lambda text: text.replace('"evicted_before": 0', '"evicted_before": 7'),
    ],
    ids=["truncated", "empty", "a letter", "a count", "another count"],
)
def test_a_damaged_record_is_told_and_can_be_deleted(model, tmp_path, change):
    with served(make_service(model, spill=tmp_path)) as address:
        session = opened(client_of(address))
        say(client_of(address), session, "x")
    path = tmp_path / f"{session}.json"
    whole = path.read_text()
    path.write_text(change(whole))
    assert path.read_text() != whole
    with served(make_service(model, spill=tmp_path)) as address:
        client = client_of(address)
        for call in (
            lambda: say(client, session, "y"),
            lambda: client.get(f"/sessions/{session}", cast_to=object),
            lambda: client.post(f"/sessions/{session}/fork", cast_to=object),
        ):
            with pytest.raises(APIStatusError) as error:
                call()
            assert (error.value.status_code, error.value.code) == (409, "session_damaged")
        for unknown in ("sess_none", "..", ".lock", f"{session}x"):
            with pytest.raises(APIStatusError) as error:
                client.chat.completions.create(
                    model="tiny-llama", messages=[user("y")], extra_body={"session_id": unknown}
                )
            assert error.value.status_code == 404, "control"
        assert client.delete(f"/sessions/{session}", cast_to=object)["deleted"]
        assert not [found for found in tmp_path.iterdir() if session in found.name]
        with pytest.raises(APIStatusError) as error:
            client.delete(f"/sessions/{session}", cast_to=object)
        assert error.value.status_code == 404


def test_a_record_without_a_checksum_is_read(tmp_path):
    """Files had none before."""
    files, session = SessionFiles(tmp_path, 10**9), Session("me")
    files.write(session, b"data")
    path = tmp_path / f"{session.id}.json"
    header = json.loads(path.read_text())
    assert len(header.pop("session_sha256")) == 64
    path.write_text(json.dumps(header))
    assert files.read(session.id)[0] == session and [one.id for one in files.sessions()] == [session.id]
    assert not files.damaged(session.id)


def test_what_a_killed_server_left_half_written_is_deleted(tmp_path):
    files, session, damaged = SessionFiles(tmp_path, 10**9), Session("me"), Session("me")
    for one in (session, damaged):
        files.write(one, b"data")
    files.write(session, b"copy", "saved_me_name")
    kept = {path.name for path in tmp_path.iterdir()}
    (tmp_path / f"{damaged.id}.json").write_text("{")
    leftovers = (
        f".{session.id}.json.x3f.tmp",  # while the JSON was written
        ".saved_me_name.0123456789abcdef.safetensors.x3f.tmp",  # while the stream was
        f"{session.id}.0123456789abcdef.safetensors",  # between the two, for a session that had files
        "sess_new.0123456789abcdef.safetensors",  # and for one that had none
    )
    for name in (*leftovers, "mine.tmp"):
        (tmp_path / name).write_bytes(b"half")
    again = SessionFiles(tmp_path, 10**9)
    assert {path.name for path in tmp_path.iterdir()} == kept | {*leftovers, "mine.tmp"}, "another server may be there"
    again.lock()
    assert {path.name for path in tmp_path.iterdir()} == kept | {"mine.tmp", ".lock"}
    assert again.read(session.id)[1] == b"data" and again.read("saved_me_name")[1] == b"copy"
