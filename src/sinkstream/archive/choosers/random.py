"""Random chooser: blocks drawn anew at every choice, a control."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sinkstream.archive.choosers.base import CHOOSERS, Chooser, Index, Query
from sinkstream.policies.options import option


class RandomIndex(Index):
    """Remembers nothing: a draw depends on the seed and on where the stream is."""

    def __init__(self, chooser: "Random"):
        self.chooser = chooser

    def scores(self, query: Query) -> np.ndarray:
        """Drawn from 1 to 2."""
        blocks = len(query.blocks(self.chooser.block))
        return 1.0 + np.random.default_rng((self.chooser.seed, query.now)).random(blocks)

    def copy(self) -> "RandomIndex":
        """Itself."""
        return self


@CHOOSERS.register("random")
@dataclass(frozen=True)
class Random(Chooser):
    """Blocks drawn at random, always: a control, what any tokens of the past are worth.

    Source: none, a control.
    """

    foresees: ClassVar[bool] = True
    window_competes: ClassVar[bool] = False

    seed: int = option(0, "seed of the draws", minimum=0)

    def start(self) -> RandomIndex:
        """Nothing to remember."""
        return RandomIndex(self)
