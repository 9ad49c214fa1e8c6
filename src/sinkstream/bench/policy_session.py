"""`PolicySession`: one resumable record a policy.

The base of ``bench --prefill``, ``--late``, ``--generate``, ``--sampling`` and ``--snapshot``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar, Generic, TypeVar

import torch
from rich.console import Console

from sinkstream.data import TokenStream
from sinkstream.engine import Engine
from sinkstream.evaluation.record import find_complete, numeric_protocol, provenance, work_identity
from sinkstream.evaluation.run import check_ids
from sinkstream.evaluation.runner import Job, Report, Request, Runner
from sinkstream.evaluation.settings import RunSettings
from sinkstream.models import LoadedModel
from sinkstream.policies import EvictionPolicy
from sinkstream.records.base import StatusRecord
from sinkstream.records.plain import new_record_id

R = TypeVar("R", bound=StatusRecord)


class PolicySession(ABC, Generic[R]):
    """Times one model, under one policy after the other.

    Attributes
    ----------
    record_class : type
        Of the records.
    work, prefix : str
        What is timed, for the progress bar; the beginning of the records' ids.
    loaded : LoadedModel
    text : TokenStream
        What is fed, repeated as often as need be.
    request : Request
    name : str
        The same in all records of one command.
    """

    record_class: type[R]
    work: ClassVar[str]
    prefix: ClassVar[str]
    loaded: LoadedModel
    text: TokenStream
    request: Request
    name: str

    def check(self, runs: Sequence[RunSettings]) -> None:
        """Raise ValueError, before anything is timed, if a policy cannot be served; by default nothing is checked."""

    def _check_engine(self, runs: Sequence[RunSettings], backend: str) -> None:
        """Raise ValueError if the engine does not serve a policy."""
        for run in runs:
            Engine.check(self.loaded.model, self._policy(run), backend=backend, **self._options(run))

    @contextmanager
    def _open_engine(self, run: RunSettings, backend: str) -> Iterator[Engine]:
        """An engine under the run's policy, closed at the end."""
        options = self._options(run) | {"tokenizer": self.loaded.tokenizer}
        engine = Engine(self.loaded.model, self._policy(run), backend=backend, **options)
        try:
            yield engine
        finally:
            engine.close()

    def run(self, runs: Sequence[RunSettings], console: Console) -> list[R]:
        """Time all policies; one record each. Raises as `check`, `check_ids` and `Runner.run`."""
        self.check(runs)
        check_ids(self.loaded, self.text.ids)
        jobs = [Job(f"{self.work}, {r.label()}", partial(self._measure, r), partial(self._finished, r)) for r in runs]
        runner = Runner(self.request, self.record_class.write, self.record_class.read, self.loaded.model.device)
        return runner.run(jobs, console)

    @abstractmethod
    def _measure(self, run: RunSettings, report: Report) -> list[Callable[[], dict[str, Any]]]:
        """Time one policy; returns what makes its record."""

    @abstractmethod
    def _own_identity(self, run: RunSettings) -> dict[str, Any]:
        """What makes two pieces of this work the same, beside model, text, releases and the run's settings."""

    def _policy(self, run: RunSettings) -> EvictionPolicy:
        policy = run.policy()
        assert policy is not None, "baselines are refused before"
        return policy

    def _options(self, run: RunSettings) -> dict[str, Any]:
        """Options of a cache or an engine under the run's policy."""
        more = {"tokenizer": self.loaded.tokenizer} if "structure" in self._policy(run).needs else {}
        return {"positions": run.positions, "allow_untrained_positions": run.allow_untrained_positions, **more}

    def _ids(self, tokens: int) -> torch.Tensor:
        """The first tokens of the text, ``(tokens,)``, on the model's device."""
        ids = self.text.ids.to(self.loaded.model.device)
        return ids.repeat(-(-tokens // len(ids)))[:tokens]

    def _identity(self, run: RunSettings) -> dict[str, Any]:
        return work_identity(self.loaded, self.text, "triton", run=run.record(), **self._own_identity(run))

    def _finished(self, run: RunSettings) -> list[R]:
        return find_complete(self.record_class.below, self.request.out, self._identity(run))

    def _protocol(self, run: RunSettings) -> dict[str, Any]:
        """How it is timed; the part that all have in common."""
        return {**numeric_protocol(self.loaded), "seed": self.request.seed, "cap": run.cap}

    def _record_of(self, run: RunSettings, **own: Any) -> dict[str, Any]:
        """A complete record with the protocol and the figures `own`."""
        return {
            "id": new_record_id(self.prefix, self.loaded.name, run.label()),
            "status": "complete",
            "status_reason": None,
            "session": self.name,
            **provenance(self.loaded, run, self.request, self._identity(run)),
            **own,
        }
