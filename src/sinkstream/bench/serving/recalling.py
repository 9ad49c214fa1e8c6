"""Chats in which facts are told, forgotten and asked for, and questions that nothing was told about."""

import itertools
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from threading import Lock
from typing import Any

import httpx2 as httpx

from sinkstream.bench.serving.recall_texts import FACTS, FRAMES, UNRELATED, Fact
from sinkstream.evaluation.runner import Report

Row = dict[str, Any]

SYSTEM = "You are a helpful assistant. Answer briefly."
TALK_TOKENS, ANSWER_TOKENS = 32, 24  # of a reply in the talk; of one to a question after it
TALK_TURNS = 48
FORMS = ("named", "paraphrased")
ARMS = ("recall", "none", "whole")  # none: without recall; whole: without recall, and nothing is evicted


@dataclass
class Talk:
    """One chat.

    Attributes
    ----------
    lines : list of str
        What the person says; the first is that of turn 1.
    told : dict
        Fact -> its turn.
    unrelated : list of (str, str)
        Kind and text of messages that come after the talk.
    messages : list of dict
        The talk with its replies, once it was held.
    """

    lines: list[str]
    told: dict[Fact, int]
    unrelated: list[tuple[str, str]]
    messages: list[dict[str, str]] = field(default_factory=list)


def talks(count: int, turns: int, seed: int) -> list[Talk]:
    """Chats of so many turns, with all facts and all unrelated messages among them.

    Facts are told in the first half of a talk; everything else in it is drawn from the unrelated messages of the other
    talks.
    """
    draw = random.Random(seed)
    facts = draw.sample(FACTS, len(FACTS))
    unrelated = [(kind, text) for kind, texts in UNRELATED.items() for text in texts]
    draw.shuffle(unrelated)
    found = []
    for number in range(count):
        own, asked = facts[number::count], unrelated[number::count]
        others = [text for place, (_, text) in enumerate(unrelated) if count == 1 or place % count != number]
        lines = [others[i % len(others)] for i in draw.sample(range(max(len(others), turns)), turns)]
        places = sorted(draw.sample(range(max(turns // 2, len(own))), len(own)))
        for place, fact in zip(places, own):
            lines[place] = draw.choice(FRAMES).format(fact.statement)
        found.append(Talk(lines, {fact: place + 1 for place, fact in zip(places, own)}, asked))
    return found


class Server:
    """Requests to a server at an address, for a model by its name."""

    def __init__(self, address: str, model: str):
        self.model = model
        self.client = httpx.Client(base_url=address, timeout=3600)

    def opened(self, messages: Sequence[dict[str, str]] = ()) -> str:
        """A session in which messages were said."""
        return self._post("/v1/sessions", {"messages": [{"role": "system", "content": SYSTEM}, *messages]})["id"]

    def say(self, session: str, text: str, tokens: int) -> tuple[str, dict[str, Any]]:
        """The reply to a message, greedy, and the context."""
        body = {"model": self.model, "messages": [{"role": "user", "content": text}], "session_id": session}
        answer = self._post("/v1/chat/completions", body | {"temperature": 0, "max_tokens": tokens})
        return answer["choices"][0]["message"]["content"] or "", answer["usage"]["context"]

    def ask(self, session: str, text: str) -> tuple[str, dict[str, Any]]:
        """The reply to a question in a copy of a session."""
        copy = self._post(f"/v1/sessions/{session}/fork", {})["id"]
        try:
            return self.say(copy, text, ANSWER_TOKENS)
        finally:
            self.delete(copy)

    def delete(self, session: str) -> None:
        """Delete a session."""
        self.client.delete(f"/v1/sessions/{session}").raise_for_status()

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return self.client.post(path, json=body).raise_for_status().json()


def held(server: Server, talk: Talk, tick: Callable[[], None]) -> str:
    """Hold a talk; its messages are kept in it. Returns its session."""
    session = server.opened()
    for line in talk.lines:
        reply, _ = server.say(session, line, TALK_TOKENS)
        talk.messages += [{"role": "user", "content": line}, {"role": "assistant", "content": reply}]
        tick()
    return session


def retold(server: Server, talk: Talk) -> str:
    """A session that is told a talk with the replies that it had. Returns the session."""
    return server.opened(talk.messages)


def asked(server: Server, session: str, talk: Talk, unrelated: bool, tick: Callable[[], None]) -> list[Row]:
    """What came of every question after a talk, and of every unrelated message if those are asked for."""
    rows = []
    for fact, turn in talk.told.items():
        for form in FORMS:
            question = getattr(fact, form)
            reply, context = server.ask(session, question)
            right = any(answer in reply.lower() for answer in fact.answers)
            rows.append(_row(form, question, reply, context) | {"wanted": turn, "right": right})
            tick()
    for kind, text in talk.unrelated if unrelated else ():
        reply, context = server.ask(session, text)
        rows.append(_row(kind, text, reply, context))
        tick()
    return rows


def _row(kind: str, question: str, reply: str, context: dict[str, Any]) -> Row:
    recalled = context["recalled"]
    return {
        "kind": kind,
        "question": question,
        "reply": reply,
        "recalled": [turn["turn"] for turn in recalled],
        "tokens": sum(turn["tokens"] for turn in recalled),
        "evicted_turns": context["evicted_turns"],
        "seen": context["kept"] + context["evicted"],
    }


def measured(
    host: Callable[..., AbstractContextManager[str]], model: str, cap: int, count: int, seed: int, report: Report
) -> dict[str, Any]:
    """Figures of chats with recall, of the same chats without it, and of the same with nothing evicted.

    Parameters
    ----------
    host : callable
        Given the number of resident sessions and settings, hosts a server; a context manager of its address.
    model : str
        Its name.
    cap : int
        Slots of a session.
    count : int
        Chats.
    """
    chats = talks(count, TALK_TURNS, seed)
    questions = len(FORMS) * len(FACTS)
    steps = sum(len(talk.lines) + len(talk.unrelated) for talk in chats) + len(ARMS) * questions
    done, lock = itertools.count(1), Lock()

    def tick() -> None:
        with lock:
            report(next(done), steps)

    arms: dict[str, list[list[Row]]] = {}
    for arm in ARMS:
        whole = max(row["seen"] for rows in arms["recall"] for row in rows) if arm == "whole" else cap
        recall = "lexical" if arm == "recall" else "none"
        with host(count, recall=recall, cap=whole) as address:
            server = Server(address, model)
            hold = partial(held, server, tick=tick) if arm == "recall" else partial(retold, server)
            with ThreadPoolExecutor(count) as pool:
                sessions = list(pool.map(hold, chats))
                ask = partial(asked, server, unrelated=arm == "recall", tick=tick)
                arms[arm] = list(pool.map(ask, sessions, chats))
            for session in sessions:
                server.delete(session)
    return {"talks": count, "turns": TALK_TURNS, **figures(arms)}


def figures(arms: dict[str, list[list[Row]]]) -> dict[str, Any]:
    """Counts of the questions, given the rows of each chat, by arm."""
    rows = [row | {"talk": talk} for talk, found in enumerate(arms["recall"], 1) for row in found]
    facts = {}
    for form in FORMS:
        of = [row for row in rows if row["kind"] == form]
        facts[form] = {
            "asked": len(of),
            "evicted": sum(row["wanted"] <= row["evicted_turns"] for row in of),
            "found": sum(row["wanted"] in row["recalled"] for row in of),
            "found_alone": sum(row["recalled"] == [row["wanted"]] for row in of),
            "right": {
                arm: sum(row["right"] for found in of_arm for row in found if row["kind"] == form)
                for arm, of_arm in arms.items()
            },
        }
    unrelated = {}
    for kind in UNRELATED:
        of = [row for row in rows if row["kind"] == kind]
        recalled = sum(bool(row["recalled"]) for row in of)
        unrelated[kind] = {"asked": len(of), "recalled": recalled, "tokens": sum(row["tokens"] for row in of)}
    return {"facts": facts, "unrelated": unrelated, "rows": rows}
