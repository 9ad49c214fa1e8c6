"""Union chooser: shared words and retrieval heads, each behind its own gate."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch

from sinkstream.archive.choosers.base import CHOOSERS, Evicted, Head, Index, Query
from sinkstream.archive.choosers.heads import Heads
from sinkstream.archive.choosers.lexical import Lexical


class UnionIndex(Index):
    """An index of either kind."""

    def __init__(self, words: Index, heads: Index):
        self.words, self.heads = words, heads

    def add(self, evicted: Evicted) -> None:
        """To both."""
        self.words.add(evicted)
        self.heads.add(evicted)

    def forget(self, before: int) -> None:
        """In both."""
        self.words.forget(before)
        self.heads.forget(before)

    def scores(self, query: Query) -> np.ndarray:
        """The larger of the two, in units of their own levels; heads count only above their level.

        So a chooser that is unsure can neither open the gate nor take the slots of one that is sure.
        """
        words, heads = self.words.scores(query), self.heads.scores(query)
        return np.maximum(words, np.where(heads >= 1.0, heads, 0.0))

    def head_keys(self, first: int) -> Mapping[Head, torch.Tensor]:
        """Those of the heads."""
        return self.heads.head_keys(first)

    def copy(self) -> "UnionIndex":
        """Both of its own."""
        return UnionIndex(self.words.copy(), self.heads.copy())


@CHOOSERS.register("union")
@dataclass(frozen=True)
class Union(Heads):
    """What shared words find, and what retrieval heads find above their level.

    Options are those of ``heads``; of ``lexical`` the defaults. Source: none.
    """

    @classmethod
    def for_model(cls, model: Any, **options: Any) -> Self:
        """As `Heads.for_model`."""
        return super().for_model(model, **options)

    def start(self) -> UnionIndex:  # type: ignore[override]
        """Nothing remembered."""
        words = Lexical(block=self.block, query_tokens=self.query_tokens)
        return UnionIndex(words.start(), super().start())
