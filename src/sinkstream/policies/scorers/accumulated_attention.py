"""Accumulated-attention refresh: keep the heavy hitters."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from sinkstream.policies.scorers.base import SCORERS, Candidates, Scorer, collected


@SCORERS.register("accumulated-attention")
@dataclass(frozen=True)
class AccumulatedAttention(Scorer):
    """Keep, per layer and kv head, the tokens that received most attention since they were written.

    Source: H2O (Zhang et al., arXiv:2306.14048). Deviation: query heads that share a kv head are averaged.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"accumulated"})
    per_head: ClassVar[bool] = True

    def score(self, candidates: Candidates) -> torch.Tensor:
        return collected(candidates.accumulated)
