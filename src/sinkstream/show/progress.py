"""The progress of runs: bars on a terminal; in a file, which cannot take a line back, one line for every ended run."""

from collections.abc import Callable

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def is_live(console: Console) -> bool:
    """Whether the console can redraw what it shows: a terminal can, a file cannot, even one that is to have colours."""
    return console.is_interactive and console.file.isatty()


def run_progress(console: Console, *columns: ProgressColumn) -> Progress:
    """The progress display of runs: one line a run, with its name, a bar and `columns`; nothing unless `is_live`."""
    named = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), *columns)
    timed = (TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*named, *timed, console=console, disable=not is_live(console))


def token_progress(console: Console) -> Progress:
    """The progress display of runs that count tokens."""
    return run_progress(console, TextColumn("tokens"))


def shown(progress: Progress, description: str) -> Callable[[int, int], None]:
    """A new line of the progress display, as the callback of a run."""
    task = progress.add_task(description, total=None)
    return lambda done, total: progress.update(task, completed=done, total=total)


def say(console: Console, line: str, style: str | None = None) -> None:
    """Print a line as it is, above the bars of a progress display if there are any."""
    console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)


def tell_ended(progress: Progress, name: str, status: str, seconds: float, *figures: str) -> None:
    """Without a bar, print the outcome of a run: ``lazy R=32: done in 14 s, PPL 13.27``.

    `status` is that of the record; one that is not complete is printed instead of "done".
    """
    if progress.disable:
        ended = f"done in {seconds:.0f} s" if status == "complete" else f"{status} after {seconds:.0f} s"
        say(progress.console, ", ".join([f"{name}: {ended}", *figures]))


def hide_ended(progress: Progress) -> None:
    """Take the bars of the runs so far away: their rows are printed."""
    for task in progress.tasks:
        progress.update(task.id, visible=False)
