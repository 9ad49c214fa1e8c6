"""What a server is told: its cap, its limits and where idle sessions are kept."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sinkstream.policies.options import check_options, option

DEFAULT_MAX_TOKENS = 1024
SHARED = "replicas (--ray) find their sessions in files, which are written after every turn"


@dataclass(frozen=True)
class ServeSettings:
    """Limits of one server; every field is an option of ``sinkstream serve``.

    Raises
    ------
    ValueError
        Naming the option, the value and what is accepted.
    """

    cap: int = option(1024, "KV slots of one session, pinned system prompt included", minimum=16)
    pinned: int | None = option(
        None,
        "most tokens of a session's system prompt and tools; their slots are beside the rest of the cap in every"
        " resident session (default: half of the cap)",
        minimum=4,
    )
    evict: str = option("turns", "what leaves a full cache", choices=lambda: ["turns", "tokens"])
    recall: str = option("lexical", "what brings evicted turns back", choices=lambda: ["lexical", "none"])
    recall_slots: int | None = option(
        None, "most tokens of turns that come back for a question (default: a quarter of the cap)", minimum=1
    )
    recall_tokens: int = option(65536, "most tokens of evicted turns that a session may recall", minimum=1)
    resident: int = option(
        4,
        "sessions that hold a stream ready to decode, all stepped together; their memory is taken at the start",
        minimum=1,
    )
    captures: str = option(
        "common",
        "CUDA graphs that are captured before the server answers: those of greedy replies and of draws by temperature"
        " alone, those of all draws, or none, for a quick start",
        choices=lambda: ["common", "all", "none"],
    )
    queue: int = option(64, "most requests that wait or run; one more is answered 429", minimum=1)
    sessions: int = option(1024, "most sessions, spilled ones included", minimum=1)
    ram_mb: int = option(2048, "most MB of spilled sessions in RAM", minimum=0)
    disk_mb: int = option(16384, "most MB of spilled sessions on disk", minimum=0)
    write: str = option(
        "turn", "when a session is written to disk, for a server that is killed", choices=lambda: ["turn", "idle"]
    )
    body_mb: int = option(8, "most MB of a request's body", minimum=1)
    max_tokens: int | None = option(
        None,
        f"tokens of a reply whose request does not say (default: {DEFAULT_MAX_TOKENS}, or the limit if it is lower)",
        minimum=1,
    )
    max_tokens_limit: int = option(65536, "most tokens of one reply", minimum=1)
    rate: int = option(0, "most requests a minute of one key; 0: no limit", minimum=0)
    idle_seconds: int = option(
        86400, "a session that was not opened by a client is deleted after so many idle seconds", minimum=1
    )
    log_text: bool = option(False, "write prompts and replies to the log")
    spill: Path | None = None
    shared: bool = False  # whether other servers go on with the sessions of the folder too
    replicas: int = 1  # how many servers of a shared folder there should be

    def __post_init__(self) -> None:
        check_options(self)
        if (self.recall_slots or 0) > self.cap // 2:
            raise ValueError(
                f"recall_slots={self.recall_slots} is not accepted; accepted: at most {self.cap // 2}, half of the"
                f" {self.cap} slots of a session"
            )
        if (self.pinned or 0) > self.cap // 2:
            raise ValueError(
                f"pinned={self.pinned} is not accepted; accepted: at most {self.cap // 2}, half of the {self.cap} slots"
                " of a session"
            )
        if (self.max_tokens or 0) > self.max_tokens_limit:
            raise ValueError(
                f"max_tokens={self.max_tokens} with max_tokens_limit={self.max_tokens_limit} is not accepted: a request"
                f" that does not say would be refused; accepted: max_tokens of at most {self.max_tokens_limit}"
            )
        if self.shared and self.spill is None:
            raise ValueError(f"spill={self.spill} is not accepted: {SHARED}; accepted: a --spill folder")
        if self.shared and self.write != "turn":
            raise ValueError(f"write={self.write!r} is not accepted: {SHARED}; accepted: --write turn")

    @property
    def most_pinned(self) -> int:
        """The most tokens that a session pins."""
        return self.pinned or self.cap // 2

    @property
    def default_max_tokens(self) -> int:
        """Tokens of a reply whose request does not say."""
        return self.max_tokens or min(DEFAULT_MAX_TOKENS, self.max_tokens_limit)

    @property
    def recalled(self) -> int:
        """The most tokens that come back for a question; 0 without recall."""
        return 0 if self.recall == "none" else self.recall_slots or self.cap // 4

    @classmethod
    def of(cls, given: dict[str, Any]) -> "ServeSettings":
        """Settings from a mapping that may hold other names too."""
        names = {f.name for f in fields(cls)}
        return cls(**{name: value for name, value in given.items() if name in names and value is not None})
