"""A soak: locust's users on a server; then every conversation again, alone, and what was left behind."""

import importlib.metadata
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx2 as httpx

USERS = Path(__file__).with_name("users.py")
INSTALL = "--serve soak needs locust, a load generator: pip install locust"
SETTLE_SECONDS = 30
GRACE_SECONDS = 120  # for the last turns of the users
DISCONNECTS = ("broken", "gone")
REFUSED = ("malformed", "oversize")
Event = dict[str, Any]


def check_locust() -> None:
    """Raise ImportError if the load generator of a soak is missing."""
    if importlib.util.find_spec("locust") is None:
        raise ImportError(INSTALL)


def generate(
    address: str, model: str, cap: int, users: int, seconds: float, folder: Path, tick: Callable[[], None]
) -> list[list[Event]]:
    """Let locust's users work on a server; returns what each of them did.

    Raises
    ------
    ImportError
        If locust is not installed.
    OSError
        If it fails.
    """
    check_locust()
    given = {"SOAK_FOLDER": str(folder), "SOAK_MODEL": model, "SOAK_CAP": str(cap)}
    command = [sys.executable, "-m", "locust", "-f", str(USERS), "--headless", "--host", address, "--only-summary"]
    command += ["-u", str(users), "-r", str(users), "-t", f"{int(seconds)}s", "-s", str(GRACE_SECONDS)]
    with open(folder / "locust.log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **given})
        try:
            while process.poll() is None:
                time.sleep(0.5)
                tick()
        finally:
            process.kill()
            process.wait()
    told = [path.read_text(encoding="utf-8").splitlines() for path in sorted(folder.glob("user-*.jsonl"))]
    if not any(told):
        last = (folder / "locust.log").read_text(encoding="utf-8").splitlines()[-3:]
        raise OSError(f"locust did nothing: {' '.join(last)}")
    return [[json.loads(line) for line in lines] for lines in told if lines]


def generator() -> str:
    """The load generator and its release."""
    return f"locust {importlib.metadata.version('locust')}"


def left_behind(address: str, sessions: Sequence[str], spill: Path) -> tuple[int, int]:
    """Sessions and files that are there although all sessions were deleted and no request runs."""
    with httpx.Client(base_url=address, timeout=60) as client:
        deadline = time.monotonic() + SETTLE_SECONDS
        while any(client.get("/health").json()[name] for name in ("running", "waiting")):
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        for session in sessions:
            client.delete(f"/v1/sessions/{session}").raise_for_status()
        text = client.get("/metrics").text
    known = dict(line.split() for line in text.splitlines() if line and not line.startswith("#") and "{" not in line)
    left = sum(int(float(known[f"sinkstream_{name}"])) for name in ("sessions", "sessions_resident", "jobs_running"))
    time.sleep(1)  # files are deleted by a thread of their own
    return left, len([path for path in spill.iterdir() if path.name != ".lock"])


def written_tokens(turns: Sequence[Event]) -> list[int | None]:
    """Tokens of the reply of every turn that its session holds; None where that is not known.

    The turn after one that was broken off tells it: the stream's length before it.
    """
    found: list[int | None] = []
    for turn, later in zip(turns, [*turns[1:], None]):
        if turn["kind"] == "turn":
            found.append(turn["tokens"])
        elif later is None or "reused" not in turn or "reused" not in later:
            found.append(None)
        else:
            found.append(later["reused"] - turn["reused"] - turn["sent"])
    return found


def comparable(events: Sequence[Event]) -> list[tuple[Event, int]]:
    """Turns of a user that can be asked for again, with the tokens of each reply; up to one that is not known."""
    turns = [e for e in events if e["kind"] in ("turn", "broken") and e["status"] == 200 and "error" not in e]
    known = zip(turns, written_tokens(turns))
    return [(turn, tokens) for turn, tokens in itertools.takewhile(lambda one: one[1], known) if tokens]


def compare(
    address: str,
    model: str,
    users: Sequence[Sequence[Event]],
    tick: Callable[[int], None],
    seconds: float | None = None,
) -> tuple[int, int]:
    """Serve every conversation alone, on another server; returns how many replies were compared and differ.

    Parameters
    ----------
    tick : callable
        Told the users whose conversations have been served.
    seconds : float or None
        After so many no further turn is served; None: all are.
    """
    compared = differing = 0
    begin = time.monotonic()
    with httpx.Client(base_url=address, timeout=600) as client:
        for number, events in enumerate(users):
            head = {"messages": [{"role": "system", "content": events[0]["system"]}]}
            session = client.post("/v1/sessions", json=head).raise_for_status().json()["id"]
            for turn, tokens in comparable(events):
                if seconds is not None and time.monotonic() - begin > seconds:
                    break
                body = {
                    "model": model,
                    "messages": [{"role": "user", "content": turn["text"]}],
                    "session_id": session,
                    "max_tokens": tokens,
                    "temperature": 0,
                    "ignore_eos": True,
                }
                found = client.post("/v1/chat/completions", json=body).raise_for_status().json()
                reply = found["choices"][0]["message"]["content"]
                same = reply == turn["reply"] if turn["kind"] == "turn" else reply.startswith(turn["reply"])
                compared += 1
                differing += not same
            client.delete(f"/v1/sessions/{session}")
            tick(number + 1)
    return compared, differing


def soak_figures(users: Sequence[Sequence[Event]]) -> dict[str, Any]:
    """What the users' events say of the answers."""
    events = [event for user in users for event in user]
    failed = [e for e in events if "error" in e]
    unexpected = [e for e in events if not e["expected"] and e["status"] not in (429,)]
    return {
        "requests": len(events),
        "by_status": dict(sorted(Counter(str(e["status"]) for e in events if e["kind"] != "gone").items())),
        "by_kind": dict(sorted(Counter(e["kind"] for e in events).items())),
        "unexpected_5xx": sum(e["status"] >= 500 for e in events) + len(failed),
        "wrongly_answered": sum(e["status"] < 500 for e in unexpected),
        "replies": sum(len(comparable(user)) for user in users),
        "disconnects": sum(e["kind"] in DISCONNECTS for e in events),
        "refused_as_expected": sum(e["kind"] in REFUSED and e["expected"] for e in events),
    }
