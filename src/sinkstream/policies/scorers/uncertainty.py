"""Uncertainty refresh: keep the tokens that surprised the model."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from sinkstream.policies.options import option
from sinkstream.policies.scorers.base import SCORERS, Candidates, Scorer, collected


@SCORERS.register("uncertainty")
@dataclass(frozen=True)
class Uncertainty(Scorer):
    """Keep the tokens with the highest NLL of their own, or drawn from the distribution of highest entropy.

    Source: the uncertainty proxy of the project's plan.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"nll", "entropy"})

    uncertainty: str = option("nll", "what makes a token uncertain", choices=lambda: ["nll", "entropy"])

    def score(self, candidates: Candidates) -> torch.Tensor:
        return collected(candidates.nll if self.uncertainty == "nll" else candidates.entropy)
