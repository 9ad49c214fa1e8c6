"""The ledger: every verdict on one page, from criteria and records alone."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from sinkstream.report import verdicts  # noqa: F401  (registers the kinds of criteria)
from sinkstream.report.criteria import OUTCOMES, Criterion, Evidence, Verdict, read_criteria
from sinkstream.show.table import Table

TITLE = "# Ledger of verdicts"
INTRODUCTION = (
    "Written by `sinkstream verdict` from `experiments/criteria.toml` and the records of `results/`; nobody types a"
    " verdict. Intervals are 95 %; a limit is met where the upper end of the interval meets it. How criteria are"
    " judged: [matrix.md](matrix.md#verdicts)."
)


def judge_all(criteria: Sequence[Criterion], evidence: Evidence) -> list[Verdict]:
    """The verdicts of all criteria, in their order."""
    return [verdict for criterion in criteria for verdict in criterion.judge(evidence)]


def counts(found: Sequence[Verdict]) -> dict[str, int]:
    """How many verdicts have each outcome, all outcomes listed."""
    number = Counter(verdict.outcome for verdict in found)
    return {outcome: number[outcome] for outcome in OUTCOMES}


def ledger(criteria: Sequence[Criterion], found: Sequence[Verdict]) -> str:
    """The Markdown page."""
    statements = {criterion.id: criterion for criterion in criteria}
    summary = ", ".join(f"{number} {outcome}" for outcome, number in counts(found).items())
    rows = []
    for verdict in found:
        criterion = statements[verdict.criterion]
        records = ", ".join(f"`{one}`" for one in verdict.records)
        cells = [f"{criterion.statement} ({criterion.source})", verdict.subject, f"**{verdict.outcome}**"]
        rows.append([*cells, verdict.figures.replace("|", "/"), records])
    table = Table(["criterion", "of", "verdict", "figures", "records"], rows, left=5).markdown()
    return f"{TITLE}\n\n{INTRODUCTION}\n\n{summary}.\n\n{table}\n"


def read_ledger(criteria_file: Path, results: Path) -> tuple[str, list[Verdict]]:
    """The page and its verdicts from the files. Raises ValueError as `read_criteria` and `Evidence.below`."""
    criteria = read_criteria(criteria_file)
    found = judge_all(criteria, Evidence.below(results))
    return ledger(criteria, found), found
