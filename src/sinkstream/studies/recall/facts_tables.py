"""Facts in a text: right answers by distance, the table and the picture of several policies."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sinkstream.records.selection import has_model
from sinkstream.show.table import Table
from sinkstream.statistics import Estimate
from sinkstream.studies.facts.pictures import CHANCE, draw_shares
from sinkstream.studies.facts.record import (
    TTFT_NOTE,
    accuracy,
    accuracy_text,
    by_label,
    forms_of,
    held_text,
    pooled,
    ttft_text,
)
from sinkstream.studies.facts.statements import FORMS
from sinkstream.studies.recall.facts import FactsRecord

FAR = 2.0  # distance over cap from which on a statement has left every window


def facts_table(records: Sequence[FactsRecord], title: str | None = None) -> Table:
    """One row a policy and form, one column a distance; records on several texts are pooled."""
    ratios = sorted({ratio for record in records for ratio in record.answers["ratio"].tolist()})
    rows, of_policy = [], by_label(records)
    for record in pooled(records):
        answers, ttft = record.answers, ttft_text(of_policy[record.label], records)
        for form in forms_of(answers):
            of_form = answers["form"] == form
            far = of_form & (answers["ratio"] >= FAR)
            cells = [accuracy_text(accuracy(answers, of_form & (answers["ratio"] == ratio))) for ratio in ratios]
            both = [accuracy_text(accuracy(answers, far, column)) for column in ("correct", "exact")]
            rows.append([record.label, form, *cells, *both, held_text(answers, far), ttft])
    header = ["Policy", "Form", *(f"{ratio:g} ×" for ratio in ratios)]
    header += [f"all from {FAR:g} ×", f"exact from {FAR:g} ×", "Brought back", "TTFT (ms)"]
    return Table(header, rows, title, [footnote(records)], left=2)


def footnote(records: Sequence[FactsRecord]) -> str:
    """What a reader must know to read the table."""
    protocol = records[0].protocol
    texts = list(dict.fromkeys(record.data["name"] for record in records))
    ends = " Of several texts the least and the most." if len(texts) > 1 else ""
    asked = {form for record in records for form in record.protocol["forms"]}
    forms = "; ".join(f"{form}: {what}" for form, what in FORMS.items() if form in asked)
    return (
        "Share of right answers, with its 95 % Wilson interval, by the distance from statement to question in"
        f" multiples of the cap ({protocol['cap']:,} slots): {protocol['facts']} facts a distance and form in each of"
        f" {', '.join(texts)}; the answer is the likeliest of {CHANCE} ({100 / CHANCE:.0f} % by chance). {forms}."
        " Exact: no token of the vocabulary is likelier. Brought back: share of the statement that recall held while"
        f" the question was answered. {TTFT_NOTE}{ends}"
    )


def draw_facts(records: Sequence[FactsRecord], path: Path | str, *, title: str | None = None) -> Path:
    """Draw right answers over distance / cap, one line a policy, cue and open form together; writes a PNG atomically.

    Raises ValueError: no records. Raises ImportError: matplotlib is not installed.
    """
    if not records:
        raise ValueError("no facts records to draw")
    ratios = sorted({ratio for record in records for ratio in record.answers["ratio"].tolist()})

    def shares(record: FactsRecord) -> list[Estimate]:
        named = record.answers["form"] != "paraphrase"
        return [accuracy(record.answers, named & (record.answers["ratio"] == ratio)) for ratio in ratios]

    return draw_shares(
        ratios,
        [f"{ratio:g}" for ratio in ratios],
        [(record.label, shares(record)) for record in pooled(records)],
        path,
        xlabel=f"distance from statement to question (× cap of {records[0].protocol['cap']:,} slots)",
        title=title or records[0].model["name"],
    )


def select_facts(records: Sequence[FactsRecord], *, model: str, cap: int) -> list[FactsRecord]:
    """The complete record of each policy, text and choice of forms of a model at a cap, full cache first.

    The one with the most answers, the newest of equals: a short trial does not take the place of a study.
    """
    runs = [r for r in records if r.status == "complete" and has_model(r, model) and r.protocol["cap"] == cap]
    fullest: dict[tuple[Any, ...], FactsRecord] = {}
    for run in runs:
        key = run.policy["label"], run.data["name"], tuple(run.protocol["forms"])
        fullest[key] = max(run, fullest.get(key, run), key=lambda one: len(one.answers["form"]))
    return sorted(fullest.values(), key=lambda record: record.policy["name"] != "full")
