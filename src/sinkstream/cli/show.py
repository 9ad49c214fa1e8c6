"""Showing a batch of records: the table, and the picture beside the records."""

from pathlib import Path

from rich.console import Console

from sinkstream.measure.records import Record
from sinkstream.report.plots import nll_over_tokens
from sinkstream.report.tables import comparison_rows, rich_table

PIPE_WIDTH = 150


def wide_console() -> Console:
    """The terminal as it is; a file or pipe, which has no width, gets one that the table fits."""
    console = Console()
    return console if console.is_terminal else Console(width=PIPE_WIDTH)


def show_records(records: list[Record], console: Console, title: str) -> None:
    """Print the comparison table of all records that scored something; the first one is the control."""
    scored = [r for r in records if r.summary["scored_tokens"]]
    if scored:
        console.print(rich_table(comparison_rows(scored), title=title))
    for record in records:
        if record.status != "complete":
            console.print(f"{record.policy['label']}: {record.status}: {record.status_reason}", style="bold red")


def draw_nll(records: list[Record], path: Path, title: str) -> Path | None:
    """Draw NLL over tokens of all records that scored something; None if there is none."""
    scored = [r for r in records if r.summary["scored_tokens"]]
    return nll_over_tokens(scored, path, title=title) if scored else None
