"""Recent chooser: the latest tokens that left, a control."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sinkstream.archive.choosers.base import CHOOSERS, Chooser, Index, Query


class RecentIndex(Index):
    """Remembers nothing."""

    def __init__(self, chooser: "Recent"):
        self.chooser = chooser

    def scores(self, query: Query) -> np.ndarray:
        """From 1 for the oldest block to 2 for the latest."""
        return np.linspace(1.0, 2.0, len(query.blocks(self.chooser.block)))

    def copy(self) -> "RecentIndex":
        """Itself."""
        return self


@CHOOSERS.register("recent")
@dataclass(frozen=True)
class Recent(Chooser):
    """The latest blocks that left the window, always: a control, the same tokens as a longer window.

    Source: none, a control.
    """

    foresees: ClassVar[bool] = True
    window_competes: ClassVar[bool] = False

    def start(self) -> RecentIndex:
        """Nothing to remember."""
        return RecentIndex(self)
