"""The sections of the page, in the order of the plan: each with its sentence, its pictures and its tables."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sinkstream.bench.record import BenchRecord
from sinkstream.bench.selection import LADDER_SHAPE, comparable, select, together
from sinkstream.matrix.record import PointRecord, point_delta
from sinkstream.measure.environment import hardware
from sinkstream.records.origin import text_and_machine
from sinkstream.records.records import Record
from sinkstream.records.selection import DIAGNOSED_TEXTS, has_text
from sinkstream.report.answers import speed_tables
from sinkstream.report.page import charts
from sinkstream.report.page.groups import Group, frontier, groups_of
from sinkstream.report.page.windows import window_pictures
from sinkstream.show.table import EMPTY, Table, with_interval
from sinkstream.studies.diagnosis.record import Diagnosis
from sinkstream.studies.diagnosis.tables import PARTS
from sinkstream.studies.recall.record import RecallRecord
from sinkstream.studies.recall.tables import recall_curve
from sinkstream.studies.rivals.compare import comparisons
from sinkstream.studies.rivals.record import RivalRecord
from sinkstream.studies.rivals.tables import origin, quality_table

FAR_PPL = 1.3  # times the least perplexity: a policy above it is off the chart of recall, named below it


@dataclass(frozen=True)
class Evidence:
    """All records of a folder, by kind, oldest first."""

    points: list[PointRecord]
    runs: list[Record]
    bench: list[BenchRecord]
    diagnoses: list[Diagnosis]
    recalls: list[RecallRecord]
    rivals: list[RivalRecord]
    verdicts: Table | None = None  # of the criteria that the records are judged by

    def all(self) -> list[Any]:
        """Every record."""
        return [*self.points, *self.runs, *self.bench, *self.diagnoses, *self.recalls, *self.rivals]


@dataclass(frozen=True)
class Picture:
    """A chart and what a reader must know of it."""

    spec: dict[str, Any]
    caption: str


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    id: str
    title: str
    lead: str  # what the pictures show, in a sentence or two
    pictures: list[Picture] = field(default_factory=list)
    tables: list[tuple[str, Table]] = field(default_factory=list)  # caption and table
    folded: list[Picture] = field(default_factory=list)  # more pictures of the same kind


def pareto_section(evidence: Evidence) -> Section | None:
    """ΔPPL against time, one picture for each model, text and cap."""
    groups = [g for g in groups_of(evidence.points) if sum(p.speed is not None for p in g.points) > 1]
    if not groups:
        return None
    first = {group.text: group for group in reversed(groups)}  # the first of each text leads
    groups.sort(key=lambda group: group is not first[group.text])
    pictures = []
    for group in groups:
        values = charts.pareto_values(group)
        caption = group.title + charts.hidden(values) + _noise(group)
        pictures.append(Picture(charts.pareto(values, group.baseline.label), caption))
    return Section(
        "pareto",
        "Quality against speed",
        "Each dot is one rule for what stays in memory. Down is better (less quality lost), left is better (faster)."
        " The dashed line joins the rules that no other rule beats on both; bars are 95 % intervals. Every dot says"
        " what it is when the pointer is on it.",
        pictures[:2],
        [(g.title, point_table(g)) for g in groups],
        pictures[2:],
    )


def _noise(group: Group) -> str:
    """How far the times of one rule lie apart, where a rule was timed more than once."""
    ranges = [p.speed["tpot_ms_range"] for p in group.points if p.speed and len(p.speed["repeats"]) > 1]
    if not ranges:
        return ""
    return f". Times of one rule lie up to {100 * max(high / low - 1 for low, high in ranges):.1f} % apart"


def point_table(group: Group) -> Table:
    """Every figure of a group's points."""
    header = ["policy", "PPL", "ΔPPL % [95 %]", "ms per token", "P50", "P90", "P99"]
    header += ["times the floor", "peak memory, MB"]
    rows = []
    for dot in group.dots():
        point, speed = dot.point, dot.point.speed
        delta = "baseline" if dot.delta is None else _delta_text(dot.delta)
        times = [EMPTY] * 6
        if speed is not None:
            latency = [f"{speed['latency_ms'][name]:.3f}" for name in ("p50", "p90", "p99")]
            over = EMPTY if speed["over_floor"] is None else f"{speed['over_floor']:.3f}"
            memory = EMPTY if point.peak_mb is None else f"{point.peak_mb:,.0f}"
            times = [f"{speed['tpot_ms']:.3f}", *latency, over, memory]
        rows.append([point.label, EMPTY if point.ppl is None else f"{point.ppl:.3f}", delta, *times])
    return Table(header, rows)


def _delta_text(delta: Any) -> str:
    return with_interval(delta.delta_percent, delta.low, delta.high, 2)


def memory_section(evidence: Evidence) -> Section | None:
    """ΔPPL against peak memory."""
    pictures = []
    for group in groups_of(evidence.points):
        values = [v for v in charts.pareto_values(group, by_time=False) if v["memory"] is not None]
        if len(values) > 1:
            spec = charts.pareto(values, group.baseline.label, x="memory")
            pictures.append(Picture(spec, group.title + charts.hidden(values)))
    if not pictures:
        return None
    lead = (
        "The same dots against the most memory that was held while decoding, weights included. Down and left are"
        " better."
    )
    return Section("memory", "Quality against memory", lead, pictures[:2], folded=pictures[2:])


def lazy_section(evidence: Evidence) -> Section | None:
    """What pruning rarely costs, by R."""
    values = []
    for diagnosis in _newest_diagnoses(evidence):
        for entry in diagnosis.policies:
            options = entry["policy"]["options"]
            if entry["policy"]["name"] == "lazy" and (delta := _delta(entry)):
                values.append({"line": short(diagnosis), "r": options["compress_every"], **delta})
    pictures = [Picture(*picture) for picture in window_pictures(evidence.points)]
    lead = "Perplexity by the number of slots, with sinks (the first tokens) and without." if pictures else ""
    if len(values) > 1:
        spec = charts.lines(
            values, "r", "y", log=True, x_title="R: tokens between two prunes", y_title="ΔPPL, % against R = 1"
        )
        pictures.append(Picture(spec, _origin_of(evidence)))
        lead += (
            " Pruning every R tokens instead of at every token saves work in an ordinary decode loop. At the same peak"
            f" the cache then holds up to R − 1 tokens fewer, and R tokens leave at once. {_largest(values)}"
        )
    return Section("lazy", "Window and lazy pruning", lead.strip(), pictures) if pictures else None


def _largest(values: Sequence[dict[str, Any]]) -> str:
    """What the largest R costs on the first line of the picture."""
    first = [value for value in values if value["line"] == values[0]["line"]]
    last = max(first, key=lambda value: value["r"])
    return f"At R = {last['r']}: {with_interval(last['y'], last['low'], last['high'], 2, unit=' %')} ({last['line']})."


def _where_it_comes_from(evidence: Evidence) -> str:
    """The attribution of the loss at the largest R, of the first diagnosis whose interval leaves out zero."""
    for diagnosis in _newest_diagnoses(evidence):
        lazy = [entry for entry in diagnosis.policies if entry["policy"]["name"] == "lazy"]
        last = max(lazy, key=lambda entry: entry["policy"]["options"]["compress_every"], default=None)
        shares = {} if last is None else last["attribution"]["shares"]
        known = {name: share for name, share in shares.items() if share is not None}
        if last is not None and known:
            parts = [f"{PARTS[name]} {100 * share:.0f} %" for name, share in known.items() if abs(share) >= 0.005]
            r = last["policy"]["options"]["compress_every"]
            return f"Where the loss at R = {r} comes from ({short(diagnosis)}): {', '.join(parts)}."
    return ""


def mechanism_section(evidence: Evidence) -> Section | None:
    """The spike after a prune, by R."""
    values = []
    for diagnosis in _newest_diagnoses(evidence):
        for entry in diagnosis.policies:
            area = (entry["spike"].get("strict") or {}).get("area")
            if entry["policy"]["name"] == "lazy" and area and area["value"] is not None:
                name = short(diagnosis)
                r = entry["policy"]["options"]["compress_every"]
                values.append({"line": name, "r": r, "y": area["value"], "low": area["low"], "high": area["high"]})
    if len(values) < 2:
        return None
    spec = charts.lines(
        values, "r", "y", log=True, x_title="R: tokens between two prunes", y_title="extra loss after a prune, nats"
    )
    lead = (
        "Does quality break at the moment of a prune? The picture sums the extra loss just after a prune, against"
        " strict streaming on the same tokens; a bar that crosses zero says that the text shows no spike."
        f" {_where_it_comes_from(evidence)}"
    )
    return Section("mechanism", "Why quality breaks", lead, [Picture(spec, _origin_of(evidence))])


def control_section(evidence: Evidence) -> Section | None:
    """ΔPPL of every policy against strict."""
    pictures, tables = [], []
    for diagnosis in _newest_diagnoses(evidence):
        values = []
        for entry in diagnosis.policies:
            if delta := _delta(entry):
                text = with_interval(delta["y"], delta["low"], delta["high"], 2)
                kind = charts.kind(entry["policy"]["name"])
                values.append({"label": entry["label"], "kind": kind, **delta, "text": text})
        values.sort(key=lambda value: value["y"])
        caption = text_and_machine(diagnosis).replace("`", "")
        pictures.append(Picture(charts.whiskers(values, "ΔPPL, % against strict"), caption))
        rows = [[v["label"], v["kind"], v["text"]] for v in values]
        tables.append((caption, Table(["policy", "kind", "ΔPPL % against strict [95 %]"], rows, left=2)))
    if not pictures:
        return None
    lead = (
        "Staged drops, overlap, slack, pinned older tokens and adaptive pruning, all at the same peak number of"
        " slots. Left of zero is better than strict streaming; a bar that crosses zero says that the text shows no"
        " difference."
    )
    return Section("control", "Controlled eviction", lead, pictures[:2], tables, pictures[2:])


def speed_section(evidence: Evidence) -> Section | None:
    """The ladder of ways to decode against the byte floor."""
    rows = select(evidence.bench, model=LADDER_SHAPE, cap=2052, streams=1, dtype="float16", short=True)
    rows = sorted(together(comparable(rows)), key=lambda r: r.steady["tpot_ms"])
    if len(rows) < 2:
        return None
    values = [
        {
            "label": f"{r.rung['name']}, {r.policy['label']}",
            **{"ms": r.steady["tpot_ms"], "over": r.steady["over_floor"], "record": r.id},
        }
        for r in rows
    ]
    best = rows[0]
    header = ["way", "policy", "ms per token", "P50", "P90", "P99", "times the floor", "GB/s"]
    cells = [
        [
            *(r.rung["name"], r.policy["label"], f"{r.steady['tpot_ms']:.3f}"),
            *(
                EMPTY if r.latency_ms["all"][n] is None else f"{r.latency_ms['all'][n]:.3f}"
                for n in ("p50", "p90", "p99")
            ),
            *(f"{r.steady['over_floor']:.2f}", f"{r.steady['gbs']:,.0f}"),
        ]
        for r in rows
    ]
    machine = (
        f"Pythia-2.8B shape (random weights), float16, batch 1, 2,052 slots, {best.hardware}; the red line is the"
        " floor, a copy of the bytes that a step must read. Ways: hf is transformers' loop (full, static: nothing is"
        " dropped; cut: keys are cut and rotated anew; recompute), fused is the engine, the others are steps towards it"
    )
    lead = (
        f"In the session that timed all of them the fastest way took {best.steady['tpot_ms']:.2f} ms per token:"
        f" {best.steady['over_floor']:.2f} times the time of a copy of the bytes that one step must read. Nothing"
        " that reads all weights once a token can be faster than that."
    )
    spec = charts.ladder(values, best.floor["ms"])
    tables = [(machine, Table(header, cells, left=2))]
    tables += [(_without_quality(timed[-1]), by_cap) for timed, by_cap in speed_tables(evidence.points)]
    return Section("speed", "Speed against the floor", lead, [Picture(spec, machine)], tables)


def _without_quality(point: PointRecord) -> str:
    """What the points of a card share that are timed only, of one of them."""
    machine = hardware(point.environment)
    return f"Every rule at several numbers of slots: {point.model['name']}, {point.protocol['dtype']}, {machine}"


def recall_section(evidence: Evidence) -> Section | None:
    """What is left of a passage, by distance, and against perplexity."""
    pictures = []
    for same in _recalls_by_stream(evidence):
        first = next(iter(same.values()))
        named = f"{first.model['name']} on {first.data['name']}, {first.protocol['cap']:,} slots"
        pictures += [Picture(spec, f"{named}; {said}") for spec, said in _recall_pictures(same)]
    if not pictures:
        return None
    lead = (
        "Perplexity hides what is forgotten. A passage is read twice; the picture says how much easier it is the second"
        " time. Zero is forgotten. Up is better."
    )
    return Section("recall", "What is remembered", lead, pictures[:2], folded=pictures[2:])


def _recalls_by_stream(evidence: Evidence) -> list[dict[str, RecallRecord]]:
    """The newest record of each policy by its label, a dict for each model, pair of streams and cap with several.

    The largest model comes first, of it the streams with the most policies.
    """
    found: dict[tuple, dict[str, RecallRecord]] = {}
    for record in evidence.recalls:
        if record.status == "complete":
            streams = record.data["sha256"], record.protocol.get("control_sha256")
            found.setdefault((record.model["hash"], *streams, record.protocol["cap"]), {})[record.label] = record
    several = [same for same in found.values() if len(same) > 1]
    return sorted(several, key=lambda same: (-next(iter(same.values())).model["n_params"], -len(same)))


def _recall_pictures(records: dict[str, RecallRecord]) -> list[tuple[dict[str, Any], str]]:
    """The curves of all policies, and recall one window back against perplexity."""
    curves = {label: recall_curve(record) for label, record in records.items()}
    values = [
        {"line": label, "ratio": p.ratio, "y": p.gain.value, "low": p.gain.low, "high": p.gain.high}
        for label, curve in curves.items()
        for p in curve
    ]
    x_title, y_title = "distance of the passage, in windows", "recall, nats per token"
    spec = charts.lines(values, "ratio", "y", log=True, x_title=x_title, y_title=y_title)
    back = [
        {
            **{"label": label, "kind": charts.kind(records[label].policy["name"]), "x": records[label].summary["ppl"]},
            **{"y": p.gain.value, "low": p.gain.low, "high": p.gain.high},
            "text": with_interval(p.gain.value, p.gain.low, p.gain.high, 2),
        }
        for label, curve in curves.items()
        for p in curve
        if p.ratio == 1 and records[label].summary["ppl"] is not None and p.gain.value is not None
    ]
    far = FAR_PPL * min((v["x"] for v in back), default=0.0)
    off = "; ".join(f"{v['label']} (perplexity {v['x']:.1f}, {v['text']})" for v in back if v["x"] > far)
    back = [v for v in back if v["x"] <= far]
    front = frontier([v["x"] for v in back], [-v["y"] for v in back])
    back = [value | {"front": bool(best)} for value, best in zip(back, front)]
    found = [(spec, "bars are 95 % intervals")]
    if len(back) > 1:
        pareto = charts.recall_pareto(back, "perplexity", "recall one window back, nats per token")
        said = "up and left are better; the dashed line joins what nothing beats on both"
        found.append((pareto, said + (f". Off the chart: {off}" if off else "")))
    return found


def rivals_section(evidence: Evidence) -> Section | None:
    """Rivals on the same tokens."""
    found = [c for c in comparisons(evidence.runs, evidence.rivals) if c.scored()]
    if not found:
        return None
    lead = "Other projects on the same tokens, at the same peak number of slots; the nearest rival comes first."
    return Section("rivals", "Rivals", lead, tables=[(origin(c), _plain(quality_table(c))) for c in found])


def _plain(table: Table) -> Table:
    """Without Markdown's marks."""
    rows = [[cell.replace("**", "").replace("`", "") for cell in row] for row in table.rows]
    return Table([name.replace("`", "") for name in table.header], rows, left=table.left)


def verdict_section(evidence: Evidence) -> Section | None:
    """Go, no-go, stop-loss or not measured."""
    if evidence.verdicts is None:
        return None
    lead = (
        "What was promised before it was measured, and what the records say: go, no-go, stop-loss, or not measured. No"
        " verdict is typed."
    )
    return Section("verdicts", "Verdicts", lead, tables=[("", evidence.verdicts)])


def choice_section(evidence: Evidence) -> Section | None:
    """What a user should choose, from the points: the frontier in words, a row for each model, text and slots."""
    rows: list[list[str]] = []
    largest: dict[tuple[str, ...], Group] = {}
    for group in groups_of(evidence.points):
        point = group.points[0]
        key = (point.model["hash"], point.data["sha256"], group.slots)
        largest[key] = max(largest.get(key, group), group, key=lambda one: len(one.points))
    places = list(dict.fromkeys(key[:2] for key in largest))
    for _, group in sorted(
        largest.items(), key=lambda one: (places.index(one[0][:2]), one[1].points[0].protocol["cap"])
    ):
        values = [v for v in charts.pareto_values(group) if not v["outlier"]]
        candidates = [v for v in values if not v["kind"].startswith(("recompute", "full", "no sinks"))]
        if not candidates:
            continue
        points = {point.id: point for point in group.points}
        best = min(candidates, key=lambda v: v["y"])
        fast = min(candidates, key=lambda v: v["tpot"])
        between = "the same rule"
        if fast is not best:
            between = _delta_text(point_delta(points[fast["record"]], points[best["record"]]))
        rows.append(
            [
                *(group.points[0].model["name"], group.text, group.slots),
                *(f"{best['label']} ({best['y']:+.2f} %)", f"{fast['label']} ({fast['tpot']:.3f} ms)", between),
            ]
        )
    if not rows:
        return None
    header = ["model", "text", "slots", "least loss", "fastest", "between, ΔPPL % [95 %]"]
    lead = (
        "A text that fits into the slots needs no rule: nothing is dropped. For longer ones, by model and text: the"
        " rule that loses least against the baseline, the rule that is fastest, and what the fastest loses against the"
        " other. An interval that holds zero says that the text shows no difference. The best of many rules was chosen"
        " on the text that judges it."
    )
    return Section("choice", "What to choose", lead, tables=[("", Table(header, rows, left=5))])


def short(record: Any) -> str:
    """Model and text in a few words: "SmolLM2-135M, PG19"."""
    text = next((name for name in DIAGNOSED_TEXTS if has_text(record, name)), record.data["name"])
    return f"{record.model['name'].partition('-Instruct')[0].partition('.gguf')[0]}, {text}"


def _newest_diagnoses(evidence: Evidence) -> list[Diagnosis]:
    """The newest diagnosis of each model, text and cap; the largest model first, PG19 before other texts."""
    newest = {(d.model["name"], d.data["name"], d.protocol["cap"]): d for d in evidence.diagnoses}
    return sorted(newest.values(), key=lambda d: (-d.model["n_params"], d.model["name"], not has_text(d, "PG19")))


def _delta(entry: dict[str, Any]) -> dict[str, Any] | None:
    """ΔPPL against strict and its interval."""
    delta = entry["delta_ppl"].get("strict") or {}
    if delta.get("delta_percent") is None:
        return None
    return {"y": delta["delta_percent"], "low": delta["low"], "high": delta["high"]}


def _origin_of(evidence: Evidence) -> str:
    """What the diagnoses share."""
    found = _newest_diagnoses(evidence)
    machines = sorted({f"{d.protocol['dtype']} on {hardware(d.environment)}" for d in found})
    return f"{found[0].protocol['cap']:,} slots, growth inside, {', '.join(machines)}; bars are 95 % intervals"


SECTIONS: list[Callable[[Evidence], Section | None]] = [
    pareto_section,
    lazy_section,
    mechanism_section,
    control_section,
    speed_section,
    memory_section,
    recall_section,
    rivals_section,
    verdict_section,
    choice_section,
]


def sections(evidence: Evidence) -> list[Section]:
    """Every section that the records allow."""
    return [found for section in SECTIONS if (found := section(evidence)) is not None]
