"""A server that is killed in mid-load and started again: what its sessions have lost, and how they go on."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx2 as httpx


@dataclass
class Conversation:
    """One session of the load, as its client knows it."""

    number: int
    tokens: int  # of each reply
    session: str = ""
    texts: list[str] = field(default_factory=list)  # of the turns that were asked for
    replies: list[str] = field(default_factory=list)  # of those that were answered

    @property
    def system(self) -> str:
        """Its system prompt."""
        return f"w0 w{4 + self.number}"

    def text(self, turn: int) -> str:
        """The message of a turn."""
        return f"w{20 + self.number} w{30 + turn % 50} w7"


class Server:
    """``sinkstream serve`` in a process of its own.

    Parameters
    ----------
    arguments : sequence of str
        Of the command.

    Raises
    ------
    OSError
        If it does not start.
    """

    def __init__(self, arguments: Sequence[str]):
        command = [sys.executable, "-m", "sinkstream.cli", "serve", "--port", "0", "--recall", "none", *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout is not None
        try:
            line = self.process.stdout.readline()
            if "http://" not in line:
                raise OSError("the server did not start: see sinkstream serve with the same options")
            self.address = "http://" + line.partition("http://")[2].split()[0]
            client = httpx.Client(transport=httpx.HTTPTransport(retries=10), timeout=60)  # it listens a moment later
            self.model: str = client.get(f"{self.address}/v1/models").json()["data"][0]["id"]
        except BaseException:
            self.end(signal.SIGKILL)
            raise

    def end(self, number: int = signal.SIGTERM) -> None:
        """Send a signal, if the process still runs, and wait."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        self.process.wait()


def opened(client: httpx.Client, conversation: Conversation) -> str:
    """A session for a conversation."""
    body = {"messages": [{"role": "system", "content": conversation.system}]}
    return client.post("/v1/sessions", json=body).raise_for_status().json()["id"]


def said(client: httpx.Client, model: str, session: str, text: str, tokens: int) -> str:
    """The reply to a turn, greedy, of exactly so many tokens."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": text}],
        "session_id": session,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
    answer = client.post("/v1/chat/completions", json=body).raise_for_status()
    return answer.json()["choices"][0]["message"]["content"]


def loaded_until_killed(server: Server, model: str, conversations: Sequence[Conversation], turns: int) -> None:
    """Talk on all sessions at once; kill the server once each has had so many turns."""

    def talk(conversation: Conversation) -> None:
        with httpx.Client(base_url=server.address, timeout=600) as client:
            try:
                conversation.session = opened(client, conversation)
                while True:
                    text = conversation.text(len(conversation.texts))
                    conversation.texts.append(text)
                    conversation.replies.append(said(client, model, conversation.session, text, conversation.tokens))
            except httpx.HTTPError:
                return  # the server is gone

    threads = [threading.Thread(target=talk, args=(one,), daemon=True) for one in conversations]
    for thread in threads:
        thread.start()
    while min(len(one.replies) for one in conversations) < turns and any(thread.is_alive() for thread in threads):
        time.sleep(0.02)
    server.end(signal.SIGKILL)
    for thread in threads:
        thread.join()


def gone_on(
    address: str,
    alone: str,
    models: tuple[str, str],
    conversations: Sequence[Conversation],
    tokens: int,
    tick: Callable[[int], None],
) -> dict[str, Any]:
    """How the sessions of a server at `address` go on, against the same ones that a server at `alone` never lost.

    Parameters
    ----------
    models : tuple of str
        Ids of the model of both servers.

    Returns
    -------
    dict
        Figures of a record.
    """
    found = same = lost = 0
    with httpx.Client(base_url=address, timeout=600) as client, httpx.Client(base_url=alone, timeout=600) as other:
        for number, one in enumerate(conversations):
            answer = client.get(f"/v1/sessions/{one.session}")
            held = answer.json()["turns"]["seen"] if answer.status_code == 200 else 0
            found += bool(held)
            lost = max(lost, len(one.replies) - held)
            if held:
                session = opened(other, one)
                for text in one.texts[:held]:
                    said(other, models[1], session, text, one.tokens)
                last = said(client, models[0], one.session, one.text(held), tokens)
                same += last == said(other, models[1], session, one.text(held), tokens)
                other.delete(f"/v1/sessions/{session}")
            tick(number + 1)
    return {
        "sessions": len(conversations),
        "spilled": found,
        "continued": found,
        "next_tokens": tokens,
        "same": same,
        "turns_lost": max(0, lost),
    }
