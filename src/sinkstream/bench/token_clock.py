"""`generated`: when ``generate()`` shows each of its tokens."""

import time
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from transformers import Cache
from transformers.generation.streamers import BaseStreamer

from sinkstream.compat import with_cache


class Clock(BaseStreamer):
    """When generate() shows each token, in seconds."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """The prompt first, then token by token; each is on the host already."""
        self.seconds.append(time.perf_counter())

    def end(self) -> None:
        """Nothing more comes."""

    def token_ms(self, warmup: int) -> list[float]:
        """Milliseconds of each token behind the first `warmup` ones."""
        return [1e3 * (b - a) for a, b in pairwise(self.seconds[warmup:])]


def generated(model: Any, cache: Cache, given: Mapping[str, Any], tokens: int, warmup: int) -> list[float]:
    """Milliseconds of each of `tokens` likeliest tokens of a generate(), after `warmup` others; it ends by length."""
    new, clock = tokens + warmup, Clock()
    more = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    model.generate(**given, **more, **with_cache(model, cache), streamer=clock)
    return clock.token_ms(warmup)
