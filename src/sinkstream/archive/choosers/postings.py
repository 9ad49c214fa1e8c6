"""Postings: where token ids stand in the archive."""

from array import array
from bisect import bisect_left
from typing import NamedTuple

import numpy as np


class Posting:
    """Where one id stands: `places`, the numbers of the blocks that they are in, and how many are in each, ascending.

    No block has ever had more than `most`.
    """

    __slots__ = ("blocks", "counts", "most", "places")

    def __init__(self) -> None:
        self.places, self.blocks, self.counts = array("i"), array("i"), array("i")
        self.most = 0

    def add(self, place: int, block: int) -> None:
        """Note a place behind all others, and the number of its block."""
        blocks, counts = self.blocks, self.counts
        self.places.append(place)
        if not blocks or blocks[-1] != block:
            blocks.append(block)
            counts.append(0)
        counts[-1] += 1
        if counts[-1] > self.most:
            self.most = counts[-1]

    def drop(self, before: int, block: int) -> None:
        """Drop the places before this one; blocks of `block` tokens."""
        del self.places[: bisect_left(self.places, before)]
        gone = bisect_left(self.blocks, self.places[0] // block)
        del self.blocks[:gone], self.counts[:gone]
        self.counts[0] = bisect_left(self.places, (self.blocks[0] + 1) * block)

    def copy(self) -> "Posting":
        """Places of its own."""
        other = Posting()
        other.places, other.blocks, other.counts = self.places[:], self.blocks[:], self.counts[:]
        other.most = self.most
        return other


class Term(NamedTuple):
    """A term of the query: places `low` to `high` of its posting, which are in `blocks` blocks from block `first` on.

    `idf` is its inverse document frequency in the archive.
    """

    posting: Posting
    low: int
    high: int
    first: int
    blocks: int
    idf: float

    @property
    def places(self) -> np.ndarray:
        """``(places,)``, int32, ascending; a view, which must be gone before tokens are added."""
        return np.frombuffer(self.posting.places, dtype=np.int32)[self.low : self.high]

    @property
    def numbers(self) -> np.ndarray:
        """Numbers of the blocks, ``(blocks,)``, int32, ascending; a view, as `places`."""
        return np.frombuffer(self.posting.blocks, dtype=np.int32)[self.first : self.first + self.blocks]

    def counts(self, block: int) -> np.ndarray:
        """How many of the places are in each of the blocks of so many tokens: ``(blocks,)``, int32; often a view."""
        posting, last = self.posting, self.first + self.blocks - 1
        counts = np.frombuffer(posting.counts, dtype=np.int32)[self.first : last + 1]
        if self.low or self.high < len(posting.places):  # the archive holds a part of the first block, or of the last
            behind = (posting.blocks[self.first] + 1) * block
            counts = counts.copy()
            counts[0] = bisect_left(posting.places, behind, self.low, self.high) - self.low
            counts[-1] = self.high - bisect_left(posting.places, posting.blocks[last] * block, self.low, self.high)
        return counts


def stands(term: Term, indices: np.ndarray) -> np.ndarray:
    """Whether a term stands at each index of the archive: ``(indices,)``, bool; of indices in int32."""
    places = term.places  # int32 too: the search converts neither
    return places.take(places.searchsorted(indices), mode="clip") == indices
