"""``bench --late``: what a token of ``generate()`` with a streaming cache takes at several places of a stream.

The cache's work is the same everywhere. What grows is transformers' own: at every token its loop copies the ids, the
positions and, before 5.24, the mask of the whole conversation. So a call of the model is timed as well.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from sinkstream.bench.late_records import LATE_TIMES, LateRecord
from sinkstream.bench.policy_session import PolicySession
from sinkstream.bench.token_clock import Clock, generated
from sinkstream.cache import StreamingCache
from sinkstream.compat import with_cache
from sinkstream.data import TokenStream
from sinkstream.evaluation.runner import Report, Request
from sinkstream.evaluation.settings import RunSettings
from sinkstream.models import LoadedModel

TOKENS = 200  # timed at every place
WARMUP = 20  # before them

DEFINITIONS = {
    "conversation": "median token of generate(), given the whole conversation",
    "continuation": "median token of generate(**cache.continuation(new_ids)), given new tokens only",
    "call": "median call of the model with the cache, one token, without generate()",
}


@dataclass
class LateSession(PolicySession[LateRecord]):
    """Times tokens of one model, under one policy after the other.

    Attributes
    ----------
    text : TokenStream
        What is fed, repeated as often as need be.
    places : list of int
        Tokens before those that are timed.
    request : Request
    name : str
        The same in all records of one command.
    """

    record_class = LateRecord
    work, prefix = "late tokens", "late"

    loaded: LoadedModel
    text: TokenStream
    places: Sequence[int]
    request: Request
    name: str
    tokens: int = TOKENS

    @torch.no_grad()
    def _measure(self, run: RunSettings, report: Report) -> list[Callable[[], dict[str, Any]]]:
        cache = StreamingCache.for_model(self.loaded.model, policy=self._policy(run), **self._options(run))
        places, done = [], 0
        try:
            for seen in self.places:
                place: dict[str, Any] = {"seen": seen}
                for name in LATE_TIMES:
                    cache.reset()
                    place[f"{name}_ms"] = self._token(cache, seen, name)
                    done += 1
                    report(done, len(self.places) * len(LATE_TIMES))
                places.append(place)
        finally:
            cache.close()
        return [partial(self._record, run, places)]

    def _token(self, cache: StreamingCache, seen: int, name: str) -> float:
        """Median milliseconds of a token."""
        model: Any = self.loaded.model
        ids = self._ids(seen)[None]
        cache.prefill(model, ids[:, :-1])
        if name == "call":
            clock = Clock()
            for _ in range(self.tokens + WARMUP + 1):
                clock.put(model(ids[:, -1:], **with_cache(model, cache)).logits.argmax(-1).cpu())
            return statistics.median(clock.token_ms(WARMUP))
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        given = cache.continuation(ids[:, -1:]) if name == "continuation" else given
        return statistics.median(generated(model, cache, given, self.tokens, WARMUP))

    def _own_identity(self, run: RunSettings) -> dict[str, Any]:
        return {"places": list(self.places)}

    def _record(self, run: RunSettings, places: list[dict[str, Any]]) -> dict[str, Any]:
        timed = {"places": list(self.places), "tokens": self.tokens, **DEFINITIONS}
        return self._record_of(run, protocol={**self._protocol(run), **timed}, places=places)
