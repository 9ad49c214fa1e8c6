"""Points of matrices in groups that one Pareto may hold: the same model, text, cap, precision, machine and code."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sinkstream.matrix.record import PointRecord, point_delta
from sinkstream.measure.environment import hardware
from sinkstream.records.selection import has_text
from sinkstream.report.evidence import CAP
from sinkstream.report.verdicts import against
from sinkstream.statistics import PairedDelta

#: What the points of one Pareto must share: words for a message, and the fact of a point.
SHARED: dict[str, Callable[[PointRecord], Any]] = {
    "model": lambda p: (p.model["name"], p.model["hash"]),
    "text": lambda p: (p.data["name"], p.data["sha256"]),
    "cap": lambda p: p.protocol["cap"],
    "cap accounting": lambda p: p.protocol["cap_accounting"],
    "precision": lambda p: p.protocol["dtype"],
    "machine": lambda p: hardware(p.environment),
    "commit": lambda p: (p.environment["git"]["commit"] or "unknown")[:10],
}
BASELINES = ("recompute", "strict", "full")  # what ΔPPL is measured against, the first that all points can have


@dataclass(frozen=True)
class Dot:
    """One point of a Pareto."""

    point: PointRecord
    delta: PairedDelta | None  # ΔPPL in percent against the group's baseline; None: the point is the baseline

    @property
    def y(self) -> float:
        """ΔPPL in percent."""
        return 0.0 if self.delta is None or self.delta.delta_percent is None else self.delta.delta_percent

    def total_seconds(self) -> float | None:
        """Set-up (preparation, capture, prefill) and decoding of the whole text; None without a timing."""
        speed = self.point.speed
        if speed is None:
            return None
        setup = speed["repeats"][0].get("setup") or {}
        ready = sum(setup.get(name) or 0.0 for name in ("prepare_sec", "capture_sec", "prefill_sec"))
        decoded = self.point.data["tokens"] - self.point.protocol["prefill_tokens"]
        return ready + 1e-3 * speed["tpot_ms"] * decoded


@dataclass(frozen=True)
class Group:
    """The points of one Pareto; ValueError if they cannot share one."""

    points: tuple[PointRecord, ...]

    def __post_init__(self) -> None:
        first = self.points[0]
        for name, fact in SHARED.items():
            other = next((p for p in self.points if fact(p) != fact(first)), None)
            if other is not None:
                here, there = (fact(p)[0] if isinstance(fact(p), tuple) else fact(p) for p in (first, other))
                same = " of another hash" if here == there else ""
                raise ValueError(
                    f"points {first.id} and {other.id} cannot share a Pareto: {name} is {here!r} and {there!r}{same};"
                    f" accepted: points of the same {', '.join(SHARED)}"
                )

    @property
    def title(self) -> str:
        """Model, text, cap, precision, machine and commit, in words."""
        p = self.points[0]
        where = f"{SHARED['machine'](p)}, commit {SHARED['commit'](p)}"
        return f"{p.model['name']} on {self.text}, {self.slots} slots, {p.protocol['dtype']}, {where}"

    @property
    def text(self) -> str:
        """The text and its length, in words."""
        data = self.points[0].data
        return f"{data['name']}, {data['tokens']:,} tokens"

    @property
    def slots(self) -> str:
        """The KV slots, and whether growth is on top of them."""
        protocol = self.points[0].protocol
        return f"{protocol['cap']:,}" + ("" if protocol["cap_accounting"] == "peak" else " + growth")

    @property
    def baseline(self) -> PointRecord:
        """What ΔPPL is measured against. Raises ValueError if the group has none of `BASELINES`."""
        for name in BASELINES:
            found = next((p for p in self.points if p.policy["name"] == name and p.blocks is not None), None)
            if found is not None:
                return found
        raise ValueError(f"{self.title}: no point to measure against; accepted: one of {', '.join(BASELINES)}")

    def dots(self) -> list[Dot]:
        """All points with quality, the baseline first.

        Two matrices may hold the same baseline, scored at every fourth token in one and at every 16th in the other: a
        point is paired with the one with which it has the most tokens in common. Raises ValueError if with none.
        """
        base, label = self.baseline, self.baseline.label
        bases = [p for p in self.points if p.label == label and p.blocks is not None]
        others = [p for p in self.points if p.label != label and p.blocks is not None]
        pairs = [(p, against([p], bases, label)) for p in others]
        return [Dot(base, None), *(Dot(p, pair.delta if pair else point_delta(p, base)) for p, pair in pairs)]


def groups_of(points: Sequence[PointRecord]) -> list[Group]:
    """The complete points, grouped by what a Pareto must share, where quality was measured.

    Of points of one label the newest counts, of a baseline the newest that was scored at every so many tokens.

    The largest model comes first, of it the cap of the headline figures, and PG19 before other texts; the newest of
    groups that differ in their machine or commit alone.
    """
    found: dict[tuple, dict[Any, PointRecord]] = {}
    for point in points:
        if point.status == "complete":
            key = tuple(fact(point) for fact in SHARED.values())
            every = point.quality["sample_every"] if point.quality else None
            found.setdefault(key, {})[point.label, every] = point
    groups = [Group(tuple(labelled.values())) for labelled in found.values()]
    scored = [[p for p in g.points if p.blocks is not None] for g in groups]
    with_base = [
        g for g, own in zip(groups, scored) if len(own) > 1 and any(p.policy["name"] in BASELINES for p in own)
    ]
    with_base.sort(key=lambda group: max(point.created for point in group.points), reverse=True)
    return sorted(with_base, key=_place)


def _place(group: Group) -> tuple[Any, ...]:
    first = group.points[0]
    cap = first.protocol["cap"]
    return (-(first.model["n_params"] or 0), first.model["name"], cap != CAP, cap, not has_text(first, "pg19"))


def frontier(x: Sequence[float], y: Sequence[float]) -> np.ndarray:
    """Which points (points,) no other beats on both axes, smaller being better on both: bool.

    Raises ImportError: moocore is not installed.
    """
    try:
        import moocore
    except ImportError as error:
        raise ImportError("the page needs moocore; install it with: pip install 'sinkstream[report]'") from error
    if not len(x):
        return np.zeros(0, dtype=bool)
    return np.asarray(moocore.is_nondominated(np.column_stack([x, y])), dtype=bool)
