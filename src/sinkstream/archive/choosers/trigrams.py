"""`Trigrams`: whether three ids have ever stood in a row, in one to five bytes per token."""

import copy
from collections.abc import Sequence
from typing import Self

FIRST, GROWTH, LARGEST = 1 << 12, 4, 1 << 22  # tokens of a part; each is larger than the one before, up to the largest
FACTOR_A, FACTOR_B, FACTOR_C = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D  # odd, of the multiplicative hash
SHIFT, AGAIN = 9, 0x9E3779B97F4A7C15  # the low bits of a product are mixed least


class _Part:
    """The trigrams of so many tokens: 8 bits each, two of which are set."""

    __slots__ = ("bits", "end", "mask", "room")

    def __init__(self, tokens: int):
        self.bits, self.mask, self.room, self.end = bytearray(tokens), 8 * tokens - 1, tokens, 0

    def add(self, first: int, second: int) -> None:
        """Set both bits."""
        bits, mask = self.bits, self.mask
        first, second = first & mask, second & mask
        bits[first >> 3] |= 1 << (first & 7)
        bits[second >> 3] |= 1 << (second & 7)
        self.room -= 1

    def copy(self) -> "_Part":
        """The same bits, to go on independently."""
        other = copy.copy(self)
        other.bits = self.bits[:]
        return other


class Trigrams:
    """A Bloom filter of two hashes that grows: what was taken in is always found, of the rest one in twenty in a part.

    Source: Bloom (1970); parts that grow, Almeida et al. (2007).
    """

    def __init__(self) -> None:
        self._parts: list[_Part] = []
        self._latest: list[int] = []  # at most two
        self._found: tuple[int, int, int] | None = None  # the latest three that were asked for and found

    def add(self, first: int, ids: Sequence[int]) -> None:
        """Take in tokens that follow those before, from index `first` on."""
        known = len(self._latest)
        if known < 2:
            ids, first = [*self._latest, *ids], first - known
            self._latest, first, ids = list(ids[:2]), first + 2, ids[2:]
        if not len(ids):
            return
        a, b = self._latest
        part = self._parts[-1] if self._parts else None
        for end, c in enumerate(ids, first + 1):
            if part is None or not part.room:
                if part is not None:
                    part.end = end - 1
                part = self._grow()
            place = a * FACTOR_A + b * FACTOR_B + c * FACTOR_C >> SHIFT
            part.add(place, place * AGAIN >> 24)
            a, b = b, c
        assert part is not None, "a token has come"
        part.end, self._latest = first + len(ids), [a, b]

    def _grow(self) -> _Part:
        size = GROWTH * len(self._parts[-1].bits) if self._parts else FIRST
        self._parts.append(_Part(min(size, LARGEST)))
        return self._parts[-1]

    def has(self, a: int, b: int, c: int) -> bool:
        """Whether the three may have stood in a row; False is sure."""
        if self._found == (a, b, c):  # a query is often asked twice
            return True
        first = a * FACTOR_A + b * FACTOR_B + c * FACTOR_C >> SHIFT
        second = first * AGAIN >> 24
        for part in reversed(self._parts):  # the last one is the largest, as a rule
            bits, at = part.bits, first & part.mask
            if bits[at >> 3] >> (at & 7) & 1:
                at = second & part.mask
                if bits[at >> 3] >> (at & 7) & 1:
                    self._found = a, b, c
                    return True
        return False

    def forget(self, before: int) -> None:
        """Let go what holds only tokens before this index."""
        while len(self._parts) > 1 and self._parts[0].end <= before:
            del self._parts[0]

    def copy(self) -> Self:
        """The same, to go on independently."""
        other = copy.copy(self)
        other._latest, other._parts = list(self._latest), [part.copy() for part in self._parts]
        return other
