"""Sampling records on disk: how long a token takes by each way of drawing, one JSON file a model and policy."""

from dataclasses import dataclass
from typing import Any

from sinkstream.records.base import StatusRecord
from sinkstream.records.schema import REQUIRED

GREEDY = "greedy"

#: Required keys, as in `schema.REQUIRED`. Milliseconds a token.
DRAW_REQUIRED: dict[str, Any] = {
    **dict.fromkeys(("schema", "id", "status", "status_reason", "created", "session", "command", "arguments")),
    "environment": REQUIRED["environment"],
    "model": REQUIRED["model"],
    "policy": dict.fromkeys(("name", "label", "options")),
    "protocol": dict.fromkeys(
        (
            *("dtype", "device", "tf32", "seed", "cap", "backend", "tokens", "warmup", "repeats", "text"),
            "text_sha256",
        )
    ),
    "draws": None,
}


@dataclass(frozen=True)
class DrawRecord(StatusRecord):
    """Ways of drawing of one model under one policy: the fields of its JSON file (see `DRAW_REQUIRED`)."""

    SCHEMA, KIND, REQUIRED, STATUSES = "sinkstream.sampling/1", "sampling", DRAW_REQUIRED, ("complete",)

    session: str
    policy: dict[str, Any]
    # one a way: ``name``, ``options`` of `Engine.generate`, ``ms`` (median of ``repeats_ms``), ``over_greedy``
    draws: list[dict[str, Any]]

    @classmethod
    def check_own(cls, content, where: str) -> None:
        for draw in content["draws"]:
            if missing := sorted({"name", "options", "ms", "over_greedy", "repeats_ms"} - draw.keys()):
                raise ValueError(f"{where}: field 'draws' lacks {missing[0]!r}")

    def over_greedy(self, name: str) -> float | None:
        """Time of a token drawn so over that of a greedy one; None if it was not timed."""
        return next((draw["over_greedy"] for draw in self.draws if draw["name"] == name), None)
