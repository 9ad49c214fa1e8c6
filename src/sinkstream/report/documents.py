"""The generated tables of the documents, by name: every figure from records, every name from a registry."""

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sinkstream.bench.draw_tables import render_draws
from sinkstream.bench.generate_records import render_generate
from sinkstream.bench.prompt_tables import render_prompts
from sinkstream.bench.serving.tables import render_serve
from sinkstream.bench.snapshot_records import render_snapshots
from sinkstream.bench.tables import render_bench
from sinkstream.cache import ATTENTION, BOUNDED_ROPE_TYPES, FAMILIES, FAMILY, POSITIONS, ROPE_TYPES, UNSERVED
from sinkstream.data import TEXTS
from sinkstream.engine.modules import ACTIVATIONS
from sinkstream.matrix.record import load_points
from sinkstream.measure.environment import hardware
from sinkstream.models import MODEL_SOURCES
from sinkstream.policies import CAP_ACCOUNTING, PRESETS, SCORERS, TRIGGERS
from sinkstream.records.cards import card, each_card
from sinkstream.records.origin import machine, text_and_machine
from sinkstream.records.pairing import same_text_and_model
from sinkstream.records.pairs import Pairs
from sinkstream.records.records import Record, load_records
from sinkstream.records.selection import DIAGNOSED_MODELS, has_model, nearest_in_time, select
from sinkstream.registry import Registry
from sinkstream.report.answers import answer_table
from sinkstream.report.archive import render_archive
from sinkstream.report.matrix_tables import render_matrix
from sinkstream.report.overviews import cliff_overview, diagnosis_overview, recall_overview
from sinkstream.report.precision import precision_runs
from sinkstream.report.readme import comparable_runs, readme_quality
from sinkstream.report.summary import HEADLINES
from sinkstream.show.comparison import comparison_table
from sinkstream.show.table import EMPTY, NONE_YET, Column, Table
from sinkstream.studies.cliff import tables as cliff
from sinkstream.studies.diagnosis.tables import DIAGNOSIS_TABLES, render_diagnoses
from sinkstream.studies.recall import tables as recall
from sinkstream.studies.recall.record import RecallRecord
from sinkstream.studies.rivals.chat import ChatRecord, chat_table
from sinkstream.studies.rivals.compare import comparisons
from sinkstream.studies.rivals.recall import RivalRecallRecord, rival_recall_table
from sinkstream.studies.rivals.record import RivalRecord
from sinkstream.studies.rivals.tables import render_rivals

DOCUMENT_TABLES: Registry[Callable[[Sequence[Record]], str]] = Registry("document table")
RECALL_TABLES: Registry[Callable[[Sequence[RecallRecord]], str]] = Registry("document table of recall records")


def render_tables(results: Path, pairs: Pairs | None = None) -> dict[str, str]:
    """Markdown of every registered table, by name; `pairs` as in `load_records`.

    Raises ValueError: the folder holds a broken record.
    """
    there = results.is_dir()
    records, recalls = load_records(results, pairs) if there else [], RecallRecord.below(results) if there else []
    tables = {name: render(records) for name, render in DOCUMENT_TABLES.items()}
    tables |= {name: render(recalls) for name, render in RECALL_TABLES.items()}
    speed = render_bench(results) | render_prompts(results) | render_draws(results) | render_generate(results)
    speed |= render_snapshots(results) | render_serve(results)
    rival_records = RivalRecord.below(results) if there else []
    rivals = render_rivals(records, rival_records)
    rivals["rivals-recall"] = rival_recall_table(RivalRecallRecord.below(results) if there else [], recalls)
    rivals["rivals-chat"] = chat_table(ChatRecord.below(results) if there else [])
    points = load_points(results) if there else []
    rivals["matrix-questions"] = answer_table(points, recalls, comparisons(records, rival_records))
    return tables | render_diagnoses(results) | render_archive(results) | speed | rivals | render_matrix(points)


def _source(cls: type) -> str:
    """The sentence after "Source:" in a docstring."""
    text = " ".join((inspect.getdoc(cls) or "").split())
    return text.partition("Source: ")[2].partition(". ")[0].rstrip(".").replace("``", "`") or "this project"


@DOCUMENT_TABLES.register("policies")
def policies_table(records: Sequence[Record]) -> str:
    """Named policies and their options."""
    rows = []
    for name, preset in PRESETS.items():
        options = ", ".join(f"{option}={value}" for option, value in preset().items())
        rows.append([f"`{name}`", PRESETS.summary(name), f"`{options}`"])
    return Table(["`--policy`", "what it does", "options it sets"], rows, left=3).markdown()


@DOCUMENT_TABLES.register("parts")
def parts_table(records: Sequence[Record]) -> str:
    """Triggers and scorers that policies are composed of."""
    rows = [
        [registry.kind, f"`{name}`", registry.summary(name), _source(cls)]
        for registry in (TRIGGERS, SCORERS)
        for name, cls in registry.items()
    ]
    return Table(["part", "name", "what it does", "source"], rows, left=4).markdown()


@DOCUMENT_TABLES.register("features")
def features_table(records: Sequence[Record]) -> str:
    """What is accepted, from the registries; anything else is refused by name."""

    def names(*values: str) -> str:
        return ", ".join(f"`{value}`" for value in values)

    always = [rope_type for rope_type in ROPE_TYPES if rope_type not in BOUNDED_ROPE_TYPES]
    rows = [
        ["model families", names(*FAMILIES)],
        ["rotary types", f"{names(*always)}; inside the original length: {names(*BOUNDED_ROPE_TYPES)}"],
        ["attention implementations", names(*ATTENTION)],
        ["policies", f"{len(PRESETS)} named: {names(*PRESETS)}"],
        ["triggers (when to prune)", names(*TRIGGERS)],
        ["scorers (what stays pinned)", names(*SCORERS)],
        ["positions", names(*POSITIONS)],
        ["cap accounting", names(*CAP_ACCOUNTING)],
        ["model sources", names(*MODEL_SOURCES)],
        ["texts", names(*TEXTS, ".txt", ".md", ".json", ".jsonl") + ", any other text file, a directory"],
    ]
    return Table(["feature", "accepted"], rows, left=2).markdown()


@DOCUMENT_TABLES.register("families")
def families_table(records: Sequence[Record]) -> str:
    """Model families that are served, and what they are."""
    rows = [
        [f"`{name}`", FAMILY.summary(name), ", ".join(f"`{a}`" for a in family.attention), _yes(name in ACTIVATIONS)]
        for name, family in FAMILY.items()
    ]
    return Table(["`model_type`", "what it is", "attention", "engine"], rows, left=4).markdown()


@DOCUMENT_TABLES.register("unserved-families")
def unserved_families_table(records: Sequence[Record]) -> str:
    """Model families that are refused, and why."""
    rows = [[f"`{name}`", why] for name, why in UNSERVED.items()]
    return Table(["`model_type`", "why it is refused"], rows, left=2).markdown()


def _yes(served: bool) -> str:
    return "yes" if served else "no"


def quality_table(records: Sequence[Record], *, model: str, text: str, cap: int, device: str) -> str:
    """Comparison of all complete runs of one model on one text at one cap, recompute the control."""
    runs = comparable_runs(records, model=model, text=text, cap=cap, device=device)
    return _comparison(runs) if runs else NONE_YET


def _comparison(runs: Sequence[Record]) -> str:
    return f"{text_and_machine(*runs)}\n\n{comparison_table(runs).markdown()}"


def cliff_table(records: Sequence[Record], *, model: str) -> str:
    """The newest grid of ``sinkstream cliff`` of a model."""
    of_model = [r for r in records if has_model(r, model)]
    runs = cliff.grid(of_model)
    if not runs:
        return NONE_YET
    newest = runs[-1].record
    named = f"{newest.model['name']}, {newest.data['name']}, {newest.data['tokens']:,} tokens"
    origin = f"{named}, {newest.protocol['dtype']}, {machine([run.record for run in runs])}"
    return f"{origin}\n\n{cliff.cliff_table(of_model).markdown()}"


def recall_table(records: Sequence[RecallRecord], *, model: str, cap: int) -> str:
    """Recall gain by distance, all policies of a model at a cap."""
    runs = recall.select_recalls(records, model=model, cap=cap)
    if not runs:
        return NONE_YET
    return f"{text_and_machine(*runs)}\n\n{recall.recall_table(runs).markdown()}"


DIAGNOSIS_TABLES.register("diagnosis-overview")(diagnosis_overview)
RECALL_TABLES.register("recall-overview")(recall_overview)
DOCUMENT_TABLES.register("cliff-overview")(cliff_overview)
DOCUMENT_TABLES.register("readme-quality")(readme_quality)


def _register(registry: Registry, name: str, table: Callable[..., str], **selection: Any) -> None:
    def render(records: Sequence[Record] | Sequence[RecallRecord]) -> str:
        return table(records, **selection)

    doc = inspect.getdoc(table)
    assert doc is not None, "a table of the documents says what it shows"
    summary = doc.splitlines()[0].rstrip(".")
    render.__doc__ = f"{summary}: {', '.join(f'{k} {v}' for k, v in selection.items())}."
    registry.register(name)(render)


for _model, _short in DIAGNOSED_MODELS.items():
    for _cap in (512, 1024):
        _register(
            DOCUMENT_TABLES, f"pg19-{_short}-{_cap}", quality_table, model=_model, text="pg19", cap=_cap, device="cuda"
        )
    _register(
        DOCUMENT_TABLES, f"wikitext-{_short}-512", quality_table, model=_model, text="wikitext", cap=512, device="cuda"
    )
    _register(DOCUMENT_TABLES, f"cliff-{_short}", cliff_table, model=_model)
    _register(RECALL_TABLES, f"recall-{_short}-512", recall_table, model=_model, cap=512)
    _register(
        DOCUMENT_TABLES, f"pg19-{_short}-512-cpu", quality_table, model=_model, text="pg19", cap=512, device="cpu"
    )


@DOCUMENT_TABLES.register("tpot-pythia-2.8b")
def pythia_tpot_table(records: Sequence[Record]) -> str:
    """TPOT of the hf backend on the Pythia-2.8B shape, interleaved runs, against the full cache of the same session."""
    runs = select(records, model="pythia-2.8b", backend="hf", device="cuda")
    return each_card([r for r in runs if r.protocol.get("interleaved", 1) > 1], _pythia_tpot_table) or NONE_YET


def _pythia_tpot_table(runs: Sequence[Record]) -> str:
    fulls = [r for r in runs if r.policy["name"] == "full"]
    if not fulls:
        return ""
    rows = []
    for record in runs:
        same_session = nearest_in_time(record, fulls)
        if same_session is None:
            continue
        steady, kv = record.summary["steady_tpot_ms"], record.summary["kv_length"]
        counted = record.summary["timed_tokens"] - record.protocol["warmup_tokens"]
        ratio = steady["mean"] / same_session.summary["steady_tpot_ms"]["mean"]
        cells = [f"{steady[k]:.2f}" for k in ("mean", "p50", "p90", "p99")]
        rows.append([record.label, f"{counted:,}", *cells, f"{ratio:.3f}", f"{kv['min']:,} – {kv['max']:,}"])
    header = ["run", "steady tokens", "steady TPOT mean (ms)", "P50", "P90", "P99", "÷ full (mean)", "KV length"]
    return f"{text_and_machine(fulls[-1])} Random weights: speed only.\n\n{Table(header, rows).markdown()}"


PRECISION_COLUMNS: list[Column] = [
    ("model", lambda p: p.record.model["name"]),
    ("text", lambda p: p.record.data["name"]),
    ("policy", lambda p: p.record.label),
    ("engine", lambda p: f"{p.record.protocol['backend']} {p.record.protocol['dtype']}"),
    ("on", lambda p: hardware(p.record.environment)),
    ("tokens", lambda p: f"{p.tokens:,}"),
    ("PPL", lambda p: f"{p.ppl:.4f}"),
    ("PPL hf float32", lambda p: f"{p.control_ppl:.4f}"),
    ("error %", lambda p: f"{100 * p.relative_error:+.4f}"),
    ("same top token %", lambda p: EMPTY if p.agreement is None else f"{100 * p.agreement:.2f}"),
]


@DOCUMENT_TABLES.register("engine-precision")
def precision_table(records: Sequence[Record]) -> str:
    """Perplexity of the engine in half precision against the float32 hf backend, on the same tokens."""
    runs = precision_runs(records)
    return Table.of(runs, PRECISION_COLUMNS, left=5).markdown() if runs else NONE_YET


@DOCUMENT_TABLES.register("headline")
def headline_sentence(records: Sequence[Record]) -> str:
    """The promise in measured numbers, one sentence."""
    names = ("ppl_recompute", "ppl_window_only", "ppl_strict", "hf_strict_over_full_tpot")
    found = [headline for name in names if (headline := HEADLINES[f"foundation.{name}"](records)) is not None]
    if len(found) < len(names):
        return NONE_YET
    recompute, window_only, strict_ppl, ratio = found
    strict, timed = (next(r for r in records if r.id == one.record) for one in (strict_ppl, ratio))
    return (
        f"Measured: {strict.model['name']} over {strict.summary['decode_tokens']:,} tokens of a PG19 book with"
        f" {strict.protocol['cap']} KV slots has a perplexity of **{strict_ppl.value:.2f}**, where recomputing"
        f" the window for every token gives {recompute.value:.2f} and a window without sinks collapses to"
        f" {window_only.value:.2f}; in transformers, on an {card(timed)}, a token of the Pythia-2.8B shape takes"
        f" {ratio.value:.2f} × the time that it takes without any eviction."
    )


@DOCUMENT_TABLES.register("demo")
def demo_table(records: Sequence[Record]) -> str:
    """The newest demo."""
    demos = [r for r in records if "demo" in r.command[:3] and r.status == "complete"]
    if not demos:
        return NONE_YET
    same = [r for r in demos if r.command == demos[-1].command and same_text_and_model(r, demos[-1])]
    newest = {r.label: r for r in same}
    return _comparison(sorted(newest.values(), key=lambda r: r.policy["name"] != "full"))
