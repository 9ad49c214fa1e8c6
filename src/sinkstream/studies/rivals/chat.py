"""What servers do when a chat outgrows its context: one JSON file a server, and their table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from sinkstream.records.base import StatusRecord
from sinkstream.records.origin import machine
from sinkstream.records.schema import REQUIRED as RUN_REQUIRED
from sinkstream.show.table import EMPTY, NONE_YET, Table

TURN_COLUMNS = (
    *("status", "error", "reply", "prompt_tokens", "cached_tokens", "completion_tokens", "finish_reason"),
    *("ttft_ms", "seconds"),
)
LONG_REPLY = ("asked", "status", "completion_tokens", "finish_reason", "next_status", "next_error", "next_reply")
HEADER = [
    "server",
    "turns refused",
    "at the last turn",
    "its reply",
    "a reply of twice the context",
    "the turn after it",
]


@dataclass(frozen=True)
class ChatServer:
    """A server that is asked, and how it is set."""

    label: str
    options: dict[str, Any]


SERVERS = {
    "llamacpp": ChatServer("llama.cpp's server, context shift off (its default)", {"shift": False}),
    "llamacpp-shift": ChatServer("llama.cpp's server, context shift on", {"shift": True}),
    "sinkstream": ChatServer("`sinkstream serve`", {}),
}


@dataclass(frozen=True)
class ChatRecord(StatusRecord):
    """One server in one chat: the fields of its JSON file.

    Attributes
    ----------
    server : dict
        ``name`` in `SERVERS`, ``label``, ``options``, ``version``.
    turns : dict
        A list (turns,) for each of `TURN_COLUMNS`; `ttft_ms` is the time to the first text.
    long_reply : dict
        `LONG_REPLY`: tokens that were asked for in one reply, what came, and the turn after it.
    """

    SCHEMA, KIND, STATUSES = "sinkstream.rival-chat/1", "rival chat", ("complete",)
    REQUIRED: ClassVar[dict[str, Any]] = {
        **dict.fromkeys(("schema", "id", "status", "status_reason", "created", "command", "arguments")),
        "environment": RUN_REQUIRED["environment"],
        "model": RUN_REQUIRED["model"],
        "server": dict.fromkeys(("name", "label", "options", "version")),
        "protocol": dict.fromkeys(("dtype", "device", "seed", "cap", "turns", "max_tokens", "threads", "client")),
        "turns": dict.fromkeys(TURN_COLUMNS),
        "long_reply": dict.fromkeys(LONG_REPLY),
    }

    server: dict[str, Any]
    turns: dict[str, list]
    long_reply: dict[str, Any]

    @classmethod
    def check_own(cls, content: Mapping[str, Any], where: str) -> None:
        for name, column in content["turns"].items():
            if len(column) != content["protocol"]["turns"]:
                raise ValueError(
                    f"{where}: field 'turns.{name}' has {len(column)} values of {content['protocol']['turns']} turns"
                )


def chat_table(records: Sequence[ChatRecord]) -> str:
    """Markdown: one row a server, of the newest records (oldest first) of one model, context and number of turns."""
    if not records:
        return NONE_YET
    last = records[-1]
    newest = {r.server["name"]: r for r in records if _chat(r) == _chat(last)}
    rows = [_row(newest[name]) for name in SERVERS if name in newest]
    p = last.protocol
    releases = sorted({f"{_package(r)} {r.server['version']}" for r in newest.values()})
    said = (
        f"{last.model['name']}, a context of {p['cap']:,} tokens, {p['turns']} turns, replies of at most"
        f" {p['max_tokens']} tokens, {p['client']}. {', '.join(releases)}."
    )
    return f"{said} {machine(list(newest.values()))}\n\n{Table(HEADER, rows, left=len(HEADER)).markdown()}"


def _chat(record: ChatRecord) -> tuple:
    p = record.protocol
    return record.model["hash"], p["cap"], p["turns"], p["max_tokens"]


def _package(record: ChatRecord) -> str:
    return "sinkstream" if record.server["name"] == "sinkstream" else "xllamacpp"


def _row(record: ChatRecord) -> list[str]:
    turns, story = record.turns, record.long_reply
    refused = [at for at, status in enumerate(turns["status"], 1) if status != 200]
    told = f"{len(refused)}, from turn {refused[0]} on" if refused else "none"
    if turns["status"][-1] == 200:
        fed = turns["prompt_tokens"][-1] - (turns["cached_tokens"][-1] or 0)
        at_last = f"{turns['prompt_tokens'][-1]:,} tokens, of which {fed:,} are computed"
    else:
        at_last = f"HTTP {turns['status'][-1]} `{turns['error'][-1]}`"
    reply = turns["reply"][-1]
    length = f"{story['completion_tokens'] or 0:,} of {story['asked']:,} tokens"
    after = "answered" if story["next_status"] == 200 else f"HTTP {story['next_status']} `{story['next_error']}`"
    return [record.server["label"], told, at_last, EMPTY if reply is None else f"“{reply.strip()}”", length, after]
