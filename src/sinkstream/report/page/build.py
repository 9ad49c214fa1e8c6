"""From a folder of records to the page."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sinkstream.bench.record import BenchRecord
from sinkstream.bench.summary import tpot_over_floor
from sinkstream.matrix.record import load_points
from sinkstream.measure.environment import hardware
from sinkstream.records.files import write_atomically
from sinkstream.records.json_files import family_of
from sinkstream.records.pairs import PAIRS_FILE
from sinkstream.records.records import SUMMARY_FILE, load_records
from sinkstream.report.answers import Answer, answers
from sinkstream.report.criteria import Evidence as Judged
from sinkstream.report.criteria import read_criteria
from sinkstream.report.ledger import judge_all
from sinkstream.report.page import charts
from sinkstream.report.page.groups import groups_of
from sinkstream.report.page.story import Evidence, Section, sections
from sinkstream.report.readme import comparable_runs
from sinkstream.show.comparison import compared_runs
from sinkstream.show.table import Table
from sinkstream.studies.diagnosis.record import Diagnosis
from sinkstream.studies.recall.record import RecallRecord
from sinkstream.studies.rivals.compare import comparisons
from sinkstream.studies.rivals.record import RivalRecord

MOST_BYTES = 3_000_000
TITLE = "A language model that streams for ever in fixed memory"
LEAD = (
    "A language model keeps notes on every token (word piece) that it has read, so that its memory grows until it is"
    " full. sinkstream keeps the first few tokens and a window of the latest ones instead. This page measures what"
    " that costs in quality, what it brings in speed, and which rule (policy) for what to keep is worth choosing."
    " Quality is perplexity: how unsure the model is of the next token, lower is better."
)
RULES = (
    "A slot is room for one token. strict keeps the first tokens (sinks) and a window of the latest, and drops the"
    " window's oldest token at every step; lazy drops R tokens at once, every R tokens; max-drop, overlap, slack and"
    " adaptive vary when and how many; refresh also keeps B older tokens, chosen by the attention that they received"
    " or by another measure; window-only keeps no first tokens; recompute reads the whole window anew for every token."
    " Brackets are 95 % intervals."
)


@dataclass(frozen=True)
class Card:
    """One figure of the first screen, and what it says."""

    figure: str
    words: str


@dataclass(frozen=True)
class Origin:
    """Commands that ran on one machine with one set of releases."""

    title: str
    commands: list[str]


def read_evidence(folder: Path, criteria: Path | None = None) -> Evidence:
    """All records below a folder, judged by a file of criteria if one is given.

    Raises ValueError: no folder, no record in it, a broken record, or a broken file of criteria.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: not a folder with records")
    evidence = Evidence(
        points=load_points(folder),
        runs=load_records(folder),
        bench=BenchRecord.below(folder),
        diagnoses=Diagnosis.below(folder),
        recalls=RecallRecord.below(folder),
        rivals=RivalRecord.below(folder),
        verdicts=None if criteria is None else verdict_table(criteria, folder),
    )
    if not evidence.all():
        names = {PAIRS_FILE, SUMMARY_FILE}
        others = sorted({str(family_of(p)) for p in folder.rglob("*.json") if p.name not in names})
        found = f"; found: {', '.join(others)}" if others else ""
        raise ValueError(f"{folder}: holds no record to show{found}; accepted: what sinkstream's commands write")
    return evidence


def verdict_table(criteria: Path, folder: Path) -> Table:
    """Every verdict of a file of criteria on the records of a folder."""
    stated = read_criteria(criteria)
    statements = {criterion.id: f"{criterion.statement} ({criterion.source})" for criterion in stated}
    found = judge_all(stated, Judged.below(folder))
    rows = [[statements[v.criterion], v.subject, v.outcome, v.figures, ", ".join(v.records)] for v in found]
    return Table(["criterion", "of", "verdict", "figures", "records"], rows, left=5)


def write_page(folder: Path, path: Path, criteria: Path | None = None) -> int:
    """Write the page of a folder of records; returns its size in bytes.

    Raises ValueError as `read_evidence`, or if the page would be larger than 3 MB; ImportError without the libraries.
    """
    evidence = read_evidence(folder, criteria)
    text = render(evidence)
    size = len(text.encode())
    if size > MOST_BYTES:
        raise ValueError(f"the page would have {size:,} bytes; accepted: at most {MOST_BYTES:,}; give fewer records")
    write_atomically(path, text)
    return size


def render(evidence: Evidence) -> str:
    """The page as HTML."""
    try:
        from jinja2 import Environment, PackageLoader
    except ImportError as error:
        raise ImportError("the page needs jinja2; install it with: pip install 'sinkstream[report]'") from error
    parts = sections(evidence)
    templates, placed = _specs(parts)
    template = Environment(loader=PackageLoader("sinkstream.report.page", ""), autoescape=True).get_template(
        "page.html.j2"
    )
    return template.render(
        title=TITLE,
        lead=LEAD,
        cards=cards(evidence),
        answers=questions(evidence),
        rules=RULES,
        sections=parts,
        latex=latex,
        script=charts.bundle().replace("</script", "<\\/script"),
        templates=_json(templates),
        charts=_json(placed),
        origins=origins(evidence),
        count=f"{len(evidence.all()):,}",
    )


def _json(content: Any) -> str:
    """JSON that may stand in a script."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/")


def _specs(parts: Sequence[Section]) -> tuple[list[dict[str, Any]], dict[str, list[Any]]]:
    """Specifications of charts without their data, and of every chart, by the id of its place, which one, and its data.

    Charts of one kind differ in little but their data.
    """
    found: dict[str, Any] = {}
    for part in parts:
        found |= {f"{part.id}-{n}": picture.spec for n, picture in enumerate(part.pictures, 1)}
        found |= {f"{part.id}-more-{n}": picture.spec for n, picture in enumerate(part.folded, 1)}
    templates: list[dict[str, Any]] = []
    placed = {}
    for place, spec in found.items():
        bare = {name: one for name, one in spec.items() if name != "data"}
        if bare not in templates:
            templates.append(bare)
        placed[place] = [templates.index(bare), spec["data"]]
    return templates, placed


def cards(evidence: Evidence) -> list[Card]:
    """The figures of the first screen: quality, the control without sinks, speed."""
    found = []
    points = next((g for g in groups_of(evidence.points) if "pg19" in g.title.lower().replace("-", "")), None)
    deltas, where = {}, ""
    if points is not None and points.baseline.policy["name"] == "recompute":
        deltas = {d.point.label: d.delta for d in points.dots() if d.delta is not None}
        where = f". {points.points[0].model['name']} on a novel ({points.text}), room for {points.slots} tokens"
    if "strict" not in deltas:
        runs = comparable_runs(evidence.runs, model="SmolLM2-135M", text="pg19", cap=512, device="cuda")
        deltas = {run.record.label: run.delta for run in compared_runs(runs) if run.delta} if runs else {}
    if (strict := deltas.get("strict")) and strict.delta_percent is not None:
        between, said = "", ""
        if strict.low is not None and strict.high is not None:
            between = f" (95 % interval: {strict.low:+.2f} to {strict.high:+.2f}"
            said = "; it holds zero, so no loss is shown)" if strict.low <= 0 <= strict.high else ")"
        words = "perplexity when every step drops the oldest token, against reading the window anew for every token"
        found.append(Card(f"{strict.delta_percent:+.2f} %", words + between + said + where))
    if (control := deltas.get("window-only")) and control.delta_percent is not None:
        words = "perplexity of the same model with as much room, when the first four tokens are not kept"
        found.append(Card(f"{control.delta_percent:+.0f} %", words))
    if (speed := tpot_over_floor(evidence.bench)) is not None:
        record = next(r for r in evidence.bench if r.id == speed.record)
        room = f"float16, room for {record.protocol['cap']:,} tokens"
        words = f"for one token in the shape of Pythia-2.8B (random weights, {room}) on an {record.hardware},"
        found.append(Card(f"{record.steady['tpot_ms']:.2f} ms", f"{words} dropping at every step"))
        words = "the time that the GPU takes to copy the bytes that a step must read: 1 is the limit of the hardware"
        found.append(Card(f"{speed.value:.2f} ×", words))
    return found


def questions(evidence: Evidence) -> list[Answer]:
    """The questions that all of it was measured for, with their answers."""
    return answers(evidence.points, evidence.recalls, comparisons(evidence.runs, evidence.rivals))


def origins(evidence: Evidence) -> list[Origin]:
    """Commands by machine, releases and commit; the most records first."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for record in evidence.all():
        info = record.environment
        versions = info["versions"]
        commit = (info["git"]["commit"] or "unknown")[:10] + (" with changes" if info["git"]["dirty"] else "")
        names = ("python", "torch", "transformers", "triton")
        releases = ", ".join(f"{name} {versions[name]}" for name in names if versions.get(name))
        driver = f", driver {info['gpu']['driver']}" if info["gpu"]["driver"] else ""
        title = "; ".join(filter(None, (f"{hardware(info)}{driver}", releases, f"commit {commit}")))
        groups.setdefault((title,), []).append(" ".join(record.command))
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    numbers = {key: f"{len(commands)} record{'s' if len(commands) > 1 else ''}" for key, commands in ordered}
    return [Origin(f"{key[0]} ({numbers[key]})", list(dict.fromkeys(commands))) for key, commands in ordered]


def latex(table: Table) -> str:
    r"""A table for a paper, with booktabs' rules."""
    columns = "l" * table.left + "r" * (len(table.header) - table.left)
    rows = [" & ".join(map(_escaped, row)) + r" \\" for row in table.rows]
    rows = [f"{{}}{row}" if row[:1] in ("[", "*") else row for row in rows]  # which the line break before would read
    head = " & ".join(map(_escaped, table.header)) + r" \\"
    body = "\n".join([r"\toprule", head, r"\midrule", *rows, r"\bottomrule"])
    return f"\\begin{{tabular}}{{{columns}}}\n{body}\n\\end{{tabular}}"


def _escaped(cell: str) -> str:
    marks = {c: rf"\{c}" for c in "&%$#_{}"}
    marks |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "Δ": r"$\Delta$"}
    marks |= {"×": r"$\times$", "÷": r"$\div$", "≤": r"$\leq$", "≥": r"$\geq$", "±": r"$\pm$", "§": r"\S{}"}
    marks |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "·": r"\textperiodcentered{}"}
    marks |= {"…": r"\ldots{}", "–": "--", "—": "---", "−": "$-$", "\n": " "}
    return "".join(marks.get(c, c) for c in cell)
