"""A load generator: conversations in sessions of a server, every reply timed. A program of its own, without torch.

It reads a plan, one JSON line, from its standard input, and writes one JSON line a turn to its output. Once all of its
sessions have come to the turns that are timed it says so in a line, and goes on at an empty line. It runs in a process
of its own so that its work takes nothing from the server's; a load of many sessions is shared by several.
"""

import asyncio
import json
import sys
import time
from dataclasses import dataclass
from typing import Any

CONTENT = b'"content": "'
WAITING = {"waiting": True}


@dataclass(frozen=True)
class Plan:
    """What is sent.

    Attributes
    ----------
    address, model : str
        The server, and the id of its model.
    sessions : int
        Conversations side by side.
    turns : int
        Of each conversation.
    warm_turns : int
        The first ones, after which all sessions wait for each other.
    first : int
        Number of the first session.
    text : str
        The message of every turn; ``{turn}`` is replaced by its number.
    tokens : int
        Of every reply; the model's end tokens end none.
    stream : bool
        Whether replies are streamed.
    system : str
        The system prompt.
    """

    address: str
    model: str
    sessions: int
    turns: int
    text: str
    tokens: int
    warm_turns: int = 0
    first: int = 0
    stream: bool = True
    system: str = ""


class Together:
    """Where the sessions of all clients wait for each other."""

    def __init__(self, sessions: int):
        self._left, self._go = sessions, asyncio.Event()

    async def wait(self) -> None:
        """Wait until the last session of the last client has come."""
        self._left -= 1
        if not self._left:
            print(json.dumps(WAITING), flush=True)
            await asyncio.to_thread(sys.stdin.readline)
            self._go.set()
        await self._go.wait()


async def converse(plan: Plan, client: Any, number: int, together: Together) -> None:
    """One conversation from its opening to its deletion."""
    head = [{"role": "system", "content": plan.system}] if plan.system else []
    opened = await client.post("/v1/sessions", json={"messages": head})
    session = opened.raise_for_status().json()["id"]
    for turn in range(plan.turns):
        if turn == plan.warm_turns:
            await together.wait()
        body = {
            "model": plan.model,
            "messages": [{"role": "user", "content": plan.text.replace("{turn}", str(turn))}],
            "session_id": session,
            "max_tokens": plan.tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": plan.stream,
        }
        if plan.stream:
            body["stream_options"] = {"include_usage": True}
        told = await asked(client, body)
        print(json.dumps({"session": number, "turn": turn, **told}), flush=True)
    await client.delete(f"/v1/sessions/{session}")


async def asked(client: Any, body: dict[str, Any]) -> dict[str, Any]:
    """One reply: status, seconds at which it was asked for, begun and complete, tokens and context."""
    begin, first, last, text = time.perf_counter(), None, None, bytearray()
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        async for piece in answer.aiter_raw():
            last = time.perf_counter()
            text += piece
            if first is None and begun(bytes(text)):
                first = last
    told = {"status": answer.status_code, "begin": begin, "first": first, "last": last}
    if answer.status_code != 200:
        return told | {"body": text.decode(errors="replace")}
    return told | usage_of(bytes(text), streamed=body["stream"])


def begun(text: bytes) -> bool:
    """Whether a stream holds text of its reply already: content that is not empty."""
    place = text.find(CONTENT)
    while place >= 0:
        after = place + len(CONTENT)
        if text[after : after + 1] not in (b'"', b""):
            return True
        place = text.find(CONTENT, after)
    return False


def usage_of(body: bytes, *, streamed: bool) -> dict[str, Any]:
    """The usage that a reply, or the last chunk of a stream, tells."""
    if not streamed:
        return {"usage": json.loads(body)["usage"]}
    data = [line[5:].strip() for line in body.split(b"\n") if line.startswith(b"data:")]
    chunks = [json.loads(line) for line in data if line != b"[DONE]"]
    error = next((chunk["error"] for chunk in chunks if "error" in chunk), None)
    usage = next((chunk["usage"] for chunk in reversed(chunks) if chunk.get("usage")), None)
    return {"usage": usage} if error is None else {"usage": usage, "error": error}


async def run(plan: Plan) -> None:
    """All conversations side by side."""
    import httpx2 as httpx

    together = Together(plan.sessions)
    numbers = range(plan.first, plan.first + plan.sessions)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=plan.address, timeout=600, limits=limits) as client:
        await asyncio.gather(*(converse(plan, client, number, together) for number in numbers))


if __name__ == "__main__":
    asyncio.run(run(Plan(**json.loads(sys.stdin.readline()))))
