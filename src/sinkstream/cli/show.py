"""Showing a batch of records: the table, and the picture beside the records."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

from sinkstream.records.records import Record
from sinkstream.show.comparison import comparison_rows, comparison_table
from sinkstream.show.plots import memory_and_quality
from sinkstream.studies.recall.record import RecallRecord

PIPE_WIDTH = 170
PICTURE = "nll.png"


def wide_console() -> Console:
    """The terminal as it is; a file or pipe, which has no width, gets one that the table fits."""
    console = Console()
    return console if console.is_terminal else Console(width=PIPE_WIDTH)


def show_records(records: list[Record], console: Console, title: str) -> None:
    """Print the comparison table of all records that scored something; the first one is the control."""
    scored = [r for r in records if r.summary["scored_tokens"]]
    if scored:
        console.print(comparison_table(comparison_rows(scored), title))
    show_unfinished(records, console)


def show_unfinished(records: Sequence[Record | RecallRecord], console: Console) -> None:
    """Say of every record that is not complete why."""
    for record in records:
        if record.status != "complete":
            told = f"{record.policy['label']}: {record.status}: {record.status_reason}"
            console.print(told, style="bold red", markup=False, highlight=False)


def draw_nll(records: list[Record], out: Path, console: Console, title: str) -> None:
    """Draw memory and quality of all records that scored something, and say where records and picture are."""
    scored = [r for r in records if r.summary["scored_tokens"]]
    show_place(out, console, partial(memory_and_quality, scored, out / PICTURE, title=title) if scored else None)


def show_place(out: Path, console: Console, draw: Callable[[], Path] | None) -> None:
    """Draw the picture, if there is anything to draw, and say where records and picture are."""
    told = f"records: {out}"
    if draw:
        try:
            told += f", picture: {draw()}"
        except ImportError as error:
            told += f"; no picture: {error}"
    console.print(told, markup=False, highlight=False, soft_wrap=True)
