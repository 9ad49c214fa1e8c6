"""Lexical chooser: an inverted index of token ids on the host."""

import copy
import math
from array import array
from dataclasses import dataclass
from typing import Self

import numpy as np

from sinkstream.archive.choosers.base import CHOOSERS, Chooser, Evicted, Index, Query
from sinkstream.policies.options import option

SATURATION = 1.2  # of the count of a term in a block, as in BM25
FEW_BLOCKS = 2  # a term in so few blocks is rare, however small the archive is


class _Postings:
    """Blocks that a term is in, in order, and how often."""

    __slots__ = ("blocks", "counts")

    def __init__(self) -> None:
        self.blocks, self.counts = array("i"), array("i")

    def add(self, block: int) -> None:
        """Count one more in a block, which is not before the latest one."""
        if self.blocks and self.blocks[-1] == block:
            self.counts[-1] += 1
        else:
            self.blocks.append(block)
            self.counts.append(1)

    def forget(self, before: int) -> None:
        """Blocks before this one have left."""
        gone = int(np.searchsorted(np.frombuffer(self.blocks, dtype=np.int32), before)) if self.blocks else 0
        del self.blocks[:gone], self.counts[:gone]


class LexicalIndex(Index):
    """Postings of every token id."""

    def __init__(self, chooser: "Lexical"):
        self.chooser = chooser
        self.postings: dict[int, _Postings] = {}

    def add(self, evicted: Evicted) -> None:
        """Count the ids in their blocks."""
        for index, token in enumerate(evicted.ids, evicted.first):
            self.postings.setdefault(token, _Postings()).add(index // self.chooser.block)

    def forget(self, before: int) -> None:
        """Drop blocks that are gone as a whole, and terms that are in none."""
        for token, postings in list(self.postings.items()):
            postings.forget(before // self.chooser.block)
            if not postings.blocks:
                del self.postings[token]

    def scores(self, query: Query) -> np.ndarray:
        """Sum over the rare terms of the query of idf to a power, times their saturated count in the block."""
        blocks = query.blocks(self.chooser.block)
        found = np.zeros(len(blocks))
        most = max(FEW_BLOCKS, self.chooser.rare * len(blocks))
        for token in set(query.ids):
            postings = self.postings.get(token)
            if postings is None or len(postings.blocks) > most:
                continue
            df, count = len(postings.blocks), np.frombuffer(postings.counts, dtype=np.int32)
            idf = math.log1p((len(blocks) - df + 0.5) / (df + 0.5))
            weight = idf**self.chooser.idf_power * count * (1 + SATURATION) / (count + SATURATION)
            found[np.frombuffer(postings.blocks, dtype=np.int32) - blocks.start] += weight
        return found / self.chooser.alarm(len(blocks))

    def copy(self) -> Self:
        """Postings of its own."""
        other = copy.copy(self)
        other.postings = copy.deepcopy(self.postings)
        return other


@CHOOSERS.register("lexical")
@dataclass(frozen=True)
class Lexical(Chooser):
    """Blocks that share rare token ids with the query: an inverted index on the host, no byte on the device.

    Source: BM25 (Robertson and Zaragoza, 2009) with the idf to a power of 2 and without common terms: without the two,
    blocks of common words, and old questions, outrank the statement.
    """

    rare: float = option(0.03, "a term in a larger share of the blocks is not looked at", minimum=0.0, maximum=1.0)
    idf_power: float = option(2.0, "power of the inverse document frequency", minimum=0.0)
    level: float = option(3.6, "score that opens the gate, in squared idf of a term that is in one block", minimum=0.0)

    def alarm(self, blocks: int) -> float:
        """Score at which the gate opens, of an archive of so many blocks."""
        return max(self.level, 1e-9) * math.log1p((blocks - 0.5) / 1.5) ** self.idf_power

    def start(self) -> LexicalIndex:
        """No postings."""
        return LexicalIndex(self)
