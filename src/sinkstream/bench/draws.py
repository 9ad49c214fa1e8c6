"""``bench --sampling``: a token of every way of drawing against a greedy one, through `Engine.generate`.

The ways take turns, several times, so that a drift of the clock is in all of them. Each call writes on in the same
stream, which is full, and ends by its length alone.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from sinkstream.bench.draw_records import GREEDY, DrawRecord
from sinkstream.bench.policy_session import PolicySession
from sinkstream.data import TokenStream
from sinkstream.engine import Engine
from sinkstream.evaluation.runner import Report, Request
from sinkstream.evaluation.settings import RunSettings
from sinkstream.measure.timing import timed
from sinkstream.models import LoadedModel

REPEATS = 5

#: Name -> options of `Engine.generate`.
WAYS: dict[str, dict[str, float]] = {
    GREEDY: {},
    "temperature": {"temperature": 1.0},
    "top-p 0.95": {"temperature": 1.0, "top_p": 0.95},
    "top-k 40": {"temperature": 1.0, "top_k": 40},
    "min-p 0.05": {"temperature": 1.0, "min_p": 0.05},
    "top-k 40, top-p 0.95": {"temperature": 1.0, "top_k": 40, "top_p": 0.95},
    "repetition penalty, greedy": {"repetition_penalty": 1.1},
    "temperature, penalties": {"temperature": 1.0, "repetition_penalty": 1.1, "presence_penalty": 0.5},
    "greedy, log-probabilities of 5": {"log_probs": 5},
}


@dataclass
class DrawSession(PolicySession[DrawRecord]):
    """Times the ways of drawing for one model, under one policy after the other."""

    record_class = DrawRecord
    work = prefix = "sampling"

    loaded: LoadedModel
    text: TokenStream  # what the stream is filled with, repeated if need be
    tokens: int  # of one timed call
    warmup: int  # tokens of the call of each way before all of them
    backend: str  # the engine's
    request: Request
    name: str  # the same in all records of one command
    repeats: int = REPEATS

    def check(self, runs: Sequence[RunSettings]) -> None:
        """Raise ValueError, before anything is timed, if the engine does not serve a policy."""
        self._check_engine(runs, self.backend)

    def _measure(self, run: RunSettings, report: Report) -> list[Callable[[], dict[str, Any]]]:
        device = self.loaded.model.device
        seconds: dict[str, list[float]] = {name: [] for name in WAYS}
        with self._open_engine(run, self.backend) as engine:
            engine.prefill(self._ids(self._policy(run).peak))
            for options in WAYS.values():
                self._generate(engine, self.warmup, options)
            for done in range(self.repeats):
                report(done, self.repeats)
                for name, options in WAYS.items():
                    seconds[name].append(timed(self._generate, engine, self.tokens, options, device=device)[1])
            report(self.repeats, self.repeats)
        return [partial(self._record, run, seconds)]

    def _generate(self, engine: Engine, tokens: int, options: dict[str, Any]) -> None:
        engine.generate([], max_new_tokens=tokens, stop_tokens=(), seed=self.request.seed, **options)

    # ---- what it is ----

    def _protocol(self, run: RunSettings) -> dict[str, Any]:
        return {
            **super()._protocol(run),
            "backend": self.backend,
            "tokens": self.tokens,
            "warmup": self.warmup,
            "repeats": self.repeats,
            "text": self.text.name,
            "text_sha256": self.text.sha256,
        }

    def _own_identity(self, run: RunSettings) -> dict[str, Any]:
        return {"ways": WAYS, "protocol": self._protocol(run)}

    def _record(self, run: RunSettings, seconds: dict[str, list[float]]) -> dict[str, Any]:
        each = {name: [1e3 * one / self.tokens for one in found] for name, found in seconds.items()}
        middle = {name: statistics.median(found) for name, found in each.items()}
        return self._record_of(
            run,
            protocol=self._protocol(run),
            draws=[
                {
                    "name": name,
                    "options": options,
                    "ms": middle[name],
                    "over_greedy": middle[name] / middle[GREEDY],
                    "repeats_ms": each[name],
                }
                for name, options in WAYS.items()
            ],
        )
