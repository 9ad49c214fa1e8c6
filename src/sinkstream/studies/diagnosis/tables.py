"""Tables and headline figures of diagnoses: one row a policy, every figure with its interval."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sinkstream.records.headline import Headline
from sinkstream.records.origin import text_and_machine
from sinkstream.records.selection import DIAGNOSED_MODELS, DIAGNOSED_TEXTS, has_model, has_text
from sinkstream.registry import Registry
from sinkstream.show.table import EMPTY, NONE_YET, Column, Table, with_interval
from sinkstream.studies.diagnosis.attribution import PARTS
from sinkstream.studies.diagnosis.record import Diagnosis

#: Tables of documents that are made from diagnosis records, and headline figures.
DIAGNOSIS_TABLES: Registry[Callable[[Sequence[Diagnosis]], str]] = Registry("diagnosis table")
DIAGNOSIS_HEADLINES: Registry[Callable[[Sequence[Diagnosis]], Headline | None]] = Registry("diagnosis headline")

Entry = Mapping[str, Any]


def interval(estimate: Mapping[str, Any] | None, digits: int, key: str = "value", scale: float = 1.0) -> str:
    """A figure with its interval as text: "+0.31 [+0.06, +0.58]"; a dash without a figure."""
    if estimate is None or estimate[key] is None:
        return EMPTY
    if estimate[key] == estimate["low"] == estimate["high"] == 0:
        return "0"
    figures = (estimate[name] for name in (key, "low", "high"))
    value, low, high = (None if x is None else scale * x for x in figures)
    return with_interval(value, low, high, digits)


def spike_of(entry: Entry) -> Mapping[str, Any]:
    """The spike against strict streaming."""
    return entry["spike"]["strict"]


def _part(name: str) -> Callable[[Entry], str]:
    def cell(entry: Entry) -> str:
        whole = entry["attribution"]
        share = whole["shares"][name]
        shown = interval(whole["parts"][name], 2, scale=100)
        return shown if share is None else f"{shown} ({100 * share:.0f} %)"

    return cell


def lengths_text(entry: Entry) -> str:
    """Visible length: shortest, mean, longest, and the share above the trained positions if there is one."""
    kv = entry["drift"]["kv_length"]
    if kv["mean"] is None:
        return EMPTY
    past = kv["share_past_trained"]
    over = f" ({100 * past:.0f} % past trained)" if past else ""
    return f"{kv['min']:,} / {kv['mean']:,.0f} / {kv['max']:,}{over}"


def drops_text(entry: Entry) -> str:
    """Drop sizes: mean, P99, maximum."""
    drops = entry["drift"]["drop_size"]
    return EMPTY if drops["mean"] is None else f"{drops['mean']:.0f} / {drops['p99']:.0f} / {drops['max']:.0f}"


#: Header, and the cell of a policy's entry; headers carry the units.
COLUMNS: list[Column] = [
    ("Policy", lambda entry: entry["label"]),
    ("ΔPPL % vs strict", lambda entry: interval(entry["delta_ppl"]["strict"], 2, "delta_percent")),
    ("Peak (nats)", lambda entry: interval(spike_of(entry)["peak"], 3)),
    ("Width (tokens)", lambda entry: interval(spike_of(entry)["width"], 1)),
    ("Area (nats)", lambda entry: interval(spike_of(entry)["area"], 2)),
    ("KV min / mean / max", lengths_text),
    ("Drop mean / P99 / max", drops_text),
    ("Verdict", lambda entry: entry["verdict"]["outcome"]),
]

#: The attribution: parts in 100 × nats per token, and their share of the whole where that is not zero by its interval.
PART_COLUMNS: list[Column] = [
    ("100 × nats per token", lambda entry: entry["label"]),
    ("all of it", lambda entry: interval(entry["attribution"]["total"], 2, scale=100)),
    *((text, _part(name)) for name, text in PARTS.items()),
]

NOTES = (
    "ΔPPL, peak, width and area are paired with strict streaming at the same cap; 95 % intervals.",
    "Peak and area: excess over the level just before the event, in the 32 tokens from it on; width is area over peak.",
    "The parts add up to the whole, log(PPL / PPL of strict); shares are given where its interval leaves out zero.",
    "With R of at most 32 every token is near an event; with R = 1 no distance can be told.",
)


def diagnosis_tables(diagnosis: Diagnosis) -> list[Table]:
    """One row a policy: its figures, and the parts of its difference from strict streaming."""
    title = f"{diagnosis.model['name']} on {diagnosis.data['name']}, cap {diagnosis.protocol['cap']}"
    policies = diagnosis.policies
    return [Table.of(policies, COLUMNS, title=title), Table.of(policies, PART_COLUMNS, notes=NOTES)]


def markdown_diagnosis(diagnosis: Diagnosis) -> str:
    """The policies of a diagnosis as Markdown tables, origin above; the notes have a section of their own."""
    tables = (replace(table, notes=()) for table in diagnosis_tables(diagnosis))
    return "\n\n".join([origin(diagnosis), *(table.markdown() for table in tables)])


def origin(diagnosis: Diagnosis) -> str:
    """One line on what a diagnosis was made from; strict streaming's own PPL is in it."""
    return f"{text_and_machine(diagnosis)} Strict PPL {diagnosis.policies[0]['strict']['ppl']:.2f}."


def render_diagnoses(results: Path) -> dict[str, str]:
    """Markdown of every registered diagnosis table, by name. Raises ValueError if the folder holds a broken record."""
    diagnoses = Diagnosis.below(results) if results.is_dir() else []
    return {name: render(diagnoses) for name, render in DIAGNOSIS_TABLES.items()}


def find_diagnosis(diagnoses: Sequence[Diagnosis], *, model: str, text: str, cap: int) -> Diagnosis | None:
    """Of a model (part of its name) on a text (part of its name) at a cap: the newest diagnosis of the most tokens."""
    found = [one for one in diagnoses if has_model(one, model) and has_text(one, text) and one.protocol["cap"] == cap]
    return max(reversed(found), key=lambda one: one.protocol["decode_tokens"], default=None)


def _register_table(name: str, **selection: Any) -> None:
    def render(diagnoses: Sequence[Diagnosis]) -> str:
        found = find_diagnosis(diagnoses, **selection)
        return NONE_YET if found is None else markdown_diagnosis(found)

    render.__doc__ = f"Diagnosis: {', '.join(f'{k} {v}' for k, v in selection.items())}."
    DIAGNOSIS_TABLES.register(name)(render)


for _model, _short in DIAGNOSED_MODELS.items():
    for _text in DIAGNOSED_TEXTS:
        _register_table(f"diagnosis-{_text.lower()}-{_short}", model=_model, text=_text, cap=512)


@DIAGNOSIS_TABLES.register("diagnosis-notes")
def diagnosis_notes(diagnoses: Sequence[Diagnosis]) -> str:
    """How to read the diagnosis tables."""
    return "\n".join(f"- {note}" for note in NOTES)


@DIAGNOSIS_HEADLINES.register("diagnosis.spike_area_lazy64")
def spike_area_lazy64(diagnoses: Sequence[Diagnosis]) -> Headline | None:
    """Spike area of lazy R=64 against strict, nats an event with interval; SmolLM2-135M, PG19, cap 512."""
    diagnosis = find_diagnosis(diagnoses, model="smollm2-135m", text="pg19", cap=512)
    if diagnosis is None:
        return None
    for entry in diagnosis.policies:
        area = spike_of(entry)["area"]
        if entry["label"] == "lazy R=64" and area["low"] is not None:
            return Headline(area["value"], diagnosis.id, area["low"], area["high"])
    return None
