"""A list of configurations over one model: checked first, timed in turns, recorded one by one."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, TextColumn

from sinkstream.bench.checkpoint import Checkpoint
from sinkstream.bench.decoding import (
    ActiveRun,
    Source,
    TimedRun,
    decode_in_turns,
    drop_unpaired_chunks,
    generate_static,
)
from sinkstream.bench.profiling import profile_steps
from sinkstream.bench.record import BenchRecord, run_figures, turn_protocol
from sinkstream.bench.rungs import check_rung, fitted, prompt_tokens
from sinkstream.bench.settings import BLOCK_TOKENS, BenchConfig, Protocol, kv_token_bytes
from sinkstream.compat import attention_implementation
from sinkstream.data import TokenStream
from sinkstream.evaluation.backends import BACKENDS, EngineBackend, StaticBackend
from sinkstream.evaluation.record import numeric_protocol, provenance, work_identity
from sinkstream.evaluation.run import check_ids
from sinkstream.evaluation.runner import Job, Report, Request, Runner
from sinkstream.measure.bandwidth import Bandwidth
from sinkstream.measure.memory import PeakMemory, free_bytes, free_unused
from sinkstream.models import LoadedModel
from sinkstream.records.files import WriteError
from sinkstream.records.plain import new_record_id
from sinkstream.show.progress import run_progress


@dataclass
class Outcome:
    """The outcome of a list of configurations."""

    # those timed, or taken from earlier, in order
    records: list[BenchRecord] = field(default_factory=list)
    # configurations that a rung does not serve, and why
    refused: list[tuple[str, str]] = field(default_factory=list)
    # configurations that ended without figures, and why
    failed: list[tuple[str, str]] = field(default_factory=list)

    @property
    def interrupted(self) -> bool:
        """Whether a configuration was cut short, which is then the last."""
        return any(record.status != "complete" for record in self.records)


@dataclass
class BenchSession:
    """Times configurations of one model."""

    loaded: LoadedModel
    text: TokenStream  # what prompts are cut from and, teacher-forced, what is fed
    protocol: Protocol
    ceiling: Bandwidth
    load_sec: float  # seconds that loading the model took
    request: Request  # where the records go, and what they say of the command
    name: str  # the same in all records of one command
    lenient: bool = False  # list what a rung refuses, and what fails, instead of ending with it
    block_tokens: int = BLOCK_TOKENS

    def run(self, groups: Sequence[Sequence[BenchConfig]], console: Console) -> Outcome:
        """Time all groups; the configurations of a group take turns.

        Raises ValueError if the text has tokens that the model does not know, if a rung refuses a configuration and
        the session is not lenient, or as `Runner.run`; nothing has run then. Raises WriteError as `Runner.run`.
        """
        outcome = Outcome()
        check_ids(self.loaded, self.text.ids)
        jobs = [
            Job(_names(group), partial(self._measure, group, outcome), partial(self._finished, group))
            for group in groups
            if self._served(group, outcome)
        ]
        runner = Runner(
            self.request,
            _write,
            BenchRecord.read,
            self.loaded.model.device,
            _paces,
            lambda console: run_progress(console, TextColumn("{task.fields[pace]}")),
            _pace_line,
        )
        outcome.records = runner.run(jobs, console)
        return outcome

    def _served(self, group: Sequence[BenchConfig], outcome: Outcome) -> bool:
        try:
            for config in group:
                check_rung(self.loaded, config)
            self._check_memory(group)
        except ValueError as error:
            if not self.lenient:
                raise
            outcome.refused.append((_names(group), str(error)))
            return False
        return True

    def _check_memory(self, group: Sequence[BenchConfig]) -> None:
        """Raise ValueError if the caches of a group, and the prefill's copy of one stream, do not fit into memory."""
        per_token, free = kv_token_bytes(self.loaded.model), free_bytes(self.loaded.model.device)
        needed = sum(per_token * c.run.given_cap * (c.streams + 1) for c in group)
        if needed > free:
            raise ValueError(
                f"{_names(group)}: keys and values take {needed / 1e9:.2f} GB beside"
                f" {self.loaded.weight_bytes / 1e9:.2f} GB of weights, and {free / 1e9:.2f} GB are free;"
                " accepted: a smaller --cap, fewer --streams or fewer policies"
            )

    # ---- one group ----

    def _measure(self, group: Sequence[BenchConfig], outcome: Outcome, report: Report) -> list[Callable]:
        try:
            return self._time(group, report)
        except Exception as error:  # of torch, a compiler or a driver: the other rungs are still timed
            if not (self.lenient or isinstance(error, torch.OutOfMemoryError)) or isinstance(error, OSError):
                raise
            first_line = next(iter(str(error).strip().splitlines()), "")
            outcome.failed.append((_names(group), f"{type(error).__name__}: {first_line}"))
            return []
        finally:
            free_unused(self.loaded.model.device)

    def _time(self, group: Sequence[BenchConfig], report: Report) -> list[Callable]:
        protocol = fitted(self.protocol, group[0])
        ids = [self._begun(config) or new_record_id("bench", self.loaded.name, config.label) for config in group]
        runs = [TimedRun(config, protocol, record_id, ids[0], len(group)) for config, record_id in zip(group, ids)]
        source = Source(self.text.ids.to(self.loaded.model.device), group[0].streams)
        with PeakMemory(self.loaded.model.device, alone=free_unused(self.loaded.model.device)) as memory:
            if BACKENDS[group[0].rung] is StaticBackend:
                generate_static(runs[0], self.loaded, source)
                torch.compiler.reset()
                report(runs[0].samples.tokens, protocol.tokens)
            else:
                self._time_in_turns(runs, source, report)
        return [partial(self._record, run, memory) for run in runs]

    @torch.inference_mode()
    def _time_in_turns(self, runs: Sequence[TimedRun], source: Source, report: Report) -> None:
        checkpoint = self._checkpoint(runs)
        protocol, active = runs[0].protocol, []
        try:
            for run in runs:
                active.append(ActiveRun(run, self.loaded, source))
            if not (checkpoint and checkpoint.restore(active[0])):
                for one in active:
                    one.prefill(prompt_tokens(protocol, one.run.config))
                for one in active:
                    one.warm_up()
            keep = (lambda: checkpoint.save(active[0])) if checkpoint else None
            decode_in_turns(active, block_tokens=self.block_tokens, progress=report, after_block=keep)
            for one in active:
                one.note_recall()
            for one in active if protocol.profile else ():
                one.run.profile = profile_steps(one.decode, source.table.device)
        except (KeyboardInterrupt, WriteError) as error:
            drop_unpaired_chunks(runs)
            if len(active) < len(runs) or not runs[0].samples.tokens:
                raise
            why = f": {error.strerror}" if isinstance(error, WriteError) else ""
            for run in runs:
                run.reason = f"interrupted after {run.samples.tokens:,} of {protocol.tokens:,} steady tokens{why}"
        finally:
            for one in active:
                one.decoder.close()

    def _checkpoint(self, runs: Sequence[TimedRun]) -> Checkpoint | None:
        """The checkpoint of a long run of one stream on the engine; None for other runs."""
        long = runs[0].protocol.tokens > self.block_tokens
        engine = issubclass(BACKENDS[runs[0].config.rung], EngineBackend)
        single = len(runs) == 1 and runs[0].config.streams == 1 and not runs[0].config.run.recall
        return self._checkpoint_of(runs[0].config, runs[0].id) if long and engine and single else None

    def _checkpoint_of(self, config: BenchConfig, record_id: str) -> Checkpoint:
        return Checkpoint(self.request.out, record_id, self._identity(config))

    # ---- records ----

    def _record(self, run: TimedRun, memory: PeakMemory) -> dict[str, Any]:
        model, rung = self.loaded.model, BACKENDS[run.config.rung]
        return {
            "id": run.id,
            "status": "complete" if run.reason is None else "partial",
            "status_reason": run.reason,
            "session": self.name,
            **provenance(self.loaded, run.config.run, self.request, self._identity(run.config)),
            "rung": {
                "name": run.config.rung,
                "summary": BACKENDS.summary(run.config.rung),
                "attention": rung.attention or attention_implementation(model.config),
            },
            "protocol": {
                **numeric_protocol(self.loaded),
                "seed": self.request.seed,
                "prefill_tokens": prompt_tokens(run.protocol, run.config),
                "text": self.text.name,
                "text_sha256": self.text.sha256,
                **turn_protocol(run),
            },
            "setup": {"load_sec": self.load_sec, **run.setup},
            "memory": {"peak_mb": memory.peak_mb, "kind": memory.kind},
            **run_figures(run, kv_token_bytes(model), self.ceiling),
        }

    def _identity(self, config: BenchConfig) -> dict[str, Any]:
        """What makes two timed configurations the same."""
        own = {"config": config.identity(), "protocol": asdict(self.protocol), "seed": self.request.seed}
        return work_identity(self.loaded, self.text, "triton", **own)

    def _earlier(self, config: BenchConfig) -> list[BenchRecord]:
        """Records of the very same configuration, if the session resumes."""
        if not self.request.resume:
            return []
        same = self._identity(config)
        return [r for r in BenchRecord.below(self.request.out) if r.arguments.get("identity") == same]

    def _finished(self, group: Sequence[BenchConfig]) -> list[BenchRecord]:
        """A complete record for each configuration, or none: the records of a group are comparable only together."""
        complete = [[r for r in self._earlier(config) if r.status == "complete"] for config in group]
        turns = [{r.protocol["turn"] for r in records} for records in complete]
        shared = set.intersection(*turns)
        if not shared:
            return []
        turn = next(r.protocol["turn"] for r in reversed(complete[0]) if r.protocol["turn"] in shared)
        return [next(r for r in records if r.protocol["turn"] == turn) for records in complete]

    def _begun(self, config: BenchConfig) -> str | None:
        """The id of an interrupted record that can be resumed, or of a run that was killed before it had one."""
        if not self.request.resume:
            return None
        begun = [r.id for r in self._earlier(config) if r.status == "partial"]
        begun = Checkpoint.begun(self.request.out, self._identity(config)) + begun
        return next((i for i in reversed(begun) if self._checkpoint_of(config, i).samples() is not None), None)


def _names(group: Sequence[BenchConfig]) -> str:
    """A group of configurations in a few words."""
    first = group[0]
    streams = f", {first.streams} streams" if first.streams > 1 else ""
    return f"{first.rung} {' and '.join(config.run.label() for config in group)}, cap {first.run.cap}{streams}"


def _write(record: dict[str, Any], folder: Path) -> Path:
    """Write a record; delete the checkpoint if the run is complete."""
    path = BenchRecord.write(record, folder)
    if record["status"] == "complete":
        Checkpoint(folder, record["id"], record["arguments"]["identity"]).remove()
    return path


def _paces(records: list[BenchRecord]) -> list[str]:
    """Milliseconds a token of the configurations of a group, in words."""
    return [" / ".join(f"{record.steady['tpot_ms']:,.2f}" for record in records) + " ms per token"]


def _pace_line(bar: Progress, description: str) -> Callable[[int, int], None]:
    """A new line of the progress display, as the callback of a run."""
    task = bar.add_task(description, total=None, pace="")
    first: list[tuple[float, int]] = []

    def show(done: int, total: int) -> None:
        now = time.perf_counter()
        if not first:
            first.append((now, done))
        pace = f"{(done - first[0][1]) / (now - first[0][0]):,.0f} tokens/s" if now > first[0][0] else ""
        bar.update(task, completed=done, total=total, pace=pace)

    return show
