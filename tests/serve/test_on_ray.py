"""`sinkstream serve --ray`: two replicas on a real local Ray Serve, one of them killed in mid-load."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from openai import APIError
from serving import BIAS, CAP, TEXTS, Alone, client_of, loaded, opened, save_chat_model, user

import sinkstream
from sinkstream.cli import main
from sinkstream.ray_cluster import check_address

SESSIONS = 6
TALK = TEXTS * 3
BEFORE = 3  # turns before one is killed


def paths() -> str:
    """Where this Python finds its packages, for another one."""
    return os.pathsep.join([str(Path(sinkstream.__file__).parents[1]), *sys.path])


def replicas(process: subprocess.Popen) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            found += [child] if "ServeReplica" in " ".join(child.cmdline()[:1]) else []
        except psutil.Error:
            continue
    return found


class Talker(threading.Thread):
    """A conversation in one session, with retries; what it hears is what the engine alone says."""

    def __init__(self, address: str, barrier: threading.Barrier):
        super().__init__(daemon=True)
        self.client, self.barrier, self.heard, self.retries = client_of(address), barrier, [], 0
        self.session = opened(self.client)
        self.sticky = {"x-session-id": self.session}

    def run(self) -> None:
        for number, text in enumerate(TALK):
            if number == BEFORE:
                self.barrier.wait(60)  # all are here
                self.barrier.wait(60)  # and go on at once
            self.heard.append(self._say(text, number))

    def _say(self, text: str, turn: int) -> str | None:
        """The reply; None if its turn was written, and the reply got lost on its way."""
        for _ in range(300):
            try:
                if self.retries and self.state()["turns"]["seen"] > turn:
                    return None
                answer = self.client.chat.completions.create(
                    model="model", messages=[user(text)], temperature=0, max_tokens=12, logit_bias=BIAS,
                    extra_body={"session_id": self.session}, extra_headers=self.sticky,
                )  # fmt: skip
                return answer.choices[0].message.content
            except APIError:
                self.retries += 1
                time.sleep(0.2)
        raise AssertionError("no replica answers")

    def state(self, sticky: bool = True) -> dict:
        options = {"headers": self.sticky} if sticky else {}
        return self.client.get(f"/sessions/{self.session}", cast_to=object, options=options)


def answered(client) -> dict[str, float]:
    """Requests that each replica has answered, as one of them tells."""
    found = re.findall(r'requests_total{replica="(\w+)",result="ok"} (\S+)', client.get("../metrics", cast_to=str))
    return {name: float(count) for name, count in found}


@pytest.mark.slow
def test_the_sessions_of_a_killed_replica_go_on_on_the_other(tmp_path):
    pytest.importorskip("ray.serve")
    save_chat_model(tmp_path / "model")
    command = [sys.executable, "-m", "sinkstream.cli", "serve", "--ray", "--replicas", "2", "--cpus-per-replica", "0.1"]
    options = [
        "--model",
        str(tmp_path / "model"),
        "--device",
        "cpu",
        "--cap",
        str(CAP),
        "--recall",
        "none",
        "--spill",
        str(tmp_path / "s"),
    ]
    environment = os.environ | {"PYTHONPATH": paths(), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, *options, "--spill", str(tmp_path / "s"), "--resident", str(SESSIONS), "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    try:
        line = next((line for line in process.stdout if "http://" in line), None)
        assert line and line.startswith("2 replicas on Ray"), process.stderr.read()
        address = "http://" + line.partition("http://")[2].split()[0]
        barrier = threading.Barrier(SESSIONS + 1)
        talkers = [Talker(address, barrier) for _ in range(SESSIONS)]
        for talker in talkers:
            talker.start()
        barrier.wait(60)
        for talker in talkers[:2]:
            assert {talker.state()["state"] for _ in range(8)} == {"resident"}, "sessions stick to a replica"
        elsewhere = {talkers[0].state(sticky=False)["state"] for _ in range(24)}
        assert "disk" in elsewhere, "control: without the header other replicas answer"
        for _ in range(50):  # a replica tells the others of itself every other second
            counted = answered(talkers[0].client)
            if len(counted) == 2 and sum(counted.values()) == SESSIONS * BEFORE:
                break
            time.sleep(0.2)
        assert len(counted) == 2 and min(counted.values()) > 0, "the figures are those of both replicas"
        assert sum(counted.values()) == SESSIONS * BEFORE
        health = talkers[0].client.get("../health", cast_to=object, options={"params": {"require": "all"}})
        assert health["status"] == "ok" and {r["replica"] for r in health["replicas"]} == set(counted)
        victim = replicas(process)[0]
        barrier.wait(60)
        while min(len(talker.heard) for talker in talkers) == BEFORE:
            time.sleep(0.005)
        victim.kill()
        for talker in talkers:
            talker.join(120)
        assert sum(talker.retries for talker in talkers), "control: replies were broken off"
        alone = Alone(loaded())
        expected = [alone.say(text) for text in TALK]
        for talker in talkers:
            assert len(talker.heard) == len(TALK) and talker.heard.count(None) <= 1
            wrong = [i for i, said in enumerate(talker.heard) if said not in (None, expected[i])]
            assert not wrong, (wrong, talker.heard.index(None) if None in talker.heard else None, talker.retries)
        assert alone.engine.stats()["evicted"], "control: the sessions forget"
        health = talkers[0].client.get("../health", cast_to=object)
        states = {r["replica"]: r["state"] for r in health["replicas"]}
        assert health["expected"] == 2 and "serves" in states.values() and len(states.keys() & counted.keys()) == 2
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, process.stderr.read()


def test_an_address_that_does_not_answer_is_said_in_seconds(tmp_path, capsys):
    pytest.importorskip("ray")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = ["--ray", f"127.0.0.1:{port}", "--port", "0", "--device", "cpu", "--spill", str(tmp_path / "sessions")]
    assert main(["serve", *given]) == 2
    told = capsys.readouterr().err
    assert f"--ray 127.0.0.1:{port}: no Ray answers there" in told and "accepted: HOST:PORT" in told


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--replicas", "0"], "--replicas 0 is not accepted"),
        (["--gpus-per-replica", "1.5"], "--gpus-per-replica 1.5 is not accepted"),
        (["--no-spill"], "spill=None is not accepted"),
        (["--write", "idle"], "write='idle' is not accepted"),
        (["--device", "cuda:1"], "--device cuda:1 with --ray is not accepted"),
    ],
)
def test_wrong_options_are_refused(tmp_path, capsys, given, words):
    device = [] if "--device" in given else ["--device", "cpu"]
    spill = [] if "--no-spill" in given else ["--spill", str(tmp_path)]
    assert main(["serve", "--ray", "--port", "0", *spill, *device, *given]) == 2
    assert words in capsys.readouterr().err


def test_without_the_package_the_option_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["serve", "--ray", "--port", "0", "--device", "cpu", "--spill", str(tmp_path)]) == 2
    assert "pip install 'sinkstream[ray]'" in capsys.readouterr().err


def test_only_what_an_address_names_is_tried():
    for address in ("", "auto", "local"):
        check_address(address)
    with pytest.raises(ValueError, match="--ray nowhere:port: no Ray answers there"):
        check_address("nowhere:port")
