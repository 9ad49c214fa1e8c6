"""Comparison tables: one row a record, each paired against one control record on the same tokens."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from sinkstream.records.pairing import common_tokens, paired_blocks
from sinkstream.records.records import Record
from sinkstream.show.table import EMPTY, Column, Table, with_interval
from sinkstream.statistics import PairedDelta, delta_of_blocks, paired_delta_ppl

Row = dict[str, Any]


def display_name(record: Record) -> str:
    """The policy's label, or its name and options, with what limits the run: "lazy R=32 (every 8th token)"."""
    options = record.policy["options"]
    described = ", ".join(f"{name}={value}" for name, value in options.items() if value not in (None, False))
    name = record.policy.get("label") or " ".join(filter(None, (record.policy["name"], described)))
    every = record.protocol["sample_every"] or 1
    notes = [f"1 in {every} tokens"] if every > 1 else []
    notes += [record.status] if record.status != "complete" else []
    return f"{name} ({', '.join(notes)})" if notes else name


def delta_against(record: Record, control: Record, *, block_tokens: int | None = None) -> PairedDelta:
    """ΔPPL of `record` against `control` on their common tokens; default block length: `suitable_block_tokens`."""
    if block_tokens is None:
        return delta_of_blocks(*paired_blocks(record, control))
    index, nll, control_nll = common_tokens(record, control)
    return paired_delta_ppl(nll, control_nll, positions=index, block_tokens=block_tokens)


def find_control(records: Sequence[Record], control_id: str | None = None) -> Record:
    """The record with that id, or the first one. ValueError if there is none."""
    if not records:
        raise ValueError("no records to compare")
    if control_id is None:
        return records[0]
    for record in records:
        if record.id == control_id:
            return record
    raise ValueError(f"control {control_id!r} is not among the records: {', '.join(record.id for record in records)}")


def comparison_rows(
    records: Sequence[Record], control_id: str | None = None, *, block_tokens: int | None = None
) -> list[Row]:
    """One plain dict a record, in the order given.

    Parameters
    ----------
    records : sequence of Record
        All of one text and one model.
    control_id : str, optional
        Record that ΔPPL is paired against; default the first one.
    block_tokens : int, optional
        Block length of the bootstrap.

    Returns
    -------
    list of dict
        Keys `id`, `name`, `is_control`, `ppl`, `delta_percent`, `delta_low`, `delta_high`, `delta_tokens`,
        `delta_reason`, `in_turn` (whether the runs took turns, so that latencies compare), `steady_mean_ms`,
        `steady_p50_ms`, `steady_p90_ms`, `kv_min`, `kv_mean`, `kv_max`, `events`, `drop_mean`, `drop_max`,
        `peak_memory_mb`, `peak_memory_kind`. Missing figures are None.
    """
    control = find_control(records, control_id)
    return [_row(record, control, block_tokens) for record in records]


def _row(record: Record, control: Record, block_tokens: int | None) -> Row:
    summary = record.summary
    row: Row = {"id": record.id, "name": display_name(record), "is_control": record is control, "ppl": summary["ppl"]}
    if record is control:
        delta = PairedDelta(None, None, None, 0, 0, 0.95, "is the control")
    else:
        delta = delta_against(record, control, block_tokens=block_tokens)
    row |= {"delta_percent": delta.delta_percent, "delta_low": delta.low, "delta_high": delta.high}
    row |= {"delta_tokens": delta.n_tokens, "delta_reason": delta.reason}
    row |= {f"steady_{name}_ms": summary["steady_tpot_ms"][name] for name in ("mean", "p50", "p90")}
    row |= {"in_turn": record.protocol.get("interleaved", 1) > 1}
    row |= {f"kv_{name}": summary["kv_length"][name] for name in ("min", "mean", "max")}
    row |= {"events": summary["events"]}
    row |= {f"drop_{name}": summary["drop_size"][name] for name in ("mean", "max")}
    return row | {name: summary[name] for name in ("peak_memory_mb", "peak_memory_kind")}


def _number(digits: int, *keys: str) -> Callable[[Row], str]:
    def show(row: Row) -> str:
        return " / ".join(EMPTY if row[key] is None else f"{row[key]:,.{digits}f}" for key in keys)

    return show


def delta_text(row: Row) -> str:
    """ΔPPL in percent with its interval."""
    if row["is_control"]:
        return "control"
    return with_interval(row["delta_percent"], row["delta_low"], row["delta_high"], 2)


#: Header, and the cell of a row; headers carry the units.
COLUMNS: list[Column] = [
    ("Policy", lambda row: row["name"]),
    ("PPL", _number(2, "ppl")),
    ("ΔPPL % [95 %]", delta_text),
    ("KV min / mean / max", _number(0, "kv_min", "kv_mean", "kv_max")),
    ("Drop mean / max", _number(1, "drop_mean", "drop_max")),
    ("Peak memory (MB)", _number(0, "peak_memory_mb")),
]

#: Only of runs that took turns: one after the other, the first pays for the warm-up of all.
TIMED = ("Steady TPOT mean / P50 / P90 (ms)", _number(2, "steady_mean_ms", "steady_p50_ms", "steady_p90_ms"))

RUN_SECONDS = ("Run (s)", _number(0, "total_sec"))

#: Columns of the lines that are printed while the runs go on, and their widths.
LINE_COLUMNS = {
    "PPL": 8,
    "ΔPPL % [95 %]": 26,
    "KV min / mean / max": 19,
    "Run (s)": 7,
}
LINE_GAP = "  "


def _dash_if_empty(text: str) -> str:
    """Figures that are all missing as one dash."""
    return EMPTY if set(text) <= set(f"{EMPTY} /") else text


def footnotes(rows: Sequence[Row]) -> list[str]:
    """What a reader must know to read the table: the control, the pairing, the kind of memory figure."""
    control = next((row["name"] for row in rows if row["is_control"]), None)
    notes = [f"ΔPPL is paired with {control} on the tokens that both scored; 95 % block-bootstrap intervals."]
    missing = sorted({row["delta_reason"] for row in rows if row["delta_reason"] and not row["is_control"]})
    notes += [f"No interval: {reason}." for reason in missing]
    kinds = sorted({row["peak_memory_kind"] for row in rows if row["peak_memory_kind"]})
    return notes + ([f"Peak memory: {', '.join(kinds).replace('_', ' ')}."] if kinds else [])


def comparison_table(rows: Sequence[Row], title: str | None = None) -> Table:
    """The rows as a table, control in bold; latency only where all runs took turns."""
    columns = [*COLUMNS, TIMED] if rows and all(row["in_turn"] for row in rows) else COLUMNS
    shown = [[_dash_if_empty(cell(row)) for _, cell in columns] for row in rows]
    bold = [number for number, row in enumerate(rows) if row["is_control"]]
    return Table([name for name, _ in columns], shown, title, footnotes(rows), bold=bold)


class RowLines:
    """The rows of a comparison table as single lines, to be printed each as soon as its run has ended.

    Parameters
    ----------
    names : sequence of str
        The policies that will come.
    width : int
        Columns of the terminal; figures that do not fit are left to the table at the end.
    """

    def __init__(self, names: Sequence[str], width: int):
        widths = [max(map(len, (*names, "Policy"))), *LINE_COLUMNS.values()]
        ends = list(itertools.accumulate(widths, lambda a, b: a + len(LINE_GAP) + b))
        self.widths = [w for number, (w, end) in enumerate(zip(widths, ends)) if end <= width or number == 0]

    def line(self, records: Sequence[Record]) -> str:
        """The row of the last record, paired with the first one; the headers come above the first."""
        if len(records) == 1:
            return "\n".join([self._line(["Policy", *LINE_COLUMNS]), self._row(records[0], records[0])])
        return self._row(records[-1], records[0])

    def _row(self, record: Record, control: Record) -> str:
        if not record.summary["scored_tokens"]:
            return display_name(record)
        row = _row(record, control, None) | {"total_sec": record.summary["total_sec"]}
        shown = dict([*COLUMNS, RUN_SECONDS])
        return self._line([_dash_if_empty(shown[name](row)) for name in ("Policy", *LINE_COLUMNS)])

    def _line(self, texts: Sequence[str]) -> str:
        padded = [
            text.rjust(width) if number else text.ljust(width)
            for number, (text, width) in enumerate(zip(texts, self.widths))
        ]
        return LINE_GAP.join(padded).rstrip()
