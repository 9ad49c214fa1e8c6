"""Criteria: what is to be judged, read from a TOML file, and the kinds of judgement."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sinkstream.bench.record import BenchRecord
from sinkstream.matrix.record import PointRecord, load_points
from sinkstream.records.cards import card
from sinkstream.records.toml_files import read_toml
from sinkstream.registry import Registry

GO, NO_GO, STOP_LOSS, NOT_MEASURED = OUTCOMES = ("go", "no-go", "stop-loss", "not measured")
OWN = ("id", "statement", "source", "kind")


@dataclass(frozen=True)
class Evidence:
    """The complete records that criteria are judged by, oldest first; failed points besides.

    Of points of one id, the newest of each machine.
    """

    points: Sequence[PointRecord]
    failed: Sequence[PointRecord]
    bench: Sequence[BenchRecord]

    @classmethod
    def below(cls, results: Path) -> "Evidence":
        """All records of a folder. Raises ValueError if it is no folder, or holds a broken record."""
        if not results.is_dir():
            raise ValueError(f"{results}: not a folder with records")
        newest = {(point.id, card(point)): point for point in load_points(results)}.values()
        timed = [record for record in BenchRecord.below(results) if record.status == "complete"]
        complete, failed = ([p for p in newest if p.status == status] for status in ("complete", "failed"))
        return cls(complete, failed, timed)


@dataclass(frozen=True)
class Verdict:
    """One judgement: of a criterion, for one subject, with the figures and records that it rests on."""

    criterion: str
    subject: str  # model, or shape; empty: everything
    outcome: str  # one of `OUTCOMES`
    figures: str
    records: tuple[str, ...] = ()


#: Kind -> function of the evidence and the criterion, with a criterion's further keys as keyword arguments.
KINDS: Registry[Callable[..., list[Verdict]]] = Registry("kind of criterion")


@dataclass(frozen=True)
class Criterion:
    """What is promised, and how it is judged. Raises ValueError as `check`."""

    id: str
    statement: str
    source: str
    kind: str
    parameters: dict[str, Any] = field(default_factory=dict)

    def judge(self, evidence: Evidence) -> list[Verdict]:
        """The verdicts, one a subject; one "not measured" where no record tells."""
        found = KINDS[self.kind](evidence, self, **self.parameters)
        return found or [Verdict(self.id, "", NOT_MEASURED, "no record")]

    def check(self, where: str) -> None:
        """Raise ValueError, naming key and value, unless the kind exists and takes the parameters."""
        parameters = inspect.signature(KINDS[self.kind]).parameters.values()
        accepted = {p.name: p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
        for name in self.parameters:
            if name not in accepted:
                raise ValueError(f"{where}: unknown key {name!r}; accepted: {', '.join((*OWN, *accepted))}")
        for name, parameter in accepted.items():
            if parameter.default is inspect.Parameter.empty and name not in self.parameters:
                raise ValueError(f"{where}: key {name!r} is missing")


def read_criteria(path: Path) -> list[Criterion]:
    """The criteria of a file, in order.

    Raises ValueError, naming file and line, or criterion and key: no such file, no TOML, an unknown or missing key, an
    unknown kind, an id twice.
    """
    content = read_toml(path)
    tables = content.get("criterion")
    if set(content) != {"criterion"} or not isinstance(tables, list) or not tables:
        raise ValueError(f"{path}: accepted: one or several [[criterion]] and nothing else")
    found: dict[str, Criterion] = {}
    for number, table in enumerate(tables, 1):
        where = f"{path}: [[criterion]] {number} {table.get('id', '')}".rstrip()
        missing = [name for name in OWN if not isinstance(table.get(name), str)]
        if missing:
            raise ValueError(f"{where}: key {missing[0]!r} is missing or no string; accepted: {', '.join(OWN)}")
        own = {name: table[name] for name in OWN}
        criterion = Criterion(**own, parameters={k: v for k, v in table.items() if k not in OWN})
        if table["kind"] not in KINDS:
            raise ValueError(f"{where}: kind={table['kind']!r} is not known; accepted: {', '.join(KINDS)}")
        criterion.check(where)
        if criterion.id in found:
            raise ValueError(f"{where}: the id occurs twice")
        found[criterion.id] = criterion
    return list(found.values())
