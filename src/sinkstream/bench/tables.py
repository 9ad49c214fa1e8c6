"""Tables of speed records: for the terminal, and the generated ones of the documents."""

from collections.abc import Callable, Sequence
from pathlib import Path

from sinkstream.bench.record import BenchRecord
from sinkstream.bench.selection import (
    LADDER_SHAPE,
    LEAST_TOKENS,
    SHAPES,
    comparable,
    fastest_rung,
    newest,
    pairs,
    select,
    together,
)
from sinkstream.bench.summary import (
    speedup_over_hf_lazy,
    speedup_over_static_compile,
    strict_over_lazy,
    tpot_over_floor,
)
from sinkstream.bench.two_shapes import BOTH, shape_name
from sinkstream.measure.memory import OWN
from sinkstream.records.cards import each_card, of_one_card, on_one_card
from sinkstream.records.origin import machine
from sinkstream.registry import Registry
from sinkstream.show.table import EMPTY, NONE_YET, Column, Table
from sinkstream.statistics.comparison import Ratio, TimeLine, ratio_of_times, time_against_bytes

#: Generated tables of the documents: name -> function of all speed records, oldest first.
BENCH_TABLES: Registry[Callable[[Sequence[BenchRecord]], str]] = Registry("benchmark table")
PROFILE_ROWS = 20
KERNEL_WIDTH = 80


def _latency(name: str) -> Callable[[BenchRecord], str]:
    def show(record: BenchRecord) -> str:
        value = record.latency_ms["all"][name]
        return EMPTY if value is None else f"{value:.3f}"

    return show


def _preparation(record: BenchRecord) -> str:
    """Seconds of the first and of the second set-up; for generate() those of the warm-up, which compiles."""
    setup = record.setup
    if record.rung["name"] == "hf-static":
        return f"{setup['warmup_sec']:.1f} (with its prompt)"
    again = f" / {setup['capture_sec']:.1f}" if setup["capture_sec"] else ""
    return f"{setup['prepare_sec']:.1f}{again}"


def _peak_memory(record: BenchRecord) -> str:
    """The peak in MB of 2**20 bytes; a bound where the figure holds more than the record's own cache and weights."""
    peak = record.memory["peak_mb"]
    if peak is None:
        return EMPTY
    shared = record.memory["kind"] != OWN or record.protocol["in_turn"] > 1
    return f"{'≤ ' if shared else ''}{peak:,.0f}"


RUNG: Column = ("rung", lambda r: r.rung["name"])
POLICY: Column = ("policy", lambda r: r.policy["label"] + ("" if r.status == "complete" else f" ({r.status})"))
SHAPE: Column = ("shape", shape_name)
CAP: Column = ("cap", lambda r: f"{r.protocol['cap']:,}")
STREAMS: Column = ("streams", lambda r: str(r.protocol["streams"]))
SEEN: Column = ("tokens seen", lambda r: f"{r.floor['visible_mean']:,.0f}")
SPEED: list[Column] = [
    ("steady tokens", lambda r: f"{r.steady['tokens']:,}"),
    ("TPOT (ms)", lambda r: f"{r.steady['tpot_ms']:.3f}"),
    ("P50", _latency("p50")),
    ("P99", _latency("p99")),
]
FLOOR: list[Column] = [
    ("GB/s", lambda r: f"{r.steady['gbs']:,.0f}"),
    ("floor (ms)", lambda r: f"{r.floor['ms']:.3f}"),
    ("TPOT / floor", lambda r: f"{r.steady['over_floor']:.3f}"),
    ("share of floor", lambda r: f"{100 * r.steady['share_of_floor']:.1f} %"),
]
MEMORY: Column = ("peak memory (MB)", _peak_memory)
READY: Column = ("ready in (s), first / again", _preparation)
TERMINAL = [RUNG, POLICY, CAP, STREAMS, SEEN, *SPEED, *FLOOR, READY]


# ---- terminal ----


def speed_table(records: Sequence[BenchRecord], title: str) -> Table:
    """One row a record."""
    first = records[0]
    caption = (
        f"{first.hardware}, {first.protocol['dtype']}; floor: bytes that a step must read, at the speed of the"
        f" {_ceiling(records, digits=1)}; TPOT: wall time over tokens, host included; P50, P99: between two tokens"
    )
    return Table.of(records, TERMINAL, title=f"{title}: decode speed", notes=[caption], left=2)


def ratio_table(records: Sequence[BenchRecord]) -> Table | None:
    """Policies that took turns, each over the one in front; None without any."""
    rows = _ratio_rows(records)
    caption = "95 % bootstrap intervals over pairs of chunks that took turns"
    return Table(RATIO_HEADER, rows, "TPOT of policies that took turns", [caption], 2) if rows else None


def profile_table(record: BenchRecord) -> Table | None:
    """Where a step's time goes; None without a profile."""
    if not record.profile:
        return None
    kind = "kernel" if record.protocol["device"] == "cuda" else "operator"
    rows = [
        [row["kernel"][:KERNEL_WIDTH], f"{row['calls']:g}", f"{row['us']:.1f}", f"{100 * row['share']:.1f} %"]
        for row in record.profile[:PROFILE_ROWS]
    ]
    total = sum(row["us"] for row in record.profile)
    title = f"{record.rung['name']} {record.policy['label']}, cap {record.protocol['cap']}: one step"
    caption = f"all {len(record.profile)}: {total:,.1f} µs; TPOT {1e3 * record.steady['tpot_ms']:,.1f} µs"
    return Table([kind, "calls", "µs", "share"], rows, title, [caption])


def slope_lines(records: Sequence[BenchRecord]) -> list[str]:
    """For every rung and policy with three caps or more: the line of TPOT against KV bytes, in words."""
    return [
        f"{rung} {label}: TPOT = {line.fixed_ms:.3f} ms + {line.slope_ms_per_gb:.3f} ms per GB of KV"
        f" ({line.gbs:,.0f} GB/s, R² {line.r_squared:.4f})"
        for (rung, label), line in _lines(records)
    ]


# ---- what several records say together ----

RATIO_HEADER = ["rung", "policies", "shape", "cap", "pairs of chunks", "ratio of TPOT [95 %]"]


def _ratio_rows(records: Sequence[BenchRecord]) -> list[list[str]]:
    rows = []
    for record, base in pairs(records):
        ratio = _ratio(record, base)
        named = f"{record.policy['label']} / {base.policy['label']}"
        rows.append([RUNG[1](record), named, SHAPE[1](record), CAP[1](record), f"{ratio.pairs:,}", str(ratio)])
    return rows


def _ratio(record: BenchRecord, base: BenchRecord) -> Ratio:
    """Time of one record over that of another that took turns with it."""
    seconds, base_seconds = (one.chunks["seconds"] for one in (record, base))
    both = min(len(seconds), len(base_seconds))
    return ratio_of_times(seconds[:both], base_seconds[:both])


def _lines(records: Sequence[BenchRecord]) -> list[tuple[tuple[str, str], TimeLine]]:
    groups: dict[tuple[str, str], list[BenchRecord]] = {}
    for record in records:
        if record.protocol["streams"] == 1:
            groups.setdefault((record.rung["name"], record.policy["label"]), []).append(record)
    found = {
        key: time_against_bytes([r.floor["kv_bytes"] for r in group], [r.steady["tpot_ms"] for r in group])
        for key, group in groups.items()
    }
    return [(key, line) for key, line in found.items() if line is not None]


# ---- documents ----


def render_bench(results: Path) -> dict[str, str]:
    """Markdown of every table of `BENCH_TABLES`, by name. Raises ValueError if a speed record is broken."""
    records = BenchRecord.below(results)
    return {name: render(records) for name, render in BENCH_TABLES.items()}


def _document_table(records: Sequence[BenchRecord], columns: Sequence[Column], after: str = "") -> str:
    """A table for each card, `after` below each."""
    notes = [after] if after else []

    def table(some: Sequence[BenchRecord]) -> str:
        return f"{_origin(some)}\n\n{Table.of(some, columns, notes=notes).markdown()}"

    return each_card(records, table) or NONE_YET


def _origin(records: Sequence[BenchRecord]) -> str:
    """One line on what a table was measured with, the ceiling in it."""
    return machine(records, _ceiling(records, digits=0))


def _ceiling(records: Sequence[BenchRecord], digits: int) -> str:
    """The copy that floors are of, from the slowest to the fastest: each command measures its own."""
    copies = sorted({round(r.ceiling["copy_gbs"], digits) for r in records})
    copied = " – ".join(f"{rate:,.{digits}f}" for rate in sorted({copies[0], copies[-1]}))
    return f"{records[0].ceiling['kind']} {copied} GB/s"


@BENCH_TABLES.register("headline-speed")
def headline_speed(records: Sequence[BenchRecord]) -> str:
    """The engine's speed in one sentence, the nearest rival first; all figures of one card."""
    return on_one_card(_headline_speed, records) or NONE_YET


def _headline_speed(records: Sequence[BenchRecord]) -> str | None:
    headlines = (tpot_over_floor, speedup_over_static_compile, speedup_over_hf_lazy, strict_over_lazy)
    found = [figure for headline in headlines if (figure := headline(records)) is not None]
    if len(found) < len(headlines):
        return None
    over_floor, static, lazy, strict = (headline.value for headline in found)
    record = next(r for r in records if r.id == found[0].record)
    return (
        f"Speed: on an {record.hardware} the engine takes **{record.steady['tpot_ms']:.2f} ms** a token of the"
        f" Pythia-2.8B shape ({record.protocol['dtype']}, {record.protocol['cap']:,} slots, evicting at every token),"
        f" {over_floor:.2f} × the time of a copy of the bytes that it must read: {static:.1f} × faster than"
        f" transformers' compiled static cache, which evicts nothing, and {lazy:.1f} × faster than pruning lazily in"
        f" transformers. Eviction at every token costs {strict:.3f} × what it costs every 64 tokens."
    )


@BENCH_TABLES.register("bench-ladder")
def ladder_table(records: Sequence[BenchRecord]) -> str:
    """Every rung on the Pythia-2.8B shape, float16, one stream, 2,052 slots, the slowest first."""
    rows = select(records, model=LADDER_SHAPE, cap=2052, streams=1, dtype="float16", short=True)
    rows = together(comparable([r for r in rows if not _many(r)]))
    ordered = sorted(rows, key=lambda r: -r.steady["tpot_ms"])
    fastest = ordered[-1].steady["tpot_ms"] if ordered else None
    times: Column = ("× the fastest", lambda r: f"{r.steady['tpot_ms'] / fastest:.2f}")
    return _document_table(ordered, [RUNG, POLICY, SEEN, *SPEED, *FLOOR, times, MEMORY, READY])


@BENCH_TABLES.register("bench-policies")
def policies_table(records: Sequence[BenchRecord]) -> str:
    """TPOT of two policies that took turns, a table a card."""
    return each_card(records, _policies_table) or NONE_YET


def _policies_table(records: Sequence[BenchRecord]) -> str:
    found = [(a, b) for a, b in pairs(select(records, streams=1)) if not _many(a)]
    latest = {(RUNG[1](a), a.policy["label"], b.policy["label"], SHAPE[1](a), CAP[1](a)): (a, b) for a, b in found}
    used = [record for pair in latest.values() for record in pair]
    return f"{_origin(used)}\n\n{Table(RATIO_HEADER, _ratio_rows(used), left=3).markdown()}" if used else ""


@BENCH_TABLES.register("bench-over-strict")
def over_strict_table(records: Sequence[BenchRecord]) -> str:
    """TPOT of every policy that took turns with strict and others, over strict: latest, and the one before; by card."""
    return each_card(records, _over_strict_table) or NONE_YET


def _over_strict_table(records: Sequence[BenchRecord]) -> str:
    found = [(a, b) for a, b in pairs(select(records, streams=1)) if _many(a) and a.policy["label"] == "strict"]
    turns: dict[tuple[str, ...], list[tuple[BenchRecord, BenchRecord]]] = {}
    for strict, other in sorted(found, key=lambda pair: pair[0].created):
        turns.setdefault((RUNG[1](other), SHAPE[1](other), CAP[1](other), other.policy["label"]), []).append(
            (strict, other)
        )
    rows: list[list[str]] = []
    used: list[BenchRecord] = []
    for (rung, shape, cap, label), those in turns.items():
        now = those[-1]
        before = str(_ratio(*reversed(those[-2]))) if len(those) > 1 else EMPTY
        rows.append([shape, rung, cap, label, SPEED[1][1](now[1]), str(_ratio(*reversed(now))), before])
        used += now
    header = ["shape", "rung", "cap", "policy", "TPOT (ms)", "over strict [95 %]", "the measurement before"]
    return f"{_origin(used)}\n\n{Table(header, rows, left=4).markdown()}" if rows else ""


def _many(record: BenchRecord) -> bool:
    """Whether more than two policies took turns."""
    return record.protocol["in_turn"] > 2


@BENCH_TABLES.register("bench-shapes")
def shapes_table(records: Sequence[BenchRecord]) -> str:
    """The fastest rung of the engine on every shape, strict, one stream, 2,052 slots."""
    found = select(records, policy="strict", cap=2052, streams=1, rung=fastest_rung(records), short=True)
    found = newest([r for r in found if r.steady["tokens"] >= LEAST_TOKENS])
    ordered = sorted(found, key=lambda r: SHAPES.index(r.model["name"]) if r.model["name"] in SHAPES else len(SHAPES))
    weights: Column = ("GB per step", lambda r: f"{r.floor['bytes'] / 1e9:.3f}")
    return _document_table(ordered, [SHAPE, RUNG, weights, *SPEED, *FLOOR])


def _fastest(
    records: Sequence[BenchRecord],
    along: str,
    *,
    model: str = LADDER_SHAPE,
    dtype: str = "float16",
    cap: int | None = None,
    streams: int | None = None,
) -> list[BenchRecord]:
    """Runs of the fastest rung, strict, one shape, by what `along` of the protocol; none if one."""
    rung = fastest_rung(records)
    chosen = select(records, model=model, policy="strict", rung=rung, dtype=dtype, short=True)
    chosen = select(chosen, cap=cap, streams=streams)
    found = sorted(together(comparable(chosen)), key=lambda r: r.protocol[along])
    return found if len(found) > 1 else []


@BENCH_TABLES.register("bench-caps")
def caps_table(records: Sequence[BenchRecord]) -> str:
    """TPOT against the cap: the fastest rung, strict, Pythia-2.8B shape, float16, one stream."""
    found = _fastest(records, "cap", streams=1)
    kv: Column = ("KV (GB)", lambda r: f"{r.floor['kv_bytes'] / 1e9:.3f}")
    return _document_table(found, [CAP, kv, *SPEED, *FLOOR], "\n".join(slope_lines(found)))


@BENCH_TABLES.register("bench-streams")
def streams_table(records: Sequence[BenchRecord]) -> str:
    """Streams stepped together, the two shapes of the headlines, strict, 2,052 slots; the weights are read once."""
    of_shapes = (_fastest(records, "streams", model=model, dtype=dtype, cap=2052) for model, dtype in BOTH)
    found = [record for of_shape in of_shapes for record in of_shape]
    rate: Column = ("tokens/s, all streams", lambda r: f"{r.steady['tokens_per_sec']:,.0f}")
    return _document_table(found, [SHAPE, STREAMS, rate, *SPEED, *FLOOR])


@BENCH_TABLES.register("bench-long")
def long_run_table(records: Sequence[BenchRecord]) -> str:
    """The newest run of the most tokens on one card: TPOT, memory and NLL, block by block."""
    long = of_one_card([r for r in select(records) if len(r.blocks) > 1])
    if not long:
        return NONE_YET
    record = max(long, key=lambda r: (r.steady["tokens"], r.created))
    columns: list[Column] = [
        ("steady tokens", lambda block: f"{block['first_token'] + block['tokens']:,}"),
        ("TPOT (ms)", lambda block: f"{block['tpot_ms']:.4f}"),
        ("memory held (MB)", lambda block: f"{block['memory_mb']:,.1f}"),
        ("mean NLL (nats)", lambda block: EMPTY if block["mean_nll"] is None else f"{block['mean_nll']:.4f}"),
        ("not finite", lambda block: EMPTY if block["not_finite"] is None else f"{block['not_finite']}"),
    ]
    fed = "greedy" if record.protocol["feed"] == "greedy" else f"{record.protocol['text']}, repeated"
    named = f"{SHAPE[1](record)}, {RUNG[1](record)}, {record.policy['label']}, cap {CAP[1](record)}, {fed}"
    return f"{named}. {_origin([record])}\n\n{Table.of(record.blocks, columns, left=0).markdown()}"
