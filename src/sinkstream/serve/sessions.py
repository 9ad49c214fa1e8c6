"""A session: what is known of one conversation besides its stream. No tensors; all of it goes to disk with a spill."""

import hashlib
import json
import secrets
import time
from base64 import b64decode, b64encode
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from sinkstream.serve.template import SYSTEM_ROLES, Message


def new_id(kind: str) -> str:
    """An id that cannot be guessed: 192 random bits."""
    return f"{kind}_{secrets.token_urlsafe(24)}"


def digest_of(before: str, message: Message | list) -> str:
    """Digest of a conversation that goes on with one message."""
    content = json.dumps(message, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(f"{before}\n{content}".encode("utf-8", "surrogatepass")).hexdigest()[:40]


def digests_of(messages: Sequence[Message], tools: list | None) -> list[str]:
    """Digests of the first 0, 1, 2 … messages of a conversation."""
    found = [digest_of("", tools or [])]
    for message in messages:
        found.append(digest_of(found[-1], message))
    return found


def split_head(messages: Sequence[Message]) -> tuple[list[Message], list[Message]]:
    """The system messages that a conversation begins with, and the others."""
    count = next((i for i, m in enumerate(messages) if m["role"] not in SYSTEM_ROLES), len(messages))
    return list(messages[:count]), list(messages[count:])


def last_turn(messages: Sequence[Message]) -> list[Message]:
    """The messages from the last user message on; all of them if there is none."""
    places = [i for i, m in enumerate(messages) if m["role"] == "user"]
    return list(messages[places[-1] if places else 0 :])


@dataclass
class Turn:
    """A turn that the stream still holds from its beginning on.

    Attributes
    ----------
    start : int
        Index in the stream of its first token.
    before : str
        Digest of the conversation before it.
    asked : str
        Digest with its user message.
    previous : list of Message
        The turn before it.
    response : str or None
        Id of the response that came before it.
    number : int
        The first turn of the session is 1.
    text : str
        The beginning of its user message.
    ids : list of int
        Its tokens as the stream holds them, without what was recalled for it.
    recalled : list of int
        Numbers of the turns that were read again before it.
    """

    start: int
    before: str
    asked: str
    previous: list[Message]
    response: str | None
    number: int = 0
    text: str = ""
    ids: list[int] = field(default_factory=list)
    recalled: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class ForgottenTurn:
    """A turn that the stream does not hold any more; `data` are its token ids, base64 of int32."""

    number: int
    text: str
    data: str

    @classmethod
    def of(cls, turn: Turn) -> "ForgottenTurn":
        """A turn that leaves."""
        return cls(turn.number, turn.text, b64encode(np.asarray(turn.ids, dtype="<i4").tobytes()).decode())

    @property
    def ids(self) -> list[int]:
        """Its tokens."""
        return np.frombuffer(b64decode(self.data), dtype="<i4").tolist()

    def __len__(self) -> int:
        return len(self.data) * 3 // 16  # four bytes per token, four characters for three bytes


@dataclass
class Session:
    """One conversation.

    Attributes
    ----------
    owner : str
        Digest of the API key that may see it.
    found_by : {"messages", "response", "id"}
        How its client finds it again. One that is found by its messages may be dropped at any time, since its client
        sends everything again; one that is found by a response's id is dropped once nobody has come back for long.
    sink : int or None
        Pinned tokens; None before the first token.
    head, tools
        System messages and tools, which are pinned.
    digest : str
        Of all messages.
    turn : list of Message
        The last turn, reply included.
    held : str or None
        The text of `head` and `turn` as the stream holds it; None if the stream ends where a turn may begin.
    counts : dict
        Tokens seen, kept and evicted when the stream was last looked at.
    evicted_before : int
        Tokens that were evicted before its stream began anew with another pinned text.
    archive : list of ForgottenTurn
        Turns that may be recalled, oldest first.
    """

    owner: str
    id: str = field(default_factory=lambda: new_id("sess"))
    found_by: str = "messages"
    kind: str = "chat"
    created: float = field(default_factory=time.time)
    used: float = field(default_factory=time.time)
    sink: int | None = None
    head: list[Message] = field(default_factory=list)
    tools: list | None = None
    digest: str = ""
    turn: list[Message] = field(default_factory=list)
    held: str | None = None
    turns: list[Turn] = field(default_factory=list)
    turns_seen: int = 0
    response: str | None = None
    announced: bool = False
    counts: dict[str, int] = field(default_factory=lambda: {"seen": 0, "kept": 0, "evicted": 0})
    evicted_before: int = 0
    archive: list[ForgottenTurn] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)

    @classmethod
    def of(cls, record: dict[str, Any]) -> "Session":
        """The session that `record` gave. Raises TypeError or KeyError if it is damaged."""
        archive = [ForgottenTurn(**turn) for turn in record.get("archive", [])]
        return cls(**record | {"turns": [Turn(**turn) for turn in record["turns"]], "archive": archive})

    def copy(self, **changes: Any) -> "Session":
        """The same conversation under another id."""
        now = time.time()
        return Session.of(json.loads(json.dumps(self.record() | {"id": new_id("sess"), "created": now} | changes)))

    def forget_evicted(self, oldest: float, longest: int, most: int, *, written: bool = False) -> None:
        """Forget the turns that the stream no longer holds whole.

        Parameters
        ----------
        oldest : float
            The first token of its window; infinity: the stream is gone.
        longest, most : int
            Tokens of a turn, and of all turns, that may be recalled; the oldest ones are dropped.
        written : bool
            Whether the last turn is complete; else it cannot be recalled.
        """
        gone = [turn for turn in self.turns if turn.start < oldest]
        if not gone:
            return
        whole = [turn for turn in gone if written or turn is not self.turns[-1]]
        self.archive += [ForgottenTurn.of(turn) for turn in whole if 0 < len(turn.ids) <= longest]
        self.turns = [turn for turn in self.turns if turn.start >= oldest]
        over = sum(len(turn) for turn in self.archive) - most
        while over > 0:
            over -= len(self.archive.pop(0))

    @property
    def evicted_turns(self) -> int:
        """Turns of which tokens are gone."""
        return self.turns_seen - len(self.turns)

    def view(self, state: str, cap: int) -> dict[str, Any]:
        """What its owner is told."""
        return {
            "id": self.id,
            "object": "session",
            "created": int(self.created),
            "last_used": int(self.used),
            "kind": self.kind,
            "state": state,
            "turns": {"seen": self.turns_seen, "evicted": self.evicted_turns},
            "tokens": {**self.counts, "pinned": self.sink or 0, "cap": cap},
            "recallable": {"turns": len(self.archive), "tokens": sum(len(turn) for turn in self.archive)},
        }
