"""Running several settings over one model and one text, with progress, resuming and records."""

import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from sinkstream.data import TokenStream
from sinkstream.evaluation.record import build_record, find_complete, run_identity, save_record
from sinkstream.evaluation.run import RunResult, check_run, common_prefill, run, run_interleaved
from sinkstream.evaluation.settings import RunSettings
from sinkstream.measure.timing import timed
from sinkstream.models import LoadedModel
from sinkstream.records.files import WriteError
from sinkstream.records.records import Record, load_record
from sinkstream.show.progress import hide_ended, shown, tell, tell_ended, token_progress


@dataclass
class Batch:
    """Several runs over one model and one text.

    Attributes
    ----------
    arguments, command, seed
        For the records.
    out : Path
        Folder of the records.
    resume : bool
        Take a complete record of the very same run from `out` instead of running it again.
    interleave : bool
        Run all settings in turn, token by token, instead of one after the other.
    """

    loaded: LoadedModel
    stream: TokenStream
    out: Path
    arguments: dict[str, Any]
    command: list[str]
    seed: int
    resume: bool = False
    interleave: bool = False

    def run(
        self,
        settings: list[RunSettings],
        console: Console,
        row: Callable[[list[Record]], str] | None = None,
        enough: Callable[[list[Record]], bool] | None = None,
    ) -> list[Record]:
        """Run all settings in order; an interrupted or failed run is recorded and ends the batch.

        Parameters
        ----------
        settings : list of RunSettings
        console : Console
            Shows the progress; a file gets a line for every run that has ended.
        row : callable, optional
            Given the records so far after each run, the line to print about the last of them, in place of its bar.
            Not for interleaved runs, which end together.
        enough : callable, optional
            Given the records so far after each run, whether to leave the other runs out. Nor this.

        Raises
        ------
        ValueError
            If one of the settings, the model and the text do not fit together, or `out` cannot be written to; nothing
            has run then.
        WriteError
            If a record cannot be written; it says where a copy was kept instead.
        """
        if self.interleave and self.resume:
            raise ValueError(
                "--interleave and --resume exclude each other: interleaved runs are timed beside each other"
            )
        for one in settings:
            check_run(self.loaded, len(self.stream), one)
        if self.interleave:
            common_prefill(settings, len(self.stream))
        check_writable(self.out)
        records, caps = [], {one.cap for one in settings}
        with token_progress(console) as progress:
            if self.interleave:
                return self._run_in_turn(settings, progress)
            for one in settings:
                name = one.label() if len(caps) == 1 else f"cap {one.cap}: {one.label()}"
                records.append(self._run_one(one, progress, name, told=row is None))
                if row:
                    hide_ended(progress)
                    tell(progress, row(records))
                if records[-1].status != "complete" or (enough and enough(records)):
                    break
        return records

    def _run_one(self, settings: RunSettings, progress: Progress, name: str, *, told: bool) -> Record:
        if self.resume:
            found = find_complete(self.out, run_identity(self.loaded, self.stream, settings))
            if found:
                tell(progress, f"{name}: taken from {found.id}")
                return found
        result, seconds = self._timed(run, settings, shown(progress, name))
        with uninterrupted():
            record = load_record(self._save(settings, result))
        if told:
            tell_ended(progress, name, record.status, seconds, *_ppl([record]))
        return record

    def _run_in_turn(self, settings: list[RunSettings], progress: Progress) -> list[Record]:
        settings = [replace(one, interleaved=len(settings)) for one in settings]
        name = f"{len(settings)} in turn"
        results, seconds = self._timed(run_interleaved, settings, shown(progress, name))
        with uninterrupted():
            records = [load_record(self._save(one, result)) for one, result in zip(settings, results)]
        tell_ended(progress, name, records[-1].status, seconds, *_ppl(records))
        return records

    def _timed(self, how: Callable, settings: RunSettings | list[RunSettings], progress: Callable) -> tuple[Any, float]:
        """What one of the two kinds of run gives, and its seconds."""
        return timed(how, self.loaded, self.stream.ids, settings, progress, device=self.loaded.model.device)

    def _save(self, settings: RunSettings, result: RunResult) -> Path:
        record = build_record(
            result,
            self.loaded,
            self.stream,
            settings,
            arguments=self.arguments,
            command=self.command,
            seed=self.seed,
        )
        return save_or_rescue(lambda folder: save_record(record, result, folder), self.out)


def _ppl(records: list[Record]) -> list[str]:
    """The perplexities of runs in words, nothing if none has scored a token."""
    found = [f"{r.summary['ppl']:,.2f}" for r in records if r.summary["ppl"] is not None]
    return [f"PPL {' / '.join(found)}"] if found else []


def save_or_rescue(save: Callable[[Path], Path], out: Path) -> Path:
    """Write a record with `save(folder)` to `out`; returns its path.

    Raises
    ------
    WriteError
        If that cannot be done; it says where a copy was kept instead.
    """
    try:
        return save(out)
    except WriteError as error:
        raise WriteError(error.errno, f"{error.strerror}; {_rescue(save)}") from error


def _rescue(save: Callable[[Path], Path]) -> str:
    """Write the record to the folder of temporary files; returns what came of it, in words."""
    try:
        return f"the record was kept as {save(Path(tempfile.mkdtemp(prefix='sinkstream-rescued-')))}"
    except OSError as error:
        return f"and its copy could not be kept either: {error.strerror}"


def check_writable(out: Path) -> None:
    """Raise ValueError if `out` cannot be written to: fail before hours of work, not after them."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out) as probe:
            probe.write(os.urandom(1 << 16))
            probe.flush()
    except OSError as error:
        raise ValueError(f"--out {out}: cannot be written: {error.strerror}") from error


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C back while a record is being written; it acts afterwards."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held_back = []
    before = signal.signal(signal.SIGINT, lambda number, frame: held_back.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler if before is None else before)
    if held_back:
        raise KeyboardInterrupt
