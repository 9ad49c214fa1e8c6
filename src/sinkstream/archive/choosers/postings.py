"""`Postings`: where token ids stand in the archive, out of the garbage collector's sight."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from struct import Struct
from typing import NamedTuple, Self

import numpy as np

NUMBER = Struct("i")
SIZE = NUMBER.size

#: places of an id, the numbers of the blocks that they are in, and how many are in each, ascending: int32 each
Posting = tuple[bytearray, bytearray, bytearray]


def numbers_of(held: bytearray) -> memoryview:
    """The numbers of a part of a posting; a view, which must be gone before tokens are added."""
    return memoryview(held).cast("i")


class Term(NamedTuple):
    """A term of the query: places `low` to `high` of its posting, which are in `blocks` blocks from block `first` on.

    `idf` is its inverse document frequency in the archive; no block has ever had it more than `most` times.
    """

    posting: Posting
    low: int
    high: int
    first: int
    blocks: int
    idf: float
    most: int

    @property
    def places(self) -> np.ndarray:
        """``(places,)``, int32, ascending; a view, which must be gone before tokens are added."""
        return np.frombuffer(self.posting[0], np.int32, self.high - self.low, SIZE * self.low)

    def stands_at(self, index: int) -> bool:
        """Whether one of the places is this one."""
        places = numbers_of(self.posting[0])
        at = bisect_left(places, index, self.low, self.high)
        return at < self.high and places[at] == index

    @property
    def numbers(self) -> np.ndarray:
        """Numbers of the blocks, ``(blocks,)``, int32, ascending; a view, as `places`."""
        return np.frombuffer(self.posting[1], np.int32, self.blocks, SIZE * self.first)

    def counts(self, block: int) -> np.ndarray:
        """How many of the places are in each of the blocks of so many tokens: ``(blocks,)``, int32."""
        return np.frombuffer(self.count_bytes(block), np.int32)

    def count_bytes(self, block: int) -> bytearray:
        """As `counts`, in bytes; a copy."""
        counts = self.posting[2][SIZE * self.first : SIZE * (self.first + self.blocks)]
        # where the archive has a part of the first block, or of the last
        if self.low or SIZE * self.high < len(self.posting[0]):
            places, numbers = numbers_of(self.posting[0]), numbers_of(self.posting[1])
            behind, last = (numbers[self.first] + 1) * block, numbers[self.first + self.blocks - 1]
            counts[:SIZE] = NUMBER.pack(bisect_left(places, behind, self.low, self.high) - self.low)
            counts[-SIZE:] = NUMBER.pack(self.high - bisect_left(places, last * block, self.low, self.high))
        return counts


def joined_places(terms: Sequence[Term]) -> np.ndarray:
    """The places of one term after the other, int32; a copy."""
    return np.frombuffer(b"".join([t.posting[0][SIZE * t.low : SIZE * t.high] for t in terms]), np.int32)


def joined_numbers(terms: Sequence[Term]) -> np.ndarray:
    """The numbers of the blocks of one term after the other, int32; a copy."""
    parts = [t.posting[1][SIZE * t.first : SIZE * (t.first + t.blocks)] for t in terms]
    return np.frombuffer(b"".join(parts), np.int32)


def joined_counts(terms: Sequence[Term], block: int) -> np.ndarray:
    """How many of the places are in each of these blocks, as `Term.counts`."""
    return np.frombuffer(b"".join([t.count_bytes(block) for t in terms]), np.int32)


def stands(term: Term, indices: np.ndarray) -> np.ndarray:
    """Whether a term stands at each index of the archive: ``(indices,)``, bool; of indices in int32."""
    places = term.places  # int32 too: the search converts neither
    return places.take(places.searchsorted(indices), mode="clip") == indices


class Postings:
    """Where each id stands.

    A posting is bytes in a plain tuple, which Python's garbage collector does not walk: a collection of everything
    takes a tenth of a second or more, and comes when a quarter as many objects are new as there were.

    Parameters
    ----------
    block : int
        Tokens of a block.

    Attributes
    ----------
    held : dict of Posting
        By id.
    """

    def __init__(self, block: int):
        self.block = block
        self.held: dict[int, Posting] = {}
        self._most: dict[int, int] = {}  # of an id that a block has had more than once, how often at the most
        self._first, self._end = 0, 0  # all places that were ever held

    def add(self, first: int, ids: Sequence[int]) -> None:
        """Take in ids at the places from `first` on, which lie behind all others."""
        held, block, pack, one = self.held, self.block, NUMBER.pack, NUMBER.pack(1)
        self._first, self._end = self._first if self._end else first, first + len(ids)
        for place, token in enumerate(ids, first):
            number, posting = pack(place // block), held.get(token)
            if posting is None:
                held[token] = bytearray(pack(place)), bytearray(number), bytearray(one)
                continue
            places, blocks, counts = posting
            places += pack(place)
            if blocks[-SIZE:] != number:
                blocks += number
                counts += one
                continue
            (count,) = NUMBER.unpack(counts[-SIZE:])
            counts[-SIZE:] = pack(count + 1)
            if count >= self._most.get(token, 1):
                self._most[token] = count + 1

    def trim(self, token: int, before: int) -> None:
        """Drop the places of an id before this one."""
        posting, block = self.held[token], self.block
        places = numbers_of(posting[0])
        gone, left = bisect_left(places, before), len(places)
        if gone == left:
            del self.held[token]
            self._most.pop(token, None)
        elif gone:
            first = places[gone] // block
            blocks = bisect_left(numbers_of(posting[1]), first)
            inside = bisect_left(places, (first + 1) * block) - gone
            places.release()
            for part, count in zip(posting, (gone, blocks, blocks)):
                del part[: SIZE * count]
            posting[2][:SIZE] = NUMBER.pack(inside)

    def term(self, token: int, first: int, end: int, total: int, most: float = math.inf) -> Term | None:
        """An id as a term of a query to the tokens ``first <= index < end``, which lie in `total` blocks.

        None if it does not stand there, or in more than `most` blocks.
        """
        posting = self.held.get(token)
        if posting is None:
            return None
        low, high, start, blocks = 0, len(posting[0]) // SIZE, 0, len(posting[1]) // SIZE
        if first > self._first or end < self._end:  # else every place counts, as long as nothing was lost
            places = numbers_of(posting[0])
            if places[0] < first or places[-1] >= end:
                low, high = bisect_left(places, first), bisect_left(places, end)
                if low == high:
                    return None
                numbers = numbers_of(posting[1])
                start = bisect_left(numbers, places[low] // self.block)
                blocks = bisect_left(numbers, places[high - 1] // self.block, start) + 1 - start
        if blocks > most:
            return None
        idf = math.log1p((total - blocks + 0.5) / (blocks + 0.5))
        return Term(posting, low, high, start, blocks, idf, self._most.get(token, 1))

    def copy(self) -> Self:
        """Places of their own."""
        other = type(self)(self.block)
        other.held = {token: (p[:], b[:], c[:]) for token, (p, b, c) in self.held.items()}
        other._most, other._first, other._end = dict(self._most), self._first, self._end
        return other
