"""Comparison tables: one row a run, each paired against one control on the same tokens."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sinkstream.records.pairing import paired_delta
from sinkstream.records.records import Record
from sinkstream.show.table import Column, Table, figures_text, with_interval
from sinkstream.statistics import PairedDelta


def display_name(record: Record) -> str:
    """The policy's label, or its name and options, with what limits the run: "lazy R=32 (1 in 8 tokens)"."""
    options = record.policy["options"]
    described = ", ".join(f"{name}={value}" for name, value in options.items() if value not in (None, False))
    name = record.policy.get("label") or " ".join(filter(None, (record.policy["name"], described)))
    every = record.protocol["sample_every"] or 1
    notes = [f"1 in {every} tokens"] if every > 1 else []
    notes += [record.status] if record.status != "complete" else []
    return f"{name} ({', '.join(notes)})" if notes else name


@dataclass(frozen=True)
class ComparedRun:
    """A run, and its ΔPPL against the control of its table; None: the run is the control."""

    record: Record
    delta: PairedDelta | None

    @property
    def delta_text(self) -> str:
        """ΔPPL in percent with its interval."""
        if self.delta is None:
            return "control"
        return with_interval(self.delta.delta_percent, self.delta.low, self.delta.high, 2)


def compared_runs(records: Sequence[Record]) -> list[ComparedRun]:
    """Runs of one text and one model beside the first of them, the control. Raises ValueError as `paired_delta`."""
    control = records[0]
    return [ComparedRun(one, None if one is control else paired_delta(one, control)) for one in records]


def _number(digits: int, part: str, *names: str) -> Callable[[ComparedRun], str]:
    """Figures of the summary: those called `names` in `part`, or `part` itself."""

    def show(run: ComparedRun) -> str:
        summary = run.record.summary
        return figures_text(summary[part], names, digits) if names else figures_text(summary, [part], digits)

    return show


#: Header, and the cell of a row; headers carry the units.
COLUMNS: list[Column] = [
    ("Policy", lambda run: display_name(run.record)),
    ("PPL", _number(2, "ppl")),
    ("ΔPPL % [95 %]", lambda run: run.delta_text),
    ("KV min / mean / max", _number(0, "kv_length", "min", "mean", "max")),
    ("Drop mean / max", _number(1, "drop_size", "mean", "max")),
    ("Peak memory (MB)", _number(0, "peak_memory_mb")),
]

#: Only of runs that took turns: one after the other, the first pays for the warm-up of all.
TIMED: Column = ("Steady TPOT mean / P50 / P90 (ms)", _number(2, "steady_tpot_ms", "mean", "p50", "p90"))

RUN_SECONDS: Column = ("Run (s)", _number(0, "total_sec"))

#: Columns of the lines that are printed while the runs go on, and their widths.
LINE_COLUMNS = {"PPL": 8, "ΔPPL % [95 %]": 26, "KV min / mean / max": 19, "Run (s)": 7}
LINE_GAP = "  "


def footnotes(runs: Sequence[ComparedRun]) -> list[str]:
    """What a reader must know to read the table: the control, the pairing, the kind of memory figure."""
    control = next((display_name(run.record) for run in runs if run.delta is None), None)
    notes = [f"ΔPPL is paired with {control} on the tokens that both scored; 95 % block-bootstrap intervals."]
    missing = sorted({run.delta.reason for run in runs if run.delta and run.delta.reason})
    notes += [f"No interval: {reason}." for reason in missing]
    kinds = sorted({kind for run in runs if (kind := run.record.summary["peak_memory_kind"])})
    held = "weights, prefill and what earlier runs of the process left included"
    return notes + ([f"Peak memory: {', '.join(kinds).replace('_', ' ')}, {held}."] if kinds else [])


def comparison_table(records: Sequence[Record], title: str | None = None) -> Table:
    """Runs of one text and one model as a table, the first, the control, in bold; latency only of runs in turn."""
    runs = compared_runs(records)
    in_turn = all(record.protocol.get("interleaved", 1) > 1 for record in records)
    bold = [number for number, run in enumerate(runs) if run.delta is None]
    columns = [*COLUMNS, TIMED] if in_turn else COLUMNS
    return Table.of(runs, columns, title=title, notes=footnotes(runs), bold=bold)


class RowLines:
    """The rows of a comparison table as single lines, each printed as soon as its run has ended.

    `names` are the policies that will come, `width` the columns of the terminal: figures that do not fit are left to
    the table at the end.
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
        run = ComparedRun(record, None if record is control else paired_delta(record, control))
        shown = dict([*COLUMNS, RUN_SECONDS])
        return self._line([shown[name](run) for name in ("Policy", *LINE_COLUMNS)])

    def _line(self, texts: Sequence[str]) -> str:
        padded = [
            text.rjust(width) if number else text.ljust(width)
            for number, (text, width) in enumerate(zip(texts, self.widths))
        ]
        return LINE_GAP.join(padded).rstrip()
