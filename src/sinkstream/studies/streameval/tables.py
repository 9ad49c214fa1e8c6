"""Streaming question answering: the table and the picture of several policies, accuracy by distance."""

from collections.abc import Sequence
from pathlib import Path

from sinkstream.records.cards import by_card, cards_text
from sinkstream.records.selection import has_model
from sinkstream.show.table import Table
from sinkstream.statistics import Estimate
from sinkstream.studies.facts.pictures import CHANCE, draw_shares
from sinkstream.studies.facts.record import TTFT_NOTE, accuracy, accuracy_text, forms_of, held_text, ttft_text
from sinkstream.studies.facts.statements import FORMS
from sinkstream.studies.streameval.record import StreamEvalRecord


def distances_of(records: Sequence[StreamEvalRecord]) -> list[int]:
    """The distances in lines that were asked, the shortest first."""
    return sorted({lines for record in records for lines in record.answers["lines"].tolist()})


def streameval_table(records: Sequence[StreamEvalRecord], title: str | None = None) -> Table:
    """One row a policy and form, one column a distance."""
    distances, rows = distances_of(records), []
    several = len(by_card(records)) > 1
    for record in records:
        answers, seconds = record.answers, record.summary["seconds"]
        for form in forms_of(answers):
            of_form = answers["form"] == form
            cells = [accuracy_text(accuracy(answers, of_form & (answers["lines"] == lines))) for lines in distances]
            farthest = of_form & (answers["lines"] == max(distances))
            exact = accuracy_text(accuracy(answers, farthest, "exact"))
            more = [held_text(answers, farthest), ttft_text([record], [record]), f"{seconds:,.0f}"]
            more += [cards_text([record])] if several else []
            rows.append([record.label, form, *cells, exact, *more])
    header = ["Policy", "Form", *(f"{lines:,} lines" for lines in distances)]
    header += [f"exact, {max(distances, default=0):,} lines", "Brought back", "TTFT (ms)", "Seconds"]
    header += ["On"] if several else []
    return Table(header, rows, title, [footnote(records)], left=2)


def footnote(records: Sequence[StreamEvalRecord]) -> str:
    """What a reader must know to read the table."""
    protocol, data = records[0].protocol, records[0].data
    forms = "; ".join(f"{form}: {FORMS[form]}" for form in protocol["forms"])
    return (
        f"Share of right answers by the lines between statement and question, with its 95 % Wilson interval: a stream"
        f" of {data['tokens']:,} tokens ({data['source']}), every {protocol['every']} lines a question, the answer the"
        f" likeliest of {CHANCE} ({100 / CHANCE:.0f} % by chance). {forms}. Exact: no token of the"
        f" vocabulary is likelier. Brought back: share of the statement that"
        f" recall held while the question was answered, at the longest distance. {TTFT_NOTE} The full cache is shown"
        " where it fits the trained positions."
    )


def draw_streameval(records: Sequence[StreamEvalRecord], path: Path | str, *, title: str | None = None) -> Path:
    """Draw accuracy over the distance in lines, one line a policy, all forms together; writes a PNG atomically.

    Raises ValueError: no records. Raises ImportError: matplotlib is not installed.
    """
    if not records:
        raise ValueError("no streameval records to draw")
    distances = distances_of(records)

    def shares(record: StreamEvalRecord) -> list[Estimate]:
        return [accuracy(record.answers, record.answers["lines"] == lines) for lines in distances]

    return draw_shares(
        distances,
        [f"{lines:,}" for lines in distances],
        [(record.label, shares(record)) for record in records],
        path,
        xlabel="lines between the statement and its question",
        title=title or f"{records[0].model['name']}, cap of {records[0].protocol['cap'] or 0:,} slots",
    )


def select_streamevals(records: Sequence[StreamEvalRecord], *, model: str) -> list[list[StreamEvalRecord]]:
    """The newest complete record of each policy of a model, on each stream, the longest first; full cache first."""
    runs = [record for record in records if record.status == "complete" and has_model(record, model)]
    streams: dict[str, dict[str, StreamEvalRecord]] = {}
    for record in runs:
        streams.setdefault(record.data["sha256"], {})[record.policy["label"]] = record
    found = [sorted(one.values(), key=lambda record: record.policy["name"] != "full") for one in streams.values()]
    return sorted(found, key=lambda one: -one[0].data["tokens"])
