"""Several settings over one model and one text: checked first, then run and recorded one after the other or in turn."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from sinkstream.data import TokenStream
from sinkstream.evaluation.record import build_record, find_complete, run_identity
from sinkstream.evaluation.run import RunResult, check_run, check_turns, common_prefill, run, run_interleaved
from sinkstream.evaluation.runner import Job, Report, Request, Runner
from sinkstream.evaluation.settings import RunSettings
from sinkstream.models import LoadedModel
from sinkstream.records.records import Record, load_record, load_records, write_record

Content = tuple[dict[str, Any], RunResult]  # of a record, and where its arrays are


@dataclass
class Batch:
    """Several runs over one model and one text."""

    loaded: LoadedModel
    stream: TokenStream
    request: Request  # where the records go, and what they say of the command
    interleave: bool = False  # run all settings in turn, token by token, instead of one after the other

    def run(
        self,
        settings: list[RunSettings],
        console: Console,
        row: Callable[[list[Record]], str] | None = None,
        enough: Callable[[list[Record]], bool] | None = None,
    ) -> list[Record]:
        """Run all settings in order; an interrupted or failed run is recorded and ends the batch; see `Runner.run`.

        Raises ValueError if one of the settings, the model and the text do not fit together, or as `Runner.run`;
        nothing has run then. Raises WriteError as `Runner.run`.
        """
        if self.interleave:
            check_interleaved(settings, self.request.resume)
        for one in settings:
            check_run(self.loaded, self.stream.ids, one)
        if self.interleave:
            common_prefill(settings, len(self.stream))
        runner = Runner(self.request, _save, load_record, self.loaded.model.device, _perplexities)
        return runner.run(self._jobs(settings), console, row, enough)

    def _jobs(self, settings: list[RunSettings]) -> list[Job[Record]]:
        if self.interleave:
            settings = [replace(one, interleaved=len(settings)) for one in settings]
            return [Job(f"{len(settings)} in turn", partial(self._in_turn, settings), list)]
        caps = {one.cap for one in settings}
        names = [one.label() if len(caps) == 1 else f"cap {one.cap}: {one.label()}" for one in settings]
        return [Job(name, partial(self._one, one), partial(self._find, one)) for name, one in zip(names, settings)]

    def _one(self, settings: RunSettings, report: Report) -> list[Callable[[], Content]]:
        return [partial(self._record, settings, run(self.loaded, self.stream.ids, settings, report))]

    def _in_turn(self, settings: list[RunSettings], report: Report) -> list[Callable[[], Content]]:
        results = run_interleaved(self.loaded, self.stream.ids, settings, report)
        return [partial(self._record, one, result) for one, result in zip(settings, results)]

    def _find(self, settings: RunSettings) -> list[Record]:
        return find_complete(load_records, self.request.out, run_identity(self.loaded, self.stream, settings))

    def _record(self, settings: RunSettings, result: RunResult) -> Content:
        return build_record(result, self.loaded, self.stream, settings, self.request), result


def check_interleaved(settings: list[RunSettings], resume: bool) -> None:
    """Raise ValueError if settings cannot be run in turn, token by token, whatever model and text."""
    if resume:
        raise ValueError("--interleave and --resume exclude each other: interleaved runs are timed beside each other")
    check_turns(settings)


def _save(content: Content, folder: Path) -> Path:
    record, result = content
    return write_record(record, result.arrays, folder)


def _perplexities(records: list[Record]) -> list[str]:
    """The perplexities of runs in words, nothing if none has scored a token."""
    found = [f"{r.summary['ppl']:,.2f}" for r in records if r.summary["ppl"] is not None]
    return [f"PPL {' / '.join(found)}"] if found else []
