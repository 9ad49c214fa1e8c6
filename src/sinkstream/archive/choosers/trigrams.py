"""`Trigrams`: whether three ids have ever stood in a row, in one to five bytes a token."""

import copy
from collections.abc import Sequence
from typing import Self

FIRST, GROWTH, LARGEST = 1 << 12, 4, 1 << 22  # tokens of a part; each is larger than the one before, up to the largest
FACTORS = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D  # odd, of the multiplicative hash
SHIFT, AGAIN = 9, 0x9E3779B97F4A7C15  # the low bits of a product are mixed least


class _Part:
    """The trigrams of so many tokens: 8 bits each, two of which are set."""

    def __init__(self, tokens: int):
        self.bits, self.mask, self.room, self.end = bytearray(tokens), 8 * tokens - 1, tokens, 0

    def add(self, places: tuple[int, int]) -> None:
        """Set both bits."""
        for place in places:
            at = place & self.mask
            self.bits[at >> 3] |= 1 << (at & 7)
        self.room -= 1


class Trigrams:
    """A Bloom filter of two hashes that grows: what was taken in is always found, of the rest one in twenty in a part.

    Source: Bloom (1970); parts that grow, Almeida et al. (2007).
    """

    def __init__(self) -> None:
        self._parts: list[_Part] = []
        self._latest: list[int] = []  # at most two

    def add(self, first: int, ids: Sequence[int]) -> None:
        """Take in tokens that follow those before, from index `first` on."""
        ids = [*self._latest, *ids]
        self._latest, end = ids[-2:], first + len(ids) - len(self._latest)
        for a, b, c in zip(ids, ids[1:], ids[2:]):
            if not self._parts or not self._parts[-1].room:
                size = GROWTH * len(self._parts[-1].bits) if self._parts else FIRST
                self._parts.append(_Part(min(size, LARGEST)))
            self._parts[-1].add(_places(a, b, c))
            self._parts[-1].end = end

    def has(self, a: int, b: int, c: int) -> bool:
        """Whether the three may have stood in a row; False is sure."""
        first, second = _places(a, b, c)
        for part in self._parts:
            bits, at = part.bits, first & part.mask
            if bits[at >> 3] >> (at & 7) & 1:
                at = second & part.mask
                if bits[at >> 3] >> (at & 7) & 1:
                    return True
        return False

    def forget(self, before: int) -> None:
        """Let go what holds only tokens before this index."""
        while len(self._parts) > 1 and self._parts[0].end <= before:
            del self._parts[0]

    def copy(self) -> Self:
        """The same, to go on independently."""
        other = copy.copy(self)
        other._latest, other._parts = list(self._latest), [copy.copy(part) for part in self._parts]
        for part in other._parts:
            part.bits = part.bits[:]
        return other


def _places(a: int, b: int, c: int) -> tuple[int, int]:
    place = a * FACTORS[0] + b * FACTORS[1] + c * FACTORS[2] >> SHIFT
    return place, place * AGAIN >> 24
