"""The two short tables of the README: quality and speed, four rows each."""

from collections.abc import Sequence
from typing import Any

from sinkstream.bench.record import BenchRecord
from sinkstream.bench.selection import rival
from sinkstream.bench.summary import tpot_over_floor
from sinkstream.bench.tables import BENCH_TABLES
from sinkstream.measure.environment import hardware
from sinkstream.records.cards import of_one_card
from sinkstream.records.records import Record
from sinkstream.records.selection import conditions, evaluated, select
from sinkstream.show.comparison import compared_runs
from sinkstream.show.table import NONE_YET, Column, Table

CAP = 512
POLICIES = {
    "recompute": "sliding-window recompute: the window is forwarded anew for every token",
    "strict": "`strict`: sinks and window, one token evicted a step",
    "lazy R=64": "`lazy`, R = 64: evicted every 64 tokens",
    "window-only": "`window-only`: the same slots without sinks",
}

#: The best day of transformers' static compiled cache on the Pythia-2.8B shape, reported from outside the records: its
#: milliseconds a token, and the engine's in the same process. docs/LOG.md, 2026-11-26, has the origin.
REPORTED_STATIC_MS, REPORTED_ENGINE_MS = 4.756, 2.097


def comparable_runs(records: Sequence[Record], *, model: str, text: str, cap: int, device: str) -> list[Record]:
    """The newest complete run of each policy of one model on one text at one cap; recompute, the control, comes first.

    Only runs in the control's way: its tokens, backend, dtype and hardware, steps or blocks; none without a control.
    The control is the newest of those of one card (`of_one_card`) with the most tokens.
    """
    runs = select(records, model=model, text=text, device=device)
    runs = [r for r in runs if (r.protocol["cap"], r.protocol["prefill_tokens"]) == (cap, cap)]
    controls = of_one_card([r for r in runs if r.policy["name"] == "recompute"])
    control = max(reversed(controls), key=lambda r: r.protocol["decode_tokens"], default=None)
    if control is None:
        return []

    def way(record: Record) -> tuple[Any, ...]:
        return record.data["sha256"], evaluated(record), conditions(record)

    newest = {r.label: r for r in runs if way(r) == way(control)}
    return sorted(newest.values(), key=lambda r: r.policy["name"] != "recompute")


def readme_quality(records: Sequence[Record]) -> str:
    """Perplexity of SmolLM2-135M on PG19 at 512 slots: recompute the control, then three policies."""
    runs = {r.label: r for r in comparable_runs(records, model="SmolLM2-135M", text="pg19", cap=CAP, device="cuda")}
    if not runs:
        return NONE_YET
    rows = compared_runs([runs[label] for label in POLICIES if label in runs])
    control = next(iter(runs.values()))
    origin = (
        f"{control.model['name']}, {control.summary['decode_tokens']:,} tokens of a PG19 book, {CAP} KV slots,"
        f" {control.protocol['dtype']}, {hardware(control.environment)}."
    )
    columns: list[Column] = [
        ("policy", lambda run: POLICIES[run.record.label]),
        ("perplexity", lambda run: f"{run.record.summary['ppl']:.2f}"),
        ("ΔPPL % [95 %]", lambda run: run.delta_text),
    ]
    return f"{origin}\n\n{Table.of(rows, columns).markdown()}"


@BENCH_TABLES.register("readme-speed")
def readme_speed(records: Sequence[BenchRecord]) -> str:
    """Time of a token of the Pythia-2.8B shape: the engine, its nearest rival on its best day, and two ways more."""
    found = tpot_over_floor(records)
    if found is None:
        return NONE_YET
    engine = next(r for r in records if r.id == found.record)
    others = [rival(records, engine, rung) for rung in ("hf-static", "hf", "hf-recompute-sdpa")]
    static_cache, drop_in, recompute = others
    if static_cache is None or drop_in is None or recompute is None:
        return NONE_YET
    static = static_cache.steady["tpot_ms"]
    ours = engine.steady["tpot_ms"]
    reported = static > REPORTED_STATIC_MS  # else the best day is a committed record, and needs no note
    mark = "\\*" if reported else ""
    rows = [
        ["sinkstream engine, evicting at every token", f"**{ours:.2f}**", f"{engine.steady['over_floor']:.2f}", "1"],
        _row(
            engine,
            f"transformers, compiled static cache, its best day{mark}; evicts nothing, ends at its length",
            REPORTED_STATIC_MS if reported else static,
        ),
        _row(
            engine,
            f"transformers with `StreamingCache`, its fastest policy: {_policy(drop_in)}",
            drop_in.steady["tpot_ms"],
        ),
        _row(engine, "transformers, sliding-window recompute, SDPA", recompute.steady["tpot_ms"]),
    ]
    protocol = engine.protocol
    origin = (
        f"Pythia-2.8B shape (random weights), {protocol['dtype']}, batch 1, {protocol['cap']:,} KV slots,"
        f" {engine.hardware}. Floor: {engine.floor['ms']:.2f} ms, a copy of the bytes that the step must read."
    )
    if any(way.session != engine.session for way in (static_cache, drop_in, recompute)):
        origin += " Every way is that of its fastest command on such a card; the engine is that of the newest."
    note = (
        f"\\* Reported, not a committed record ([log](docs/LOG.md), 2026-11-26): {REPORTED_STATIC_MS:.2f} ms, in one"
        f" process with {REPORTED_ENGINE_MS:.2f} ms of the engine: {REPORTED_STATIC_MS / REPORTED_ENGINE_MS:.2f} × as"
        f" long. The committed record has {static:.2f} ms."
    )
    table = Table(
        ["way of decoding", "ms per token", "÷ floor", "× the engine"], rows, notes=[note] if reported else []
    )
    return f"{origin}\n\n{table.markdown()}"


def _policy(record: BenchRecord) -> str:
    label = record.policy["label"]
    return f"`{label}`, evicting at every token" if label == "strict" else f"`{label}`"


def _row(engine: BenchRecord, name: str, tpot_ms: float) -> list[str]:
    floor_ms, ours = engine.floor["ms"], engine.steady["tpot_ms"]
    return [name, f"{tpot_ms:.2f}", f"{tpot_ms / floor_ms:.1f}", f"{tpot_ms / ours:.1f}"]
