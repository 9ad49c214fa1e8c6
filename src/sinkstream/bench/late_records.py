"""Records of what a token of ``generate()`` takes at several places of a stream, their table and headline figure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sinkstream.records.base import StatusRecord
from sinkstream.records.cards import one_card
from sinkstream.records.headline import Headline
from sinkstream.records.schema import REQUIRED
from sinkstream.registry import Registry
from sinkstream.show.table import Table

#: Required keys, as in `schema.REQUIRED`. Milliseconds.
LATE_REQUIRED: dict[str, Any] = {
    **dict.fromkeys(("schema", "id", "status", "status_reason", "created", "session", "command", "arguments")),
    "environment": REQUIRED["environment"],
    "model": REQUIRED["model"],
    "policy": dict.fromkeys(("name", "label", "options")),
    "protocol": dict.fromkeys(
        ("dtype", "device", "tf32", "seed", "cap", "places", "tokens", "conversation", "continuation", "call")
    ),
    "places": None,
}

#: Milliseconds of a token at each place; what the names mean is in `protocol`.
LATE_TIMES = ("conversation", "continuation", "call")
EARLY, LATE = 1_000, 200_000

#: Key -> function of all late records, oldest first, that returns a headline, or None if records are missing.
LATE_HEADLINES: Registry[Callable[[Sequence["LateRecord"]], Headline | None]] = Registry("late headline")


@dataclass(frozen=True)
class LateRecord(StatusRecord):
    """Tokens of one model under one policy: the fields of its JSON file (see `LATE_REQUIRED`).

    Attributes
    ----------
    places : list of dict
        One a place: ``seen`` tokens before it, and ``<name>_ms`` of every name in `LATE_TIMES`.
    """

    SCHEMA, KIND, REQUIRED, STATUSES = "sinkstream.late/1", "late", LATE_REQUIRED, ("complete",)

    session: str
    policy: dict[str, Any]
    places: list[dict[str, Any]]

    @classmethod
    def check_own(cls, content, where: str) -> None:
        names = {"seen", *(f"{name}_ms" for name in LATE_TIMES)}
        for place in content["places"]:
            if missing := sorted(names - place.keys()):
                raise ValueError(f"{where}: field 'places' lacks {missing[0]!r}")

    def at(self, seen: int, name: str) -> float | None:
        """Milliseconds of a token after that many; None if it was not timed."""
        return next((place[f"{name}_ms"] for place in self.places if place["seen"] == seen), None)


def late_table(records: Sequence[LateRecord], title: str | None = None) -> Table:
    """One row a place of a stream."""
    header = ["model", "policy", "tokens before", *(f"{name} (ms)" for name in LATE_TIMES)]
    rows = [
        [r.model["name"], r.policy["label"], f"{p['seen']:,}", *(f"{p[f'{name}_ms']:.3f}" for name in LATE_TIMES)]
        for r in records
        for p in r.places
    ]
    caption = "generate(), given the whole conversation or new tokens only; call: the model with the cache alone"
    return Table(header, rows, title, [caption], 2)


@LATE_HEADLINES.register("dropin.late_over_early_token")
@one_card
def late_over_early_token(records: Sequence[LateRecord]) -> Headline | None:
    """A token of generate() after 200,000 tokens over one after 1,000, whole conversation given, newest record."""
    for record in reversed(records):
        late, early = (record.at(seen, "conversation") for seen in (LATE, EARLY))
        if late is not None and early is not None:
            return Headline(late / early, record.id)
    return None
