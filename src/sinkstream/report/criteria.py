"""Criteria: what is to be judged, read from a TOML file, and the kinds of judgement."""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sinkstream.bench.record import BenchRecord
from sinkstream.bench.rungs import rung_names
from sinkstream.matrix.file import BASELINE_NAMES
from sinkstream.matrix.record import PointRecord, load_points
from sinkstream.policies import PRESETS
from sinkstream.records.cards import card
from sinkstream.records.toml_files import read_toml
from sinkstream.registry import Registry, did_you_mean

GO, NO_GO, STOP_LOSS, NOT_MEASURED = OUTCOMES = ("go", "no-go", "stop-loss", "not measured")
OWN = ("id", "statement", "source", "kind")
POLICIES = tuple(dict.fromkeys((*BASELINE_NAMES, *PRESETS)))
#: Key of a criterion -> the names that its values, or the first words of its labels ("lazy R=64"), may have.
NAMES: dict[str, Sequence[str]] = {
    **dict.fromkeys(("policies", "rivals", "baseline", "policy", "against_policy"), POLICIES),
    **dict.fromkeys(("rung", "against"), rung_names()),
    "otherwise": (NO_GO, STOP_LOSS),
}


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
        """Raise ValueError, naming key and value, unless the kind exists and takes the parameters and their values."""
        parameters = inspect.signature(KINDS[self.kind]).parameters.values()
        accepted = {p.name: p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
        for name in self.parameters:
            if name not in accepted:
                raise ValueError(f"{where}: unknown key {name!r}; accepted: {', '.join((*OWN, *accepted))}")
        for name, parameter in accepted.items():
            if parameter.default is inspect.Parameter.empty and name not in self.parameters:
                raise ValueError(f"{where}: key {name!r} is missing")
            if name in self.parameters:
                _check_value(name, self.parameters[name], parameter.annotation, where)


def _check_value(name: str, value: Any, annotation: Any, where: str) -> None:
    """Raise ValueError unless a value is of the type of the parameter, and what it names exists."""
    several = "list" in str(annotation)
    kind = str if several else annotation
    words = {float: "a finite number", int: "a whole number", str: "a list of names" if several else "a string"}[kind]
    values = value if several and isinstance(value, list) else [] if several else [value]
    right = (int, float) if kind is float else kind
    fits = [isinstance(one, right) and not isinstance(one, bool) for one in values]
    if not fits or not all(fits) or (kind is float and not math.isfinite(value)):
        raise ValueError(f"{where}: {name}={value!r} is not accepted; accepted: {words}")
    accepted = NAMES.get(name)
    unknown = next((one for one in values if accepted and str(one).partition(" ")[0] not in accepted), None)
    if accepted and unknown is not None:
        meant = did_you_mean(unknown, accepted)
        raise ValueError(f"{where}: {name}={unknown!r} is not known{meant}; accepted: {', '.join(accepted)}")


def read_criteria(path: Path) -> list[Criterion]:
    """The criteria of a file, in order.

    Raises ValueError, naming file and line, or criterion and key: no such file, no TOML, an unknown or missing key, an
    unknown kind, an id twice.
    """
    content = read_toml(path)
    tables = content.get("criterion")
    tables_alone = isinstance(tables, list) and all(isinstance(table, dict) for table in tables)
    if set(content) != {"criterion"} or not tables_alone or not tables:
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
