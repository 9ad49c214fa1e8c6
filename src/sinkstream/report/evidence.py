"""The headline figures that points of matrices give, and the counts of verdicts."""

from collections.abc import Callable, Sequence
from pathlib import Path

from sinkstream.matrix.record import PointRecord
from sinkstream.records.headline import Headline
from sinkstream.records.selection import has_model
from sinkstream.registry import Registry
from sinkstream.report.criteria import NOT_MEASURED, Evidence
from sinkstream.report.ledger import counts, read_ledger
from sinkstream.report.verdicts import against, baseline, compared, groups, is_tried

#: Key -> function of all complete point records, oldest first, that returns a headline, or None if records are missing.
EVIDENCE_HEADLINES: Registry[Callable[[Sequence[PointRecord]], Headline | None]] = Registry("evidence headline")
MODEL, TEXT, CAP = "smollm2-135m", "pg19", 512
CRITERIA = Path("experiments") / "criteria.toml"  # beside the folder of the records
PAGE = "docs/LEDGER.md"


@EVIDENCE_HEADLINES.register("evidence.matrix_points")
def matrix_points(points: Sequence[PointRecord]) -> Headline | None:
    """Complete points of matrices."""
    return Headline(len(points), points[-1].id) if points else None


@EVIDENCE_HEADLINES.register("evidence.delta_ppl_strict_vs_recompute")
def delta_ppl_strict_vs_recompute(points: Sequence[PointRecord]) -> Headline | None:
    """ΔPPL of strict streaming against recompute in percent: SmolLM2-135M, PG19, 512 slots, newest group of points."""
    group = _group(points)
    found = against([p for p in group if p.label == "strict"], group, "recompute")
    if found is None or found.delta.delta_percent is None:
        return None
    return Headline(found.delta.delta_percent, found.point.id, found.delta.low, found.delta.high)


@EVIDENCE_HEADLINES.register("evidence.delta_ppl_best_vs_strict")
def delta_ppl_best_vs_strict(points: Sequence[PointRecord]) -> Headline | None:
    """ΔPPL of the best eviction policy against strict in percent, equal peak slots: SmolLM2-135M, PG19, 512 slots.

    The best is the one with the lowest upper end of its interval, which does not know of the choice.
    """
    group = _group(points)
    strict = baseline(group, "strict")
    others = [point for point in group if is_tried(point)]
    found = [c for point in others if (c := compared(point, strict)) is not None and c.delta.delta_percent is not None]
    best = min(found, key=lambda c: c.high, default=None)
    if best is None or best.delta.delta_percent is None:
        return None
    return Headline(best.delta.delta_percent, best.point.id, best.delta.low, best.delta.high)


def verdict_counts(results: Path) -> dict[str, float | str] | None:
    """Verdicts on the records of a folder: how many are measured, and how many have each outcome.

    None without criteria beside the folder. Raises ValueError as `read_ledger`.
    """
    criteria = results.parent / CRITERIA
    if not criteria.is_file():
        return None
    _, found = read_ledger(criteria, results)
    numbers = counts(found)
    measured = len(found) - numbers[NOT_MEASURED]
    by_outcome = {name.replace("-", "_").replace(" ", "_"): number for name, number in numbers.items()}
    return {"value": measured, **by_outcome, "record": PAGE}


def _group(points: Sequence[PointRecord]) -> list[PointRecord]:
    """The newest comparable points of the headline figures' model, text and cap; on a GPU if there are such."""
    of_model = [p for p in points if has_model(p, MODEL) and p.protocol["cap"] == CAP]
    found = [group for model in groups(Evidence(of_model, [], []), TEXT).values() for group in model]
    on_gpu = [group for group in found if str(group[0].protocol["device"]).startswith("cuda")]
    return max(on_gpu or found, key=lambda group: group[-1].created, default=[])
