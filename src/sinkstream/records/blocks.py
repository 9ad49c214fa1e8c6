"""Block sums of a run's NLL: what paired intervals need of a run, small enough to stay in its record."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sinkstream.records.schema import check_keys
from sinkstream.statistics import block_sums, suitable_block_tokens

_REQUIRED = dict.fromkeys(("tokens", "first", "last", "nll", "scored"))
DIGITS = 5  # decimals of a sum in nats; a figure of a table has at most four


@dataclass(frozen=True, eq=False)
class Blocks:
    """NLL of a run in contiguous blocks of its text."""

    tokens: int  # length of a block
    # first, last: index in the text of the first and of the last token
    first: int
    last: int
    sums: np.ndarray  # (blocks,) float: NLL of the scored tokens of each block, in nats, to `DIGITS` decimals
    counts: np.ndarray  # (blocks,) int: scored tokens of each block
    whole: bool  # whether every token from `first` to `last` is scored
    # (blocks,) int: most KV entries that a token of each block saw; None in records that were made without it
    kv: np.ndarray | None = None

    @classmethod
    def of(cls, index: np.ndarray, nll: np.ndarray, kv_length: np.ndarray) -> "Blocks | None":
        """Blocks of `suitable_block_tokens` of a run's arrays (tokens,), as `schema.ARRAYS` has them; None if empty."""
        if not len(index):
            return None
        first, last = int(index[0]), int(index[-1])
        tokens = suitable_block_tokens(last - first + 1)
        starts, some_sums, some_counts = block_sums(nll, index, tokens)
        sums, counts = (np.zeros((last - first) // tokens + 1, dtype=dtype) for dtype in (float, int))
        at = (starts - first) // tokens
        sums[at], counts[at] = np.round(some_sums, DIGITS), some_counts
        kv = np.zeros(sums.size, dtype=np.int64)
        np.maximum.at(kv, (np.asarray(index) - first) // tokens, kv_length)
        return cls(tokens, first, last, sums, counts, bool(counts.sum() == last - first + 1), kv)

    @staticmethod
    def check(content: Any, where: str, prefix: str = "blocks.") -> None:
        """Raise ValueError, naming `where` and the field, unless `content` is what `record` gives; None is accepted."""
        if content is None:
            return
        check_keys(content, _REQUIRED, where, prefix)
        for name in ("nll", "scored", "kv"):
            listed = content.get(name)
            if not (isinstance(listed, list) or (listed is None and name != "nll")):
                raise ValueError(f"{where}: field '{prefix}{name}' must be a list, got {type(listed).__name__}")

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> "Blocks":
        """From the field `blocks` of a record."""
        tokens, first, last = (content[name] for name in ("tokens", "first", "last"))
        sums = np.array(content["nll"], dtype=np.float64)
        whole = content["scored"] is None
        full = np.minimum(tokens, last - first + 1 - tokens * np.arange(len(sums)))
        counts = full if whole else np.array(content["scored"], dtype=np.int64)
        kv = None if content.get("kv") is None else np.array(content["kv"], dtype=np.int64)
        return cls(tokens, first, last, sums, counts, whole, kv)

    def record(self) -> dict[str, Any]:
        """The field `blocks` of a record: `scored` is null where every token is scored."""
        scored = None if self.whole else self.counts.tolist()
        place = {"tokens": self.tokens, "first": self.first, "last": self.last}
        kv = None if self.kv is None else self.kv.tolist()
        return {**place, "nll": np.round(self.sums, DIGITS).tolist(), "scored": scored, "kv": kv}

    @property
    def centres(self) -> np.ndarray:
        """Index in the text of the middle of each block (blocks,); the last block may be a shorter one."""
        starts = self.first + self.tokens * np.arange(len(self.sums))
        return (starts + np.minimum(starts + self.tokens, self.last + 1)) / 2

    def pairs_with(self, other: "Blocks") -> bool:
        """Whether the differences of the sums are the sums of the differences: both score the same tokens."""
        extents = [(blocks.tokens, blocks.first, blocks.last) for blocks in (self, other)]
        return self.whole and other.whole and extents[0] == extents[1]
