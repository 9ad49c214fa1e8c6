"""Small tables over all models: what the long ones of docs/diagnosis-tables.md come to."""

from collections.abc import Sequence

from sinkstream.records.records import Record
from sinkstream.records.selection import DIAGNOSED_MODELS, DIAGNOSED_TEXTS, has_model
from sinkstream.show.table import EMPTY, NONE_YET, Table
from sinkstream.studies.cliff import tables as cliff
from sinkstream.studies.diagnosis.record import Diagnosis
from sinkstream.studies.diagnosis.tables import find_diagnosis, interval
from sinkstream.studies.recall import tables as recall
from sinkstream.studies.recall.record import RecallRecord

CAP = 512
RECALL_POLICIES = ("full", "strict", "window-only", "refresh-window-attention")
PUBLISHED_JUMP = 128  # the R at which the published tables jump
CLIFF_HEADER = (
    *("Model", "T", "R", "ΔPPL % inside the cap", "ΔPPL % outside", "Eviction (nats)", "Length > T (nats)"),
    "Share of length > T",
)


def diagnosis_overview(diagnoses: Sequence[Diagnosis]) -> str:
    """ΔPPL against strict of every policy, a column for every model and text, the longest text first."""
    columns = {}
    for text in DIAGNOSED_TEXTS:
        for model in DIAGNOSED_MODELS:
            found = find_diagnosis(diagnoses, model=model, text=text, cap=CAP)
            head = f"{model}, {text}"
            columns[f"{head} ({found.data['tokens']:,})" if found else head] = _deltas(found)
    known = {head: column for head, column in columns.items() if column}
    missing = [head for head, column in columns.items() if not column]
    policies = list(dict.fromkeys(label for column in known.values() for label in column))
    rows = [[label, *(column.get(label, EMPTY) for column in known.values())] for label in policies]
    parts = [Table(["ΔPPL % against strict [95 %]", *known], rows).markdown()] if rows else []
    if missing:
        parts.append(f"{NONE_YET}: {'; '.join(missing)}.")
    return "\n\n".join(parts)


def _deltas(diagnosis: Diagnosis | None) -> dict[str, str]:
    entries = diagnosis.policies if diagnosis else ()
    return {entry["label"]: interval(entry["delta_ppl"]["strict"], 2, "delta_percent") for entry in entries}


def recall_overview(records: Sequence[RecallRecord]) -> str:
    """Recall gain by distance of the policies that differ, all models."""
    found = {model: recall.select_recalls(records, model=model, cap=CAP) for model in DIAGNOSED_MODELS}
    found = {model: [r for r in runs if r.policy["name"] in RECALL_POLICIES] for model, runs in found.items()}
    ratios = recall.ratios_of([record for runs in found.values() for record in runs])
    rows = []
    for model, runs in found.items():
        rows += [[model, recall.display_name(record), *recall.gains_text(record, ratios)] for record in runs]
        rows += [] if runs else [[model, NONE_YET, *[EMPTY] * len(ratios)]]
    return Table(["Model", "Policy", *(f"{ratio:g} ×" for ratio in ratios)], rows, left=2).markdown()


def cliff_overview(records: Sequence[Record]) -> str:
    """What the published and the largest R cost at a cap of the trained length T, and which part is length."""
    rows = []
    for model in DIAGNOSED_MODELS:
        of_model = [r for r in records if has_model(r, model)]
        rows += _cliff_rows(model, of_model) or [[model, NONE_YET, *[EMPTY] * (len(CLIFF_HEADER) - 2)]]
    return Table(CLIFF_HEADER, rows).markdown()


def _cliff_rows(model: str, records: Sequence[Record]) -> list[list[str]]:
    lines = cliff.cliff_lines(records)
    if not lines:
        return []
    trained = lines[-1].run.record.model["trained_positions"]
    lazy = [x for x in lines if (x.run.positions, x.run.cap) == ("cache", trained) and x.run.stride > 1]
    inside, outside = ({x.run.stride: x for x in lazy if x.run.accounting == one} for one in ("peak", "published"))
    both = [stride for stride in outside if stride in inside]
    rows = []
    for stride in both:
        if stride in (PUBLISHED_JUMP, max(both)):
            eviction, _, past, share = outside[stride].parts_text
            deltas = [side[stride].delta_text for side in (inside, outside)]
            rows.append([model, f"{trained:,}", str(stride), *deltas, eviction, past, share])
    return rows
