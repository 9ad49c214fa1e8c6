"""The contract of a scorer: what is known of the candidates in, one score each out; the highest scores stay."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from sinkstream.policies.options import check_options
from sinkstream.registry import Registry

SCORERS: Registry = Registry("scorer")


@dataclass(frozen=True)
class Candidates:
    """What is known of the tokens that compete for the pinned slots, oldest first along the last axis.

    Axes are ``(layers, batch, kv_heads, candidates)``; an axis that a quantity does not depend on has size 1. Only the
    fields that the scorer `needs` are set.

    Attributes
    ----------
    position : Tensor, int64
        Index of the token in the stream.
    structure : Tensor, float32
        Weight of the token's text: newline, sentence end, quote (see `structural_weights`).
    nll : Tensor, float32, nats
        Negative log-likelihood of the token given its past. 0 for the first token of the stream.
    entropy : Tensor, float32, nats
        Entropy of the distribution that the token was drawn from. 0 for the first token of the stream.
    attention : Tensor, float32
        Attention that the latest `Scorer.observed_queries` queries give to the token, summed over those queries and
        averaged over the query heads of the kv head.
    accumulated : Tensor, float32
        Attention received from every query so far, averaged over the query heads of the kv head.
    key_norm : Tensor, float32
        L2 norm of the token's key.
    """

    position: torch.Tensor
    structure: torch.Tensor | None = None
    nll: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    attention: torch.Tensor | None = None
    accumulated: torch.Tensor | None = None
    key_norm: torch.Tensor | None = None


def collected(quantity: torch.Tensor | None) -> torch.Tensor:
    """A field of `Candidates` that the scorer needs: it is set then."""
    assert quantity is not None
    return quantity


@dataclass(frozen=True)
class Scorer(ABC):
    """Scores candidates for the pinned slots. Subclasses are frozen dataclasses of their options.

    Attributes
    ----------
    needs : frozenset of str
        Fields of `Candidates` besides ``position`` that must be collected.
    per_head : bool
        Whether every layer and kv head chooses for itself.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    per_head: ClassVar[bool] = False

    def __post_init__(self):
        check_options(self)
        if "attention" in self.needs and self.observed_queries < 1:
            raise ValueError(
                f"{type(self).__name__} needs attention, and its observed_queries is {self.observed_queries};"
                " accepted: at least 1, the queries that attention is read of"
            )

    @property
    def observed_queries(self) -> int:
        """How many of the latest queries are re-scored at a prune (0 unless ``attention`` is needed)."""
        return 0

    @abstractmethod
    def score(self, candidates: Candidates) -> torch.Tensor:
        """One score per candidate, same axes; higher stays."""


@dataclass(frozen=True)
class FieldScorer(Scorer):
    """A scorer whose scores are one field of the candidates as it is: the only one that it `needs`."""

    def __post_init__(self):
        super().__post_init__()
        if len(self.needs) != 1:
            raise ValueError(
                f"{type(self).__name__} is a FieldScorer, and its needs are {sorted(self.needs)}; accepted: one field"
            )

    def score(self, candidates: Candidates) -> torch.Tensor:
        (name,) = self.needs
        return collected(getattr(candidates, name))


def scored_field(scorer: Scorer | None) -> str | None:
    """The field of the candidates that a scorer's scores are, as it is; None where they are anything else."""
    if scorer is None or type(scorer).score is not FieldScorer.score:
        return None
    (name,) = scorer.needs
    return name


def select(scores: torch.Tensor, keep: int) -> torch.Tensor:
    """Indices of the `keep` highest scores, in their original order; of equal scores the more recent stays.

    Parameters
    ----------
    scores : Tensor, (..., candidates)
    keep : int
        At most the number of candidates.

    Returns
    -------
    Tensor, (..., keep), int64, ascending.
    """
    recent_first = scores.flip(-1).sort(dim=-1, descending=True, stable=True).indices[..., :keep]
    return (scores.shape[-1] - 1 - recent_first).sort(dim=-1).values
