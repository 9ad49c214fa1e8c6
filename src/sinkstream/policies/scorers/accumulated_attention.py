"""Accumulated-attention refresh: keep the heavy hitters."""

from dataclasses import dataclass
from typing import ClassVar

from sinkstream.policies.scorers.base import SCORERS, FieldScorer


@SCORERS.register("accumulated-attention")
@dataclass(frozen=True)
class AccumulatedAttention(FieldScorer):
    """Keep, per layer and kv head, the tokens that received most attention since they were written.

    Source: H2O (Zhang et al., arXiv:2306.14048). Deviation: query heads that share a kv head are averaged.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"accumulated"})
    per_head: ClassVar[bool] = True
