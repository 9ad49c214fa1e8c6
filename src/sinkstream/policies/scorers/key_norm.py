"""Key-norm refresh: keep the keys of smallest norm."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from sinkstream.policies.scorers.base import SCORERS, Candidates, Scorer, collected


@SCORERS.register("key-norm")
@dataclass(frozen=True)
class KeyNorm(Scorer):
    """Keep, per layer and kv head, the keys of smallest L2 norm.

    Source: Devoto et al., arXiv:2406.11430 (a low key norm goes with high attention). Norms are compared in steps of
    0.1 %: equal tokens have equal norms in the first layer (and all norms are alike under QK-norm), and rounding errors
    must not decide between them; of equals the more recent stays.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"key_norm"})
    per_head: ClassVar[bool] = True

    def score(self, candidates: Candidates) -> torch.Tensor:
        return -(collected(candidates.key_norm).log() * 1000).round()
