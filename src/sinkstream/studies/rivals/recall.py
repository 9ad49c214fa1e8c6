"""What rivals recall of passages that occur twice, beside our own policies on the same two streams."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from sinkstream.measure.environment import hardware
from sinkstream.records.base import StatusRecord
from sinkstream.records.selection import has_model
from sinkstream.show.table import NONE_YET, Table
from sinkstream.studies.recall.record import RecallRecord, check_passages, read_passages
from sinkstream.studies.recall.tables import display_name, gains_text, ratios_of
from sinkstream.studies.rivals.record import REQUIRED, failed_row

MODEL, CAP = "SmolLM2-135M", 512
_REQUIRED: dict[str, Any] = {name: part for name, part in REQUIRED.items() if name not in ("summary", "blocks")}
_LAYOUT = dict.fromkeys(("ratios", "passages", "passage_tokens", "control_sha256"))


@dataclass(frozen=True)
class RivalRecallRecord(StatusRecord):
    """What one rival recalls: the fields of its JSON file; `passages` as in `RecallRecord`, none if it cannot run."""

    SCHEMA, KIND, STATUSES = "sinkstream.rival-recall/1", "rival recall", ("complete", "failed")
    REQUIRED: ClassVar[dict[str, Any]] = {**_REQUIRED, "protocol": _REQUIRED["protocol"] | _LAYOUT, "passages": None}

    data: dict[str, Any]
    rival: dict[str, Any]
    checks: dict[str, Any]
    passages: dict[str, np.ndarray]

    @classmethod
    def check_own(cls, content: Mapping[str, Any], where: str) -> None:
        check_passages(content, where)

    @classmethod
    def values(cls, content: Mapping[str, Any]) -> dict[str, Any]:
        return super().values(content) | {"passages": read_passages(content)}


def rival_recall_table(rivals: Sequence[RivalRecallRecord], ours: Sequence[RecallRecord]) -> str:
    """Markdown: the gain of a passage by distance, rivals and our policies, a table for each pair of streams.

    Parameters
    ----------
    rivals, ours : sequence
        All records, oldest first.
    """
    found = [r for r in rivals if has_model(r, MODEL) and r.protocol["cap"] == CAP]
    streams = dict.fromkeys(_streams(r) for r in found if r.status == "complete")
    return "\n\n".join(_table(one, found, ours) for one in streams) or NONE_YET


def _table(streams: tuple[str, str, str], rivals: Sequence[RivalRecallRecord], ours: Sequence[RecallRecord]) -> str:
    """Markdown of the newest record of each rival and of each of our policies on a pair of streams."""
    newest = {r.rival["label"]: r for r in rivals if _streams(r) == streams}
    own = {r.policy["label"]: r for r in ours if r.status == "complete" and _streams(r) == streams}
    complete = [r for r in newest.values() if r.status == "complete"]
    shown: list[RivalRecallRecord | RecallRecord] = [*complete, *own.values()]
    ratios = ratios_of(shown)
    rows = [[r.rival["label"], *_new(r), *gains_text(r, ratios)] for r in complete]
    for run in sorted(own.values(), key=lambda r: r.policy["name"] != "full"):
        label = "full cache" if run.policy["name"] == "full" else f"**sinkstream** `{display_name(run)}`"
        rows.append([label, *_new(run), *gains_text(run, ratios)])
    header = ["way", "NLL when new", *(f"{ratio:g} ×" for ratio in ratios)]
    failed = [r for r in newest.values() if r.status == "failed"]
    rows += [failed_row(r.rival["label"], r.status_reason, header) for r in failed]
    first = complete[0]
    of = f"{first.model['name']}, {first.data['name']}, {first.data['tokens']:,} tokens,"
    layout = (
        f"{first.protocol['passages']} passages of {first.protocol['passage_tokens']} tokens a distance, cap {CAP}."
    )
    machines = sorted({hardware(r.environment) for r in shown})
    return f"{of} {layout} {', '.join(machines)}.\n\n{Table(header, rows).markdown()}"


def _streams(record: RivalRecallRecord | RecallRecord) -> tuple[str, str, str]:
    """The model and the two streams."""
    return record.model["hash"], record.data["sha256"], record.protocol["control_sha256"]


def _new(record: RivalRecallRecord | RecallRecord) -> list[str]:
    return [f"{record.passages['nll_unseen'].mean():.2f}"]
