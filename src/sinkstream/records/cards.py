"""Records by the machine that they ran on: a figure of time is of one machine, and keeps it.

A run on another card is no newer value of the same figure. So a figure of time comes from the reference card where
that has the records for it, else from the machine of the latest record that has.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from sinkstream.measure.environment import hardware

R = TypeVar("R", bound=Any)
T = TypeVar("T")

#: Part of the name of the card that committed figures of time are of.
REFERENCE_CARD = "H100"
#: GPUs that give the same quality: of 272 points on both, 256 were equal to the bit, the others to 0.024 %.
SAME_ARITHMETIC = (("H100", "H200"),)


def card(record: Any) -> str:
    """The GPU that a record is of, or the CPU that did the work."""
    return hardware(record.environment)


def arithmetic(record: Any) -> Any:
    """What two runs must share for their losses to be compared; times need the same `card`. None: a CPU."""
    gpu = record.environment["gpu"]["name"]
    return next((alike for alike in SAME_ARITHMETIC if any(name in (gpu or "") for name in alike)), gpu)


def by_card(records: Sequence[R]) -> dict[str, list[R]]:
    """The records (in their order) of every machine: the reference card first, then the one of the latest record."""
    found: dict[str, list[R]] = {}
    for record in records:
        found.setdefault(card(record), []).append(record)
    latest = sorted(found, key=lambda name: max(r.created for r in found[name]), reverse=True)
    return {name: found[name] for name in sorted(latest, key=lambda name: REFERENCE_CARD not in name)}


def of_one_card(records: Sequence[R]) -> list[R]:
    """Those on the first machine of `by_card`."""
    return next(iter(by_card(records).values()), [])


def on_one_card(figure: Callable[[Sequence[R]], T | None], records: Sequence[R]) -> T | None:
    """A figure of the records of one machine: of the first in the order of `by_card` whose records give it."""
    return next((found for some in by_card(records).values() if (found := figure(some)) is not None), None)


def one_card(figure: Callable[[Sequence[R]], T | None]) -> Callable[[Sequence[R]], T | None]:
    """The function with its figure computed as by `on_one_card`, so that no figure has two machines in it."""

    @functools.wraps(figure)
    def of_records(records: Sequence[R]) -> T | None:
        return on_one_card(figure, records)

    return of_records


def each_card(records: Sequence[R], render: Callable[[list[R]], str]) -> str:
    """What `render` says of the records of each machine, one below the other; nothing where it says nothing."""
    return "\n\n".join(said for some in by_card(records).values() if (said := render(some)))


def cards_text(records: Sequence[Any]) -> str:
    """The machines of some records in a cell of a table, without the maker's name."""
    return " and ".join(sorted({card(record).removeprefix("NVIDIA ") for record in records}))
