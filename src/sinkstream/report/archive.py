"""The generated tables of recall from the archive of evicted tokens: passages, facts, streams of facts, one reply."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from sinkstream.records.base import BaseRecord
from sinkstream.records.origin import machine
from sinkstream.records.selection import DIAGNOSED_MODELS
from sinkstream.show.table import NONE_YET, Table
from sinkstream.studies.recall import tables as passages
from sinkstream.studies.recall.facts import FactsRecord
from sinkstream.studies.recall.facts_tables import facts_table, select_facts
from sinkstream.studies.recall.record import RecallRecord
from sinkstream.studies.streameval.record import StreamEvalRecord
from sinkstream.studies.streameval.reply import ReplyRecord
from sinkstream.studies.streameval.reply_tables import reply_table, select_replies
from sinkstream.studies.streameval.tables import select_streamevals, streameval_table

CAP = 512
FARTHEST = 64.0  # over cap: all layouts with such passages are shown, of a nearer distance the newest
DISTANCES = {16.0: "", FARTHEST: "-far"}  # over cap -> what the names of the tables of such passages have
REFERENCES = ("full", "strict")  # policies without recall in the tables of choosers
AnyRecord = TypeVar("AnyRecord", bound=BaseRecord)


def render_archive(results: Path) -> dict[str, str]:
    """Markdown of every table, by name. Raises ValueError: the folder holds a broken record."""
    there = results.is_dir()
    recalls = RecallRecord.below(results) if there else []
    facts = FactsRecord.below(results) if there else []
    streams = StreamEvalRecord.below(results) if there else []
    replies = ReplyRecord.below(results) if there else []
    found = {}
    for model, short in DIAGNOSED_MODELS.items():
        for ratio, name in DISTANCES.items():
            layouts = passages.select_layouts(recalls, model=model, cap=CAP, ratio=ratio)
            chosen = [_with_recall(layout) for layout in (layouts if ratio == FARTHEST else layouts[-1:])]
            with_curve = [[record for record in one if record.curve is not None] for one in chosen]
            found[f"recall-choosers{name}-{short}"] = _tables(chosen, passages.chooser_table)
            found[f"recall-curve{name}-{short}"] = _tables(with_curve, passages.curve_table)
        found[f"recall-facts-{short}"] = _table(select_facts(facts, model=model, cap=CAP), facts_table)
        found[f"streameval-{short}"] = _tables(select_streamevals(streams, model=model), streameval_table)
        found[f"reply-{short}"] = _table(select_replies(replies, model=model), reply_table)
    return found


def _with_recall(records: Sequence[RecallRecord]) -> list[RecallRecord]:
    """The records with recall, and of the references; none without recall."""
    chosen = [r for r in records if r.policy["label"] in REFERENCES or r.policy["options"].get("recall")]
    return chosen if passages.has_recall(chosen) else []


def _tables(groups: Sequence[Sequence[AnyRecord]], table: Callable[[Sequence[AnyRecord]], Table]) -> str:
    return "\n\n".join(_table(records, table) for records in groups if records) or NONE_YET


def _table(records: Sequence[AnyRecord], table: Callable[[Sequence[AnyRecord]], Table]) -> str:
    if not records:
        return NONE_YET
    newest = records[-1]
    return f"{newest.model['name']}, {newest.protocol['dtype']}, {machine(records)}\n\n{table(records).markdown()}"
