"""Tables and headline figures of rivals; every table leads with the nearest rival on its best day."""

from collections.abc import Callable, Sequence

from sinkstream.measure.environment import hardware
from sinkstream.records.headline import Headline
from sinkstream.records.records import Record
from sinkstream.records.selection import has_model, has_text
from sinkstream.registry import Registry
from sinkstream.show.table import EMPTY, NONE_YET, Table, counted, with_interval
from sinkstream.studies.rivals.compare import CONTROL, Comparison, comparisons, delta
from sinkstream.studies.rivals.record import RivalRecord, failed_row

#: Generated tables of the documents: name -> function of all comparisons, oldest first.
RIVAL_TABLES: Registry[Callable[[Sequence[Comparison]], str]] = Registry("table of rivals")
#: Key -> function of all comparisons, oldest first, that returns a headline, or None if records are missing.
RIVAL_HEADLINES: Registry[Callable[[Sequence[Comparison]], Headline | None]] = Registry("headline of rivals")

MODEL, CAP = "SmolLM2-135M", 512
HEADER = ["way", "positions", "peak slots", "PPL", f"ΔPPL of `{CONTROL}` against it, % [95 %]", "peak memory (MB)"]
CPU_HEADER = [
    *("way", "computes in", "tokens", "load average", "ms per token, mean", "P50", "P90", "P99"),
    "peak memory (MB)",
]
SPEED_HEADER = ["way", "ms per token, mean", "P50", "P90", "P99", "peak memory (MB)"]


def render_rivals(records: Sequence[Record], rivals: Sequence[RivalRecord]) -> dict[str, str]:
    """Markdown of every table, by its name in the documents."""
    found = comparisons(records, rivals)
    speed = {"rivals-speed": speed_tables(rivals), "rivals-speed-cpu": cpu_speed_table(records, rivals)}
    return {name: render(found) for name, render in RIVAL_TABLES.items()} | speed


def origin(comparison: Comparison) -> str:
    """One line on what a comparison was measured with."""
    rival = comparison.first
    scored = next((r.summary["scored_tokens"] for r in comparison.scored()), 0)
    machines = sorted({hardware(r.environment) for r in (*comparison.rivals, *comparison.ours)})
    versions = sorted(
        {f"{r.rival['name']} {r.rival['version']}" for r in comparison.rivals if r.rival["version"] is not None}
    )
    return (
        f"{rival.model['name']}, {rival.data['name']}: {scored:,} scored tokens after the first"
        f" {rival.protocol['cap']:,}, at most {rival.protocol['cap']:,} KV entries. {', '.join(versions)};"
        f" {', '.join(machines)}."
    )


def quality_table(comparison: Comparison) -> Table:
    """The nearest rival, our own policies by perplexity, the other rivals, and those that cannot run."""
    ours = sorted(comparison.ours, key=lambda r: r.summary["ppl"])
    scored = comparison.scored()
    rows = [_rival_row(rival, comparison) for rival in scored[:1]]
    rows += [_own_row(run) for run in ours]
    rows += [_rival_row(rival, comparison) for rival in scored[1:]]
    rows += [failed_row(r.label, r.status_reason, HEADER) for r in comparison.rivals if r.status == "failed"]
    return Table(HEADER, rows, left=2)


def _rival_row(rival: RivalRecord, comparison: Comparison) -> list[str]:
    control = comparison.control
    paired = None if control is None else delta(control, rival)
    return [
        rival.label,
        rival.rival["positions"],
        f"{rival.protocol['peak_slots']:,}",
        f"{rival.summary['ppl']:,.2f}",
        EMPTY if paired is None else with_interval(paired.delta_percent, paired.low, paired.high, 2),
        _memory(rival),
    ]


def _memory(record: Record | RivalRecord) -> str:
    """Peak memory in MB; a dash where it is not known."""
    memory = record.summary["peak_memory_mb"]
    return EMPTY if memory is None else f"{memory:,.0f}"


def _own_row(run: Record) -> list[str]:
    return [
        f"**sinkstream** `{run.label}`",
        {"cache": "in the cache", "original": "original"}.get(run.policy["options"].get("positions", "cache"), EMPTY),
        f"{run.summary['kv_length']['max']:,}",
        f"{run.summary['ppl']:,.2f}",
        EMPTY,
        _memory(run),
    ]


def newest_comparison(found: Sequence[Comparison], *, text: str, cap: int = CAP) -> Comparison | None:
    """The comparison of SmolLM2 on a text at a cap with the most scored tokens; of equals the newest."""
    of_text = [
        c
        for c in found
        if has_model(c.first, MODEL) and has_text(c.first, text) and c.first.protocol["cap"] == cap and c.scored()
    ]
    return max(of_text, key=lambda c: (c.scored()[0].summary["scored_tokens"], c.first.created), default=None)


def _quality_of(text: str) -> Callable[[Sequence[Comparison]], str]:
    def render(found: Sequence[Comparison]) -> str:
        comparison = newest_comparison(found, text=text)
        return NONE_YET if comparison is None else f"{origin(comparison)}\n\n{quality_table(comparison).markdown()}"

    render.__doc__ = f"Rivals and our policies on {text} at {CAP} slots, SmolLM2-135M."
    return render


for _text in ("pg19", "wikitext"):
    RIVAL_TABLES.register(f"rivals-{_text}")(_quality_of(_text))


def speed_tables(rivals: Sequence[RivalRecord]) -> str:
    """Milliseconds a token on a GPU, a table for each model, precision, cap and machine; the fastest first."""
    groups: dict[tuple, dict[str, RivalRecord]] = {}
    for rival in rivals:
        p = rival.protocol
        if not str(p["device"]).startswith("cuda"):
            continue
        dtype = p["dtype"] if p["dtype"] != "GGUF" else "float32"
        key = (rival.model["name"], dtype, p["cap"], hardware(rival.environment))
        if rival.summary["steady_tpot_ms"]["p50"] is not None or rival.status == "failed":
            groups.setdefault(key, {})[rival.label] = rival
    parts = []
    for (model, dtype, cap, machine), labelled in groups.items():
        timed = sorted(
            (r for r in labelled.values() if r.status == "complete"), key=lambda r: r.summary["steady_tpot_ms"]["p50"]
        )
        rows = [
            [
                rival.label,
                *(f"{rival.summary['steady_tpot_ms'][name]:.2f}" for name in ("mean", "p50", "p90", "p99")),
                _memory(rival),
            ]
            for rival in timed
        ]
        failed = [r for r in labelled.values() if r.status == "failed"]
        rows += [failed_row(r.label, r.status_reason, SPEED_HEADER) for r in failed]
        if timed:
            parts.append(f"{model}, {dtype}, {cap:,} slots, {machine}.\n\n{Table(SPEED_HEADER, rows).markdown()}")
    return "\n\n".join(parts) or NONE_YET


def cpu_speed_table(records: Sequence[Record], rivals: Sequence[RivalRecord]) -> str:
    """Milliseconds a token on a CPU, rivals and our runs of the newest rival's model, cap and machine; fastest first.

    Records without a load average are left out: nothing says how much of a time is somebody else's work.
    """

    def comparable(record: Record | RivalRecord) -> tuple:
        return record.model["hash"], record.protocol["cap"], hardware(record.environment), _threads(record)

    known = [r for r in rivals if r.protocol["device"] == "cpu" and _load(r) is not None]
    found = [r for r in known if _is_timed(r)]
    if not found:
        return NONE_YET
    last = found[-1]
    shown: dict[str, Record | RivalRecord] = {r.label: r for r in found if comparable(r) == comparable(last)}
    failed = {r.label: r for r in known if r.status == "failed" and comparable(r)[:2] == comparable(last)[:2]}
    for run in records:
        timed = run.status == "complete" and run.protocol["device"] == "cpu" and _load(run) is not None
        if timed and _is_timed(run) and comparable(run) == comparable(last):
            shown[f"**sinkstream** `{run.label}`, {_backend(run)}"] = run
    rows = [_cpu_row(*entry) for entry in sorted(shown.items(), key=lambda entry: _median(entry[1]))]
    rows += [failed_row(label, r.status_reason, CPU_HEADER) for label, r in failed.items()]
    cores = last.environment["cpu"]["cores_usable"]
    threads = f"{counted(_threads(last), 'thread')} of {cores} cores"
    said = f"{last.model['name']}, {last.protocol['cap']:,} slots, {threads}, {hardware(last.environment)}."
    return f"{said}\n\n{Table(CPU_HEADER, rows, left=2).markdown()}"


def _cpu_row(label: str, record: Record | RivalRecord) -> list[str]:
    summary, dtype = record.summary, record.protocol["dtype"]
    return [
        label,
        "the file's own format" if dtype == "GGUF" else dtype,
        f"{summary['timed_tokens'] - record.protocol['warmup_tokens']:,}",
        f"{_load(record):.1f}",
        *(f"{summary['steady_tpot_ms'][name]:.1f}" for name in ("mean", "p50", "p90", "p99")),
        _memory(record),
    ]


def _load(record: Record | RivalRecord) -> float | None:
    return record.environment["cpu"].get("load_average")


def _threads(record: Record | RivalRecord) -> int:
    return record.environment["cpu"]["torch_threads"]


def _is_timed(record: Record | RivalRecord) -> bool:
    return record.summary["steady_tpot_ms"]["p50"] is not None


def _median(record: Record | RivalRecord) -> float:
    return record.summary["steady_tpot_ms"]["p50"]


def _backend(record: Record) -> str:
    """What ran the model, in words."""
    return "in transformers" if record.protocol["backend"] == "hf" else f"engine, `{record.protocol['backend']}`"


@RIVAL_HEADLINES.register("evidence.delta_ppl_strict_vs_kvpress_snapkv")
def delta_ppl_strict_vs_kvpress_snapkv(found: Sequence[Comparison]) -> Headline | None:
    """ΔPPL % of strict against kvpress' best SnapKV on PG19 at 512 slots, SmolLM2-135M, the same tokens."""
    comparison = newest_comparison(found, text="pg19")
    if comparison is None or comparison.control is None:
        return None
    snapkv = [r for r in comparison.scored() if r.rival["method"] == "SnapKVPress"]
    if not snapkv:
        return None
    paired = delta(comparison.control, snapkv[0])
    if paired.delta_percent is None:
        return None
    return Headline(paired.delta_percent, snapkv[0].id, paired.low, paired.high)
