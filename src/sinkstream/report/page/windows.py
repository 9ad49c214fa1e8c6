"""The pictures of the window: perplexity by the number of slots, and what the number of sinks changes."""

from collections.abc import Sequence
from typing import Any

from sinkstream.matrix.record import PointRecord
from sinkstream.measure.environment import hardware
from sinkstream.records.selection import has_text
from sinkstream.report.criteria import Evidence
from sinkstream.report.page import charts
from sinkstream.report.verdicts import against, groups
from sinkstream.show.table import with_interval

#: Label of a point -> name of its line.
LINES = {"strict": "strict: sinks and window", "window-only": "window without sinks"}
FEWEST = 3  # numbers of slots, or of sinks, that make a picture


def window_pictures(points: Sequence[PointRecord]) -> list[tuple[dict[str, Any], str]]:
    """Specification and caption of each picture that the points allow: the largest model on PG19."""
    scored = [p for p in points if p.status == "complete" and p.ppl is not None and has_text(p, "pg19")]
    of_model: dict[str, list[list[PointRecord]]] = groups(Evidence(scored, [], []))
    found = sorted(of_model.values(), key=lambda g: -(g[0][0].model["n_params"] or 0))
    for of_one in found:
        pictures = [picture for picture in (_by_slots(of_one), *map(_by_sinks, of_one)) if picture is not None]
        if pictures:
            return pictures
    return []


def _by_slots(of_model: Sequence[list[PointRecord]]) -> tuple[dict[str, Any], str] | None:
    """Perplexity of strict and of a window without sinks, by the number of slots."""
    newest = {(p.label, p.protocol["cap"]): p for group in of_model for p in group if p.label in LINES}
    values = [{"line": LINES[label], "slots": cap, "y": p.ppl} for (label, cap), p in sorted(newest.items())]
    if len({value["slots"] for value in values}) < FEWEST:
        return None
    spec = charts.lines(values, "slots", "y", log=True, x_title="slots", y_title="perplexity")
    point = next(iter(newest.values()))
    return spec, f"{_origin(point)}, without the first tokens, as many as there are slots, which fill them"


def _by_sinks(group: Sequence[PointRecord]) -> tuple[dict[str, Any], str] | None:
    """ΔPPL of strict against recompute by the number of sinks, at one number of slots."""
    strict = {p.policy["options"].get("sink"): p for p in group if p.policy["name"] == "strict"}
    values = []
    for sinks, point in sorted((sinks, p) for sinks, p in strict.items() if sinks):
        found = against([point], group, "recompute")
        if found is not None and found.delta.delta_percent is not None:
            delta = found.delta
            values.append({"line": "strict", "sinks": sinks, "y": delta.delta_percent})
            values[-1] |= {"low": delta.low, "high": delta.high}
    if len(values) < FEWEST:
        return None
    spec = charts.lines(values, "sinks", "y", log=True, x_title="sinks", y_title="ΔPPL, % against recompute")
    without = against([p for p in group if p.label == "window-only"], group, "recompute")
    said = ""
    if without is not None and without.delta.delta_percent is not None:
        delta = without.delta
        said = f". Without sinks: {with_interval(delta.delta_percent, delta.low, delta.high, 1, unit=' %')}"
    first = group[0]
    return spec, f"{_origin(first)}, {first.protocol['cap']:,} slots, bars are 95 % intervals{said}"


def _origin(point: PointRecord) -> str:
    where = f"{point.protocol['dtype']}, {hardware(point.environment)}"
    return f"{point.model['name']} on {point.data['name']}, {point.data['tokens']:,} tokens, {where}"
