"""The table of documents that points of matrices give: what each kind of policy gains over strict streaming."""

from collections.abc import Iterable
from pathlib import Path

from sinkstream.matrix.record import PointRecord, load_points
from sinkstream.records.origin import machine
from sinkstream.report.criteria import Evidence
from sinkstream.report.verdicts import BASELINES, Compared, baseline, compared, groups, is_lazy, named
from sinkstream.show.table import EMPTY, NONE_YET, Table

HEADER = (
    *("model", "text", "cap", "PPL strict", "strict against recompute", "lazy R=64 against strict"),
    *("best without refresh against strict", "best refresh against strict", "TPOT lazy ÷ strict"),
)


def render_matrix(results: Path) -> dict[str, str]:
    """Markdown of the table by name. Raises ValueError if a record is broken."""
    points = [p for p in load_points(results) if p.status == "complete"] if results.is_dir() else []
    rows = [row for model in groups(Evidence(points, [], [])).values() for group in model if (row := _row(group))]
    if not rows:
        return {"matrix-answers": NONE_YET}
    return {"matrix-answers": f"{len(points)} points; {machine(points)}\n\n{Table(HEADER, rows, left=2).markdown()}"}


def _row(group: list[PointRecord]) -> list[str] | None:
    """One row of comparable points; None without strict streaming among them."""
    strict = baseline(group, "strict")
    if strict is None or strict.ppl is None:
        return None
    lazy = baseline(group, "lazy R=64")
    against = compared(strict, baseline(group, "recompute"))
    others = [p for p in named(group, None) if not p.policy["name"].startswith("refresh")]
    others += [p for p in group if is_lazy(p)]
    refreshes = [p for p in named(group, None) if p.policy["name"].startswith("refresh")]
    ratio = lazy.tpot_ms / strict.tpot_ms if lazy and lazy.tpot_ms and strict.tpot_ms else None
    return [
        strict.model["key"],
        strict.data["key"],
        f"{strict.protocol['cap']:,}",
        f"{strict.ppl:.2f}",
        _delta(against),
        _delta(compared(lazy, strict) if lazy else None),
        _best(others, strict),
        _best(refreshes, strict),
        EMPTY if ratio is None else f"{ratio:.3f}",
    ]


def _best(points: Iterable[PointRecord], strict: PointRecord) -> str:
    """The policy with the lowest upper end of its interval, with its ΔPPL."""
    found = [c for p in points if p.policy["name"] not in BASELINES and (c := compared(p, strict)) is not None]
    best = min(found, key=lambda c: c.high, default=None)
    return EMPTY if best is None else f"{best.point.label}: {_delta(best)}"


def _delta(found: Compared | None) -> str:
    if found is None or found.delta.delta_percent is None:
        return EMPTY
    delta = found.delta
    interval = "" if delta.low is None or delta.high is None else f" [{delta.low:+.2f}, {delta.high:+.2f}]"
    return f"{delta.delta_percent:+.2f}{interval}"
