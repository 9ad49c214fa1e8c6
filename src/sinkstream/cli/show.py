"""Showing a batch of records: the table, and the picture beside the records."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console

from sinkstream.cli import EXIT_FAILED, EXIT_INTERRUPTED
from sinkstream.records.base import StatusRecord
from sinkstream.records.records import Record
from sinkstream.show.comparison import comparison_table
from sinkstream.show.plots import memory_and_quality
from sinkstream.show.progress import say
from sinkstream.show.table import Table

if TYPE_CHECKING:  # the studies import torch, which is slow
    from sinkstream.studies.recall.facts import FactsRecord
    from sinkstream.studies.recall.record import RecallRecord
    from sinkstream.studies.streameval.record import StreamEvalRecord
    from sinkstream.studies.streameval.reply import ReplyRecord

PIPE_WIDTH = 170
PICTURE = "nll.png"
AnyRun = TypeVar("AnyRun", Record, "RecallRecord", "FactsRecord", "StreamEvalRecord", "ReplyRecord")


def wide_console() -> Console:
    """The terminal as it is; a file or pipe, which has no width, gets one that the table fits."""
    console = Console()
    return console if console.is_terminal else Console(width=PIPE_WIDTH)


def show_runs(records: Sequence[Record], console: Console, out: Path, title: str) -> int:
    """Show runs beside the first of them, the control; returns the exit code."""
    scored = [r for r in records if r.summary["scored_tokens"]]
    return show_batch(records, scored, console, out, title, comparison_table, memory_and_quality, PICTURE)


def show_batch(
    records: Sequence[AnyRun],
    measured: Sequence[AnyRun],
    console: Console,
    out: Path,
    title: str,
    table: Callable[..., Table],
    draw: Callable[..., Path],
    picture: str,
) -> int:
    """Print the table of a batch of runs, draw its picture, and say where everything is; returns the exit code.

    Parameters
    ----------
    measured : sequence of records
        Those that have something to show; table and picture are of these.
    out : Path
        Folder of the records; the picture lies beside them.
    table, draw : callable
        Called with the records and ``title=``, `draw` also with the path of the picture.

    Of every run that is not complete the reason is printed. The code is that of the last run, as `exit_code` gives it.
    """
    if measured:
        console.print(table(measured, title=title))
    for record in records:
        if record.status != "complete":
            say(console, f"{record.policy['label']}: {record.status}: {record.status_reason}", "bold red")
    message = f"records: {out}"
    if measured:
        try:
            message += f", picture: {draw(measured, out / picture, title=title)}"
        except ImportError as error:
            message += f"; no picture: {error}"
    say(console, message)
    return exit_code(records)


def exit_code(records: Sequence[StatusRecord]) -> int:
    """0 if every run is complete, 130 after an interrupt, 1 after a failure."""
    codes = {"complete": 0, "partial": EXIT_INTERRUPTED, "failed": EXIT_FAILED}
    return codes[records[-1].status]
