"""Last-query refresh: keep what the newest token looks at."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from sinkstream.policies.scorers.base import SCORERS, Candidates, Scorer, collected


@SCORERS.register("last-query")
@dataclass(frozen=True)
class LastQuery(Scorer):
    """Keep, per layer and kv head, the tokens that the latest query attends to most.

    Source: TOVA (Oren et al., arXiv:2401.06104). Deviation: each kv head chooses for itself; TOVA averages the heads.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    per_head: ClassVar[bool] = True

    @property
    def observed_queries(self) -> int:
        return 1

    def score(self, candidates: Candidates) -> torch.Tensor:
        return collected(candidates.attention)
