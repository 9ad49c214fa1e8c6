"""Records of a server under load: one JSON file a part of ``bench --serve``."""

from dataclasses import dataclass
from typing import Any

from sinkstream.records.base import StatusRecord
from sinkstream.records.schema import REQUIRED

#: Required keys, as in `schema.REQUIRED`. Milliseconds, MB of 2**20 bytes.
SERVE_REQUIRED: dict[str, Any] = {
    **dict.fromkeys(("schema", "id", "status", "status_reason", "created", "session", "command", "arguments")),
    "environment": REQUIRED["environment"],
    "model": REQUIRED["model"],
    "protocol": dict.fromkeys(("dtype", "device", "tf32", "seed", "cap", "evict", "backend", "client")),
    "part": None,
    "figures": None,
}

#: Part -> keys of its figures.
FIGURES: dict[str, tuple[str, ...]] = {
    "turns": ("turns", "reply_tokens", "length_errors", "errors", "tpot_ms", "ttft_ms", "rss_mb", "gpu_mb", "series"),
    "overhead": ("tokens", "rounds", "engine_ms", "server_ms", "over_engine"),
    "sessions": ("tokens", "rows"),
    "soak": (
        *("seconds", "users", "requests", "by_status", "unexpected_5xx", "disconnects", "refused_as_expected"),
        *("wrongly_answered", "compared", "differing", "leaked_sessions", "leaked_files", "generator", "rss_mb"),
    ),
    "restart": ("sessions", "spilled", "continued", "next_tokens", "same", "turns_lost"),
    "recall": ("talks", "turns", "facts", "unrelated", "rows"),
}
PARTS = ("turns", "overhead", "sessions", "soak", "restart", "recall")


@dataclass(frozen=True)
class ServeRecord(StatusRecord):
    """One part of what a server was measured for: the fields of its JSON file (see `SERVE_REQUIRED` and `FIGURES`).

    Attributes
    ----------
    part : str
        Name in `FIGURES`.
    figures : dict
        Of that part.
    """

    SCHEMA, KIND, REQUIRED, STATUSES = "sinkstream.serve/1", "serve", SERVE_REQUIRED, ("complete",)

    session: str
    part: str
    figures: dict[str, Any]

    @classmethod
    def check_own(cls, content, where: str) -> None:
        if content["part"] not in FIGURES:
            raise ValueError(f"{where}: field 'part' is {content['part']!r}; accepted: {', '.join(FIGURES)}")
        if missing := sorted(set(FIGURES[content["part"]]) - content["figures"].keys()):
            raise ValueError(f"{where}: field 'figures' lacks {missing[0]!r}")
