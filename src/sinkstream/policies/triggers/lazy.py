"""Lazy pruning: let R tokens gather, then drop them in one event."""

from dataclasses import dataclass
from typing import Any

from sinkstream.policies.options import option
from sinkstream.policies.triggers.base import TRIGGERS, Trigger


@TRIGGERS.register("lazy")
@dataclass(frozen=True)
class Lazy(Trigger):
    """Prune once compress_every tokens have gathered past the target (1 = strict).

    Source: the lazy pruning of the project's plan; with ``compress_every=1`` it is StreamingLLM's own rule
    (Xiao et al., arXiv:2309.17453).
    """

    compress_every: int | None = option(None, "prune every R tokens; 1 is strict streaming", minimum=1)

    @property
    def growth(self) -> int:
        assert self.compress_every is not None  # the option switches the trigger on
        return self.compress_every - 1

    def due(self, over: int, state: Any) -> bool:
        return over > self.growth
