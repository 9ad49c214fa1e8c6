"""Finding speed records by what they contain, and those that can be compared."""

from collections.abc import Iterable, Sequence
from typing import Any

from sinkstream.bench.record import BenchRecord
from sinkstream.engine import STEPS
from sinkstream.models import SHAPES as PUBLISHED
from sinkstream.models.shapes import PREFIX
from sinkstream.records.cards import of_one_card

LADDER_SHAPE = PREFIX + "pythia-2.8b"
SHAPES = [PREFIX + name for name in PUBLISHED]
LEAST_TOKENS = 500  # steady tokens of a figure of the ladder
LONG_TOKENS = 6000  # with more a record is about tails or drift, not a row of the ladder


def select(
    records: Iterable[BenchRecord],
    *,
    rung: str | None = None,
    model: str | None = None,
    policy: str | None = None,
    dtype: str | None = None,
    device: str = "cuda",
    cap: int | None = None,
    streams: int | None = None,
    short: bool = False,
) -> list[BenchRecord]:
    """The complete records that match everything given, in their order; `short` leaves out the long runs."""
    wanted = {"dtype": dtype, "device": device, "cap": cap, "streams": streams}
    return [
        record
        for record in records
        if record.status == "complete"
        and rung in (None, record.rung["name"])
        and model in (None, record.model["name"])
        and policy in (None, record.policy["label"])
        and all(value in (None, record.protocol[name]) for name, value in wanted.items())
        and not (short and record.steady["tokens"] > LONG_TOKENS)
    ]


def configuration(record: BenchRecord) -> tuple[Any, ...]:
    """What tells two records apart that are not repetitions of each other."""
    protocol = record.protocol
    return (record.rung["name"], record.policy["label"], *conditions(record), protocol["streams"], protocol["cap"])


def conditions(record: BenchRecord) -> tuple[Any, ...]:
    """What two speeds that are compared must share: hardware, model, dtype, numeric switches, releases."""
    versions, protocol = record.environment["versions"], record.protocol
    return (
        record.hardware,
        record.model["hash"],
        protocol["dtype"],
        protocol["tf32"],
        versions["torch"],
        versions["transformers"],
    )


def newest(records: Iterable[BenchRecord]) -> list[BenchRecord]:
    """The latest record of every configuration."""
    return list({configuration(record): record for record in records}.values())


def together(records: Sequence[BenchRecord]) -> list[BenchRecord]:
    """One record of every configuration: that of the command that timed most of them, else the latest."""
    configurations: dict[str, set[tuple[Any, ...]]] = {}
    for record in records:
        configurations.setdefault(record.session, set()).add(configuration(record))
    widest = max(reversed(configurations), key=lambda session: len(configurations[session]), default=None)
    return newest([*records, *(r for r in records if r.session == widest)])


def comparable(records: Sequence[BenchRecord]) -> list[BenchRecord]:
    """Those of one card (`of_one_card`) that share their conditions with the latest one there."""
    found = of_one_card(records)
    latest = max(found, key=lambda r: r.created, default=None)
    return [r for r in found if latest is not None and conditions(r) == conditions(latest)]


def fastest_rung(records: Sequence[BenchRecord]) -> str:
    """The engine's last rung that has a record; the last one of all if none has."""
    timed = {record.rung["name"] for record in select(records)}
    return next((name for name in reversed(STEPS.names()) if name in timed), STEPS.names()[-1])


def pairs(records: Sequence[BenchRecord]) -> list[tuple[BenchRecord, BenchRecord]]:
    """Records that took turns, two by two: the policy that was named first, and each of the others."""
    turns: dict[str, list[BenchRecord]] = {}
    for record in records:
        if record.protocol["in_turn"] > 1:
            turns.setdefault(record.protocol["turn"], []).append(record)
    firsts = {record.id: record for record in records}
    return [(firsts[turn], r) for turn, group in turns.items() if turn in firsts for r in group if r.id != turn]


def rival(records: Sequence[BenchRecord], record: BenchRecord, rung: str) -> BenchRecord | None:
    """The fastest record of another rung under the same conditions, cap and streams; of the same command if it has one.

    Of a rung that ran under several policies, the fastest policy's.
    """
    found = [
        r
        for r in select(records, rung=rung, device=record.protocol["device"])
        if conditions(r) == conditions(record)
        and (r.protocol["cap"], r.protocol["streams"]) == (record.protocol["cap"], record.protocol["streams"])
    ]
    same_session = [r for r in found if r.session == record.session]
    return min(same_session or found, key=lambda r: r.steady["tpot_ms"], default=None)
