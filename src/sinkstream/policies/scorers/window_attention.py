"""Window-attention refresh: keep what the latest queries look at."""

from dataclasses import dataclass
from typing import ClassVar

from sinkstream.policies.options import option
from sinkstream.policies.scorers.base import SCORERS, FieldScorer


@SCORERS.register("window-attention")
@dataclass(frozen=True)
class WindowAttention(FieldScorer):
    """Keep, per layer and kv head, the tokens that the latest queries attend to most.

    Source: SnapKV (Li et al., arXiv:2404.14469). Deviations: applied again at every prune instead of once after the
    prompt, the observed queries are scored at their present cache positions, and scores are not pooled over neighbours.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    per_head: ClassVar[bool] = True

    observation: int = option(32, "latest queries, of those in the window, that are re-scored at a prune", minimum=1)

    @property
    def observed_queries(self) -> int:
        return self.observation
