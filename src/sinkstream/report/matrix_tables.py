"""The tables of documents that points of matrices give: what each kind of policy gains over strict streaming."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from sinkstream.matrix.record import PointRecord
from sinkstream.records.cards import cards_text
from sinkstream.records.origin import machine
from sinkstream.report.answers import speed_tables
from sinkstream.report.criteria import Evidence
from sinkstream.report.verdicts import (
    Compared,
    against,
    baseline,
    compared,
    groups,
    is_lazy,
    is_tried,
    named,
    time_over,
    timed_beside,
)
from sinkstream.show.table import EMPTY, NONE_YET, Table, counted

HEADER = (
    *("model", "text", "cap", "PPL strict", "strict against recompute", "lazy R=64 against strict"),
    *("best without refresh against strict", "best refresh against strict", "TPOT lazy ÷ strict", "on", "records"),
)
SWEEP_HEADER = (
    *("matrix", "model", "text", "cap", "on", "policies", "ΔPPL against strict, best", "worst", "TPOT ÷ strict"),
)


def render_matrix(points: Sequence[PointRecord]) -> dict[str, str]:
    """Markdown of the tables by name, of all points, oldest first."""
    points = [point for point in points if point.status == "complete"]
    rows = [row for model in groups(Evidence(points, [], [])).values() for group in model if (row := _row(group))]
    if not rows:
        return {"matrix-answers": NONE_YET, "matrix-sweeps": NONE_YET, "matrix-speed": _speed(points)}
    head = f"{counted(len(points), 'point')}; {machine(points)}"
    return {
        "matrix-answers": f"{head}\n\n{Table(HEADER, rows, left=2).markdown()}",
        "matrix-sweeps": Table(SWEEP_HEADER, _sweeps(points), left=3).markdown(),
        "matrix-speed": _speed(points),
    }


def _speed(points: Sequence[PointRecord]) -> str:
    return (
        "\n\n".join(
            f"{timed[-1].model['name']}, {timed[-1].protocol['dtype']}, {machine(timed)}\n\n{table.markdown()}"
            for timed, table in speed_tables(points)
        )
        or NONE_YET
    )


def _sweeps(points: Sequence[PointRecord]) -> list[list[str]]:
    """A row a matrix, model, text and kind of cap: how far its policies are from strict streaming, and how fast."""
    by_id: dict[str, list[PointRecord]] = defaultdict(list)  # a configuration measured on two machines has one id
    for point in points:
        by_id[point.id].append(point)
    sweeps: dict[tuple[str, str, str, str], list[Compared]] = defaultdict(list)
    for point in filter(is_tried, points):
        measured = by_id.get(point.baselines["strict"] or "", [])
        stricts = timed_beside(point, measured) or measured
        found = compared(point, stricts[-1]) if stricts else None
        if found is not None:
            kind = point.protocol["cap_accounting"]
            sweeps[point.experiment, point.model["key"], point.data["key"], kind].append(found)
    return [_sweep(*key, found) for key, found in sorted(sweeps.items())]


def _sweep(experiment: str, model: str, text: str, kind: str, found: list[Compared]) -> list[str]:
    caps = sorted({c.point.protocol["cap"] for c in found})
    shown = " – ".join(f"{cap:,}" for cap in sorted({caps[0], caps[-1]}))
    shown += "" if kind == "peak" else ", growth outside"
    times = [time_over([c.point], [c.other]) for c in found]
    ratios = sorted(ratio for ratio in times if ratio is not None)
    speed = f"{ratios[0]:.3f} – {ratios[-1]:.3f}" if ratios else EMPTY
    ends = [pick(found, key=lambda c: c.delta.delta_percent or 0.0) for pick in (min, max)]
    places = [f" at {c.point.protocol['cap']:,}" if len(caps) > 1 else "" for c in ends]
    named_ends = [f"{c.point.label}{place}: {_delta(c)}" for c, place in zip(ends, places)]
    on = cards_text([c.point for c in found])
    return [experiment, model, text, shown, on, str(len(found)), *named_ends, speed]


def _row(group: list[PointRecord]) -> list[str] | None:
    """One row of comparable points, the ids of its points last; None without strict streaming among them."""
    strict = baseline(group, "strict")
    if strict is None or strict.ppl is None:
        return None
    lazy = baseline(group, "lazy R=64")
    recomputed = against([p for p in group if p.label == "strict"], group, "recompute")
    others = [p for p in named(group, None) if not p.policy["name"].startswith("refresh")]
    others += [p for p in group if is_lazy(p)]
    refreshes = [p for p in named(group, None) if p.policy["name"].startswith("refresh")]
    ratio = time_over([p for p in group if p.label == "lazy R=64"], [p for p in group if p.label == "strict"])
    best = [_best(others, strict), _best(refreshes, strict)]
    used = [strict, recomputed and recomputed.other, lazy, *(found and found.point for found in best)]
    ids = dict.fromkeys(f"`{point.id}`" for point in used if point is not None)
    return [
        strict.model["key"],
        strict.data["key"],
        f"{strict.protocol['cap']:,}",
        f"{strict.ppl:.2f}",
        _delta(recomputed),
        _delta(compared(lazy, strict) if lazy else None),
        *(EMPTY if found is None else f"{found.point.label}: {_delta(found)}" for found in best),
        EMPTY if ratio is None else f"{ratio:.3f}",
        cards_text([point for point in used if point is not None]),
        ", ".join(ids),
    ]


def _best(points: Iterable[PointRecord], strict: PointRecord) -> Compared | None:
    """The policy with the lowest upper end of its interval."""
    return min((c for p in points if (c := compared(p, strict)) is not None), key=lambda c: c.high, default=None)


def _delta(found: Compared | None) -> str:
    if found is None or found.delta.delta_percent is None:
        return EMPTY
    delta = found.delta
    interval = "" if delta.low is None or delta.high is None else f" [{delta.low:+.2f}, {delta.high:+.2f}]"
    return f"{delta.delta_percent:+.2f}{interval}"
