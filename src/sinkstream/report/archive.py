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
DISTANCES = {16.0: "", 64.0: "-far"}  # over cap: layouts with such passages -> what the names of their tables have
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
            chosen = passages.select_recalls(recalls, model=model, cap=CAP, pooled_at=ratio)
            chosen = [r for r in chosen if r.policy["label"] in REFERENCES or r.policy["options"].get("recall")]
            chosen = chosen if passages.has_recall(chosen) else []
            with_curve = [record for record in chosen if record.curve is not None]
            found[f"recall-choosers{name}-{short}"] = _table(chosen, passages.chooser_table)
            found[f"recall-curve{name}-{short}"] = _table(with_curve, passages.curve_table)
        found[f"recall-facts-{short}"] = _table(select_facts(facts, model=model, cap=CAP), facts_table)
        of_streams = [_table(one, streameval_table) for one in select_streamevals(streams, model=model)]
        found[f"streameval-{short}"] = "\n\n".join(of_streams) or NONE_YET
        found[f"reply-{short}"] = _table(select_replies(replies, model=model), reply_table)
    return found


def _table(records: Sequence[AnyRecord], table: Callable[[Sequence[AnyRecord]], Table]) -> str:
    if not records:
        return NONE_YET
    newest = records[-1]
    return f"{newest.model['name']}, {newest.protocol['dtype']}, {machine(records)}\n\n{table(records).markdown()}"
