"""Users of a soak, for locust: conversations in sessions among disconnects, oversize and malformed requests.

A program of its own, read by locust. The environment gives SOAK_FOLDER, where every user writes what it did (one JSON
line an event), SOAK_MODEL and SOAK_CAP.
"""

import itertools
import json
import os
import random
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from locust import HttpUser, between, task

FOLDER, MODEL, CAP = Path(os.environ["SOAK_FOLDER"]), os.environ["SOAK_MODEL"], int(os.environ["SOAK_CAP"])
NUMBERS = itertools.count()
CHAT, COMPLETIONS, SESSIONS = "/v1/chat/completions", "/v1/completions", "/v1/sessions"
TOO_LARGE = "w5 " * 600_000
MALFORMED: list[tuple[str, Any, tuple[int, ...]]] = [
    (CHAT, "{", (400,)),
    (CHAT, {"messages": []}, (400,)),
    (CHAT, {"messages": [{"role": "king", "content": "w1"}]}, (400,)),
    (CHAT, {"messages": [{"role": "user", "content": "w1"}], "max_tokens": -1}, (400,)),
    (CHAT, {"messages": [{"role": "user", "content": "w1"}], "colour": "red"}, (400,)),
    (CHAT, {"messages": [{"role": "user", "content": "w1"}], "model": "another"}, (404,)),
    (CHAT, {"messages": [{"role": "user", "content": "w1"}], "session_id": "sess_nobody"}, (404,)),
    (CHAT, {"messages": [{"role": "user", "content": "w1"}], "logit_bias": {"-1": 1}}, (400,)),
    (COMPLETIONS, {"prompt": [10**9]}, (400,)),
    (COMPLETIONS, {"prompt": ""}, (400,)),
    (COMPLETIONS, {"prompt": "w1", "n": 1000}, (400,)),
    (SESSIONS, {"messages": "none"}, (400,)),
]


class Talker(HttpUser):
    """One conversation, and what a public server hears beside it."""

    wait_time = between(0, 0.2)

    def on_start(self) -> None:
        """Open a session of one's own."""
        self.number = next(NUMBERS)
        self.random = random.Random(self.number)
        self.notes = open(FOLDER / f"user-{self.number}.jsonl", "w", encoding="utf-8")  # noqa: SIM115
        system = f"w0 w{4 + self.number}"
        answer = self.client.post(SESSIONS, json={"messages": [{"role": "system", "content": system}]})
        self.note("open", answer.status_code, session=answer.json()["id"], system=system)
        self.session = answer.json()["id"]

    def on_stop(self) -> None:
        """Close one's notes; the session is deleted by whoever has started the soak."""
        self.notes.close()

    def note(self, kind: str, status: int, expected: tuple[int, ...] = (200, 201), **more: Any) -> None:
        """Write down what happened."""
        known = {"kind": kind, "status": status, "expected": status in expected}
        self.notes.write(json.dumps(known | more) + "\n")
        self.notes.flush()

    def body(self, *, stream: bool) -> dict[str, Any]:
        """The next turn of the conversation; one of twenty is longer than the window."""
        words = CAP + 20 if self.random.random() < 0.05 else self.random.randint(1, 12)
        text = " ".join(f"w{self.random.randint(4, 400)}" for _ in range(words))
        return {
            "model": MODEL,
            "messages": [{"role": "user", "content": text}],
            "session_id": self.session,
            "max_tokens": self.random.randint(2, 16),
            "temperature": 0,
            "ignore_eos": True,
            "stream": stream,
        }

    @task(10)
    def turn(self) -> None:
        """A turn of the conversation, whole or streamed."""
        body = self.body(stream=self.random.random() < 0.5)
        if body["stream"]:
            self.streamed(body, broken=False)
            return
        with self.client.post(CHAT, json=body, catch_response=True) as answer:
            answer.success()
            told = {"text": body["messages"][0]["content"], "tokens": body["max_tokens"]}
            if answer.status_code == 200:
                found = answer.json()
                told |= {"reply": found["choices"][0]["message"]["content"], **_place(found["usage"]["context"])}
            self.note("turn", answer.status_code, **told)

    @task(2)
    def broken_turn(self) -> None:
        """A turn whose client goes away after the first text."""
        self.streamed(self.body(stream=True) | {"max_tokens": 200}, broken=True)

    def streamed(self, body: dict[str, Any], *, broken: bool) -> None:
        """A streamed turn."""
        told: dict[str, Any] = {"text": body["messages"][0]["content"], "tokens": body["max_tokens"], "reply": ""}
        error = None
        with self.client.post(CHAT, json=body, stream=True, catch_response=True) as answer:
            answer.success()
            for line in answer.iter_lines() if answer.status_code == 200 else ():
                if not line.startswith(b"data:") or line.endswith(b"[DONE]"):
                    continue
                chunk = json.loads(line[5:])
                error = chunk.get("error", error)
                if chunk.get("context") and "sent" not in told:
                    told |= _place(chunk["context"])
                told["reply"] += "".join(choice["delta"].get("content") or "" for choice in chunk.get("choices", ()))
                if broken and told["reply"]:
                    break
            answer.close()
        more = {} if error is None else {"error": error}
        self.note("broken" if broken else "turn", answer.status_code, **told, **more)

    @task(2)
    def malformed(self) -> None:
        """A request that is wrong."""
        path, body, expected = self.random.choice(MALFORMED)
        given = (
            {"data": body, "headers": {"Content-Type": "application/json"}} if isinstance(body, str) else {"json": body}
        )
        with self.client.post(path, catch_response=True, **given) as answer:
            answer.success()
            self.note("malformed", answer.status_code, expected, body=body)

    @task(1)
    def oversize(self) -> None:
        """A body that is too large."""
        with self.client.post(COMPLETIONS, json={"prompt": TOO_LARGE}, catch_response=True) as answer:
            answer.success()
            self.note("oversize", answer.status_code, (413,))

    @task(1)
    def alone(self) -> None:
        """A completion without a session."""
        answer = self.client.post(COMPLETIONS, json={"prompt": "w5 w6", "max_tokens": 4})
        self.note("completion", answer.status_code)

    @task(1)
    def gone(self) -> None:
        """A client that is gone before it hears anything."""
        where = urlsplit(str(self.host))
        body = json.dumps({"prompt": "w5 w6", "max_tokens": 200, "stream": True})
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: application/json\r\n"
        with socket.create_connection((str(where.hostname), where.port or 80)) as raw:
            raw.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        self.note("gone", 0, (0,))

    @task(1)
    def looks(self) -> None:
        """What monitors ask."""
        answer = self.client.get(self.random.choice(["/health", "/v1/models", "/metrics", "/"]))
        self.note("look", answer.status_code)


def _place(context: dict[str, Any]) -> dict[str, int]:
    return {"sent": context["sent"], "reused": context["reused"]}
