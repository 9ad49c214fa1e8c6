"""Small tables over all models: what the long ones of docs/diagnosis-tables.md come to."""

from collections.abc import Sequence

from sinkstream.records.records import Record
from sinkstream.records.selection import DIAGNOSED_MODELS, DIAGNOSED_TEXTS, has_model
from sinkstream.show.markdown import EMPTY, NONE_YET, grid
from sinkstream.studies.cliff import tables as cliff
from sinkstream.studies.diagnosis import Diagnosis
from sinkstream.studies.diagnosis.tables import find_diagnosis, interval
from sinkstream.studies.recall import tables as recall
from sinkstream.studies.recall.record import RecallRecord

CAP = 512
RECALL_POLICIES = ("full", "strict", "window-only", "refresh-window-attention")
PUBLISHED_JUMP = "128"  # the R at which the published tables jump
CLIFF_HEADER = (
    *("Model", "T", "R", "ΔPPL % inside the cap", "ΔPPL % outside", "Eviction (nats)", "Length > T (nats)"),
    "Share of length > T",
)
OUTSIDE_COLUMNS = ("ΔPPL %", "Eviction (nats)", "Length > T (nats)", "Share of length > T")


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
    told = [grid(["ΔPPL % against strict [95 %]", *known], rows)] if rows else []
    if missing:
        told.append(f"{NONE_YET}: {'; '.join(missing)}.")
    return "\n\n".join(told)


def _deltas(diagnosis: Diagnosis | None) -> dict[str, str]:
    entries = diagnosis.policies if diagnosis else ()
    return {entry["label"]: interval(entry["delta_ppl"]["strict"], 2, "delta_percent") for entry in entries}


def recall_overview(records: Sequence[RecallRecord]) -> str:
    """Recall gain by distance of the policies that differ, all models."""
    lines = []
    for model in DIAGNOSED_MODELS:
        mine = [r for r in recall.select_recalls(records, model=model, cap=CAP) if r.policy["name"] in RECALL_POLICIES]
        header, rows = recall.recall_rows(mine) if mine else ([], [[NONE_YET]])
        header = ["Policy", *header[1:]]
        lines += [{"Model": model, **dict(zip(header, row))} for row in rows]
    ratios = {name for line in lines for name in line if name.endswith("×")}
    header = ["Model", "Policy", *sorted(ratios, key=lambda name: float(name.split()[0]))]
    return grid(header, [[line.get(name, EMPTY) for name in header] for line in lines])


def cliff_overview(records: Sequence[Record]) -> str:
    """What the published and the largest R cost at a cap of the trained length T, and which part is length."""
    rows = []
    for model in DIAGNOSED_MODELS:
        mine = [r for r in records if has_model(r, model)]
        rows += _cliff_rows(model, mine) or [[model, NONE_YET, *[EMPTY] * (len(CLIFF_HEADER) - 2)]]
    return grid(CLIFF_HEADER, rows)


def _cliff_rows(model: str, records: Sequence[Record]) -> list[list[str]]:
    runs = cliff.grid(records)
    if not runs:
        return []
    trained = f"{runs[-1].record.model['trained_positions']:,}"
    lines = [dict(zip(cliff.HEADER, row)) for row in cliff.cliff_rows(records)]
    lines = [line for line in lines if (line["Positions"], line["Cap"]) == ("cache", trained)]
    inside, outside = ({x["R"]: x for x in lines if x["Growth"] == f"{side} cap"} for side in ("inside", "outside"))
    both = [stride for stride in outside if stride in inside]
    shown = [stride for stride in both if stride in (PUBLISHED_JUMP, max(both, key=int))]
    return [
        [model, trained, stride, inside[stride]["ΔPPL %"], *(outside[stride][name] for name in OUTSIDE_COLUMNS)]
        for stride in shown
    ]
