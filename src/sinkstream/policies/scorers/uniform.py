"""Uniform refresh: keep tokens spread evenly over everything evicted so far."""

from dataclasses import dataclass

import torch

from sinkstream.policies.scorers.base import SCORERS, Candidates, Scorer


@SCORERS.register("uniform")
@dataclass(frozen=True)
class Uniform(Scorer):
    """Keep tokens spread evenly over the evicted past.

    The priority of a position is its bit reversal (the van der Corput sequence), so that the positions divisible by
    the largest powers of two stay: an even grid that thins out as the past grows, without any state.
    Source: uniform sampling of the project's plan.
    """

    bits = 40

    def score(self, candidates: Candidates) -> torch.Tensor:
        bit = torch.arange(self.bits, device=candidates.position.device)
        return -(((candidates.position[..., None] >> bit) & 1) << (self.bits - 1 - bit)).sum(-1)
