"""The one runner of commands that write records: the folder is checked first, and no measurement is lost."""

import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from rich.console import Console
from rich.progress import Progress

from sinkstream.measure.timing import timed
from sinkstream.records.base import StatusRecord
from sinkstream.records.files import WriteError
from sinkstream.show.progress import hide_ended, say, shown, tell_ended, token_progress

Report = Callable[[int, int], None]  # called with (done, of how many)


class FolderError(ValueError):
    """A folder cannot be written to: the disk is full, or there is no permission."""


R = TypeVar("R", bound=StatusRecord)


@dataclass(frozen=True)
class Request:
    """The arguments of a command, as its records keep them."""

    out: Path  # folder of the records
    arguments: dict[str, Any]  # every argument of the command, given or default
    command: list[str]  # as typed
    seed: int
    resume: bool = False  # take complete records of the very same work from `out` instead of doing it again


@dataclass(frozen=True)
class Job(Generic[R]):
    """Work that ends in one or several records."""

    name: str
    # does the work, given a `Report`. Returns a callable for each record, which builds its content; none if the work
    # failed and the caller knows
    measure: Callable[[Report], Sequence[Callable[[], Any]]]
    # returns complete records of the very same work that `out` holds; an empty list without any
    find: Callable[[], list[R]]


@dataclass
class Runner(Generic[R]):
    """Runs jobs one after the other, with progress, resuming and records."""

    request: Request
    # given the content of a record and a folder, writes the record; returns its path
    write: Callable[[Any, Path], Path]
    load: Callable[[Path], R]  # reads the record at a path
    device: torch.device  # what the jobs run on
    # what to say of the records of a job that has ended, a few words each
    figures: Callable[[list[R]], list[str]] = lambda records: []
    # display, line: the progress display on a console, and a new line of it as a `Report`
    display: Callable[[Console], Progress] = token_progress
    line: Callable[[Progress, str], Report] = shown

    def run(
        self,
        jobs: Sequence[Job[R]],
        console: Console,
        row: Callable[[list[R]], str] | None = None,
        enough: Callable[[list[R]], bool] | None = None,
    ) -> list[R]:
        """Run all jobs in order; an interrupted or failed job is recorded and is the last.

        The console shows the progress; a file gets a line for every job that has ended. After each job, `row` gives the
        line to print about its last record, in place of the bar, and `enough` says whether to skip the other jobs; both
        are given all records so far.

        Raises ValueError, before anything runs, if `out` cannot be written to; WriteError if a record cannot be
        written, with the path of the copy that was kept instead; KeyboardInterrupt after Ctrl-C while records were
        being written, once they are written.
        """
        check_writable(self.request.out)
        records: list[R] = []
        with self.display(console) as bars:
            for job in jobs:
                found = job.find() if self.request.resume else []
                if found:
                    say(bars.console, f"{job.name}: taken from {', '.join(record.id for record in found)}")
                else:
                    unwritten, seconds = timed(job.measure, self.line(bars, job.name), device=self.device)
                    found = self._save(unwritten)
                    if found and row is None:
                        tell_ended(bars, job.name, found[-1].status, seconds, *self.figures(found))
                records += found
                if row:
                    hide_ended(bars)
                    say(bars.console, row(records))
                if (found and found[-1].status != "complete") or (enough and enough(records)):
                    break
        return records

    def _save(self, unwritten: Sequence[Callable[[], Any]]) -> list[R]:
        """Write all records; WriteError afterwards if a record had to be rescued."""
        paths: list[Path] = []
        errors: list[WriteError] = []
        with uninterrupted():
            for content in [build() for build in unwritten]:
                try:
                    paths.append(save_or_rescue(partial(self.write, content), self.request.out))
                except WriteError as error:
                    errors.append(error)
            if errors:
                raise WriteError(errors[0].errno, "; ".join(str(error.strerror) for error in errors))
            return [self.load(path) for path in paths]


def save_or_rescue(save: Callable[[Path], Path], out: Path) -> Path:
    """Write a record with `save(folder)` to `out`; returns its path.

    Raises WriteError if that cannot be done; the message says where a copy was kept instead.
    """
    try:
        return save(out)
    except WriteError as error:
        raise WriteError(error.errno, f"{error.strerror}; {_rescue(save)}") from error


def _rescue(save: Callable[[Path], Path]) -> str:
    """Write the record to the folder of temporary files; returns the end of an error message."""
    try:
        return f"the record was kept as {save(Path(tempfile.mkdtemp(prefix='sinkstream-rescued-')))}"
    except OSError as error:
        return f"and its copy could not be kept either: {error.strerror}"


def check_writable(out: Path, *, keep: bool = True) -> None:
    """Raise FolderError if `out` cannot be written to: fail before hours of work, not after them.

    Folders that are missing are made, and removed again unless they are to be kept.
    """
    made: list[Path] = []
    try:
        made = [folder for folder in (out, *out.parents) if not folder.exists()]
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out) as probe:
            probe.write(os.urandom(1 << 16))
            probe.flush()
    except OSError as error:
        raise FolderError(
            f"--out {out}: cannot be written: {error.strerror}; accepted: a folder with room, or one that can be made"
        ) from error
    finally:
        for folder in () if keep else made:  # the deepest first
            with suppress(OSError):
                folder.rmdir()


def check_file_writable(out: Path) -> None:
    """The same of the folder of a file."""
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder; accepted: the path of a file")
    check_writable(out.parent)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Defer Ctrl-C until the records are written."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held_back: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: held_back.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler if before is None else before)
    if held_back:
        raise KeyboardInterrupt
