"""``bench --generate``: a token of ``generate()`` with a streaming cache against one with transformers' dynamic cache.

The two take turns, several times, in alternating order. Each turn begins with a prompt and a cache of its own, which is
closed behind it: no hook is on the model while the dynamic cache is timed.
"""

import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache

from sinkstream.bench.generate_records import CACHES, FIGURES, GenerateRecord, turn_ratios
from sinkstream.bench.policy_session import PolicySession
from sinkstream.bench.token_clock import generated
from sinkstream.cache import StreamingCache
from sinkstream.data import TokenStream
from sinkstream.evaluation.runner import Report, Request
from sinkstream.evaluation.settings import RunSettings
from sinkstream.models import LoadedModel

TURNS = 10

DEFINITIONS = {
    "dynamic": "DynamicCache, after a prompt with which the timed tokens see as many tokens as the cap on average",
    "streaming": "StreamingCache, after a prompt of as many tokens as the cap: full, it evicts while it is timed",
    "median": "median time between two tokens that generate() shows a streamer, after the warm-up; of a turn, of all",
    "mean": "mean of the same times, prune events and copies of the buffer included",
    "over": "median of the turns' ratios, streaming over dynamic",
}


@dataclass
class GenerateSession(PolicySession[GenerateRecord]):
    """Times tokens of one model with a streaming and a dynamic cache, under one policy after the other.

    Attributes
    ----------
    text : TokenStream
        What the prompts are the beginning of, repeated if need be.
    tokens : int
        Timed tokens of each cache, in all turns together.
    warmup : int
        Tokens of each turn before them.
    request : Request
    name : str
        The same in all records of one command.
    turns : int
        Of each cache.
    """

    record_class = GenerateRecord
    work, prefix = "tokens of generate()", "generate"

    loaded: LoadedModel
    text: TokenStream
    tokens: int
    warmup: int
    request: Request
    name: str
    turns: int = TURNS

    def check(self, runs: Sequence[RunSettings]) -> None:
        """Raise ValueError, before anything is timed, if the turns get no token, or the cache refuses a policy."""
        if self.tokens < self.turns:
            raise ValueError(
                f"--tokens {self.tokens} with --generate, which times them in {self.turns} turns; accepted: at least"
                f" {self.turns}"
            )
        for run in runs:
            self._cache(run).close()

    @torch.no_grad()
    def _measure(self, run: RunSettings, report: Report) -> list[Callable[[], dict[str, Any]]]:
        self._turn(run, "dynamic", 1)  # not timed: compiles and allocates
        self._turn(run, "streaming", 1)
        turns: list[dict[str, list[float]]] = []
        for done in range(self.turns):
            report(done, self.turns)
            order = CACHES if done % 2 == 0 else CACHES[::-1]
            turns.append({cache: self._turn(run, cache, self.tokens // self.turns) for cache in order})
        report(self.turns, self.turns)
        return [partial(self._record, run, turns)]

    def _turn(self, run: RunSettings, kind: str, tokens: int) -> list[float]:
        """Milliseconds of each token of one turn."""
        ids = self._ids(self._prompt_tokens(run, tokens)[kind])[None]
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        model = self.loaded.model
        cache = self._cache(run) if kind == "streaming" else DynamicCache(config=model.config)
        try:
            return generated(model, cache, given, tokens, self.warmup)
        finally:
            if isinstance(cache, StreamingCache):
                cache.close()
            del cache
            gc.collect()  # frees the buffers before the next turn

    def _cache(self, run: RunSettings) -> StreamingCache:
        return StreamingCache.for_model(self.loaded.model, policy=self._policy(run), **self._options(run))

    def _prompt_tokens(self, run: RunSettings, tokens: int) -> dict[str, int]:
        """Tokens of the prompt of each cache."""
        peak = self._policy(run).peak
        return {"dynamic": max(1, peak - self.warmup - tokens // 2), "streaming": peak}

    # ---- what it is ----

    def _protocol(self, run: RunSettings) -> dict[str, Any]:
        return {
            **super()._protocol(run),
            "tokens": self.tokens // self.turns * self.turns,
            "warmup": self.warmup,
            "turns": self.turns,
            "prompt_tokens": self._prompt_tokens(run, self.tokens // self.turns),
            "text": self.text.name,
            "text_sha256": self.text.sha256,
            **DEFINITIONS,
        }

    def _own_identity(self, run: RunSettings) -> dict[str, Any]:
        return {"protocol": self._protocol(run)}

    def _record(self, run: RunSettings, turns: list[dict[str, list[float]]]) -> dict[str, Any]:
        figure: dict[str, Callable[[list[float]], float]] = {"median": statistics.median, "mean": statistics.fmean}
        each = [{f"{c}_{name}_ms": figure[name](turn[c]) for c in CACHES for name in FIGURES} for turn in turns]
        together = {c: [ms for turn in turns for ms in turn[c]] for c in CACHES}
        token = {f"{c}_{name}_ms": figure[name](together[c]) for c in CACHES for name in FIGURES}
        over = {f"{name}_over": statistics.median(turn_ratios(each, name)) for name in FIGURES}
        return self._record_of(run, protocol=self._protocol(run), turns=each, token=token | over)
