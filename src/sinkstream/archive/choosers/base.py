"""The contract of a chooser: evicted tokens go into its index; a query gives one score per block."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch

from sinkstream.policies.options import check_options, option
from sinkstream.registry import Registry

CHOOSERS: Registry = Registry("chooser")

LATEST = 3  # ids of a query by which an index says that it finds nothing

Head = tuple[int, int]  # (layer, kv head)


@dataclass(frozen=True)
class Evicted:
    """Consecutive tokens that have left the window.

    Attributes
    ----------
    first : int
        Index in the stream of the first of them.
    ids : sequence of int
    keys : dict of Tensor, (tokens, head_dim), float32
        Unrotated keys of the heads that the chooser asked for.
    """

    first: int
    ids: Sequence[int]
    keys: Mapping[Head, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Query:
    """What a choice searches for.

    Attributes
    ----------
    now : int
        Index in the stream of the token that comes next.
    ids : sequence of int
        The latest tokens, or those of the question.
    asked : bool
        Whether `ids` is a question: the best blocks then come back whatever their score.
    first, end : int
        The tokens ``first <= index < end`` are scored: those of the archive, and of a question those of the window
        where it competes.
    queries : dict of Tensor, (tokens, query heads of the kv head, head_dim), float32
        Unrotated queries of `ids`, or of the last of them, at the heads that the chooser asked for.
    scaling : float
        Of attention scores.
    least : float
        Scores below this one are not used: an index need not distinguish such blocks.
    brief : bool
        The choice is one of many while nothing is recalled: an index may leave out what takes long.
    """

    now: int
    ids: Sequence[int]
    asked: bool
    first: int
    end: int
    queries: Mapping[Head, torch.Tensor] = field(default_factory=dict)
    scaling: float = 1.0
    least: float = 0.0
    brief: bool = False

    def blocks(self, block: int) -> range:
        """Numbers of the blocks that the archive holds, whole or in part."""
        return range(self.first // block, -(-self.end // block))


class Hits(NamedTuple):
    """Blocks of the archive, and their scores.

    Attributes
    ----------
    blocks : array, (hits,), integers
        Numbers, ascending.
    scores : array, (hits,), float64
    """

    blocks: np.ndarray
    scores: np.ndarray

    @property
    def best(self) -> float:
        """The largest score; 0 without hits."""
        return float(self.scores.max()) if len(self.scores) else 0.0


class Index(ABC):
    """What a chooser remembers of one stream."""

    def add(self, evicted: Evicted) -> None:  # noqa: B027  (some choosers remember nothing)
        """Index tokens that have left the window; each is passed once, in order."""

    def forget(self, before: int) -> None:  # noqa: B027
        """Tokens before this index have left the archive."""

    @abstractmethod
    def scores(self, query: Query) -> np.ndarray:
        """One score for each block of ``query.blocks(block)``: ``(blocks,)``, float64.

        1 is the level that 1 % of the queries of ordinary text reach: the gate opens at 1. A block of 0 or less is not
        brought back. The score of a block below ``query.least`` may be any number below ``query.least``.
        """

    def hits(self, query: Query, blocks: range) -> Hits:
        """As `scores`, without blocks of score 0; an index that scores few of the blocks overrides this.

        Parameters
        ----------
        blocks : range
            ``query.blocks(block)``.

        Raises
        ------
        ValueError
            If there is not one score, a number, for each block.
        """
        given = self.scores(query)
        try:
            plain = given.detach().double().cpu() if isinstance(given, torch.Tensor) else given
            scores = np.asarray(plain, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{type(self).__name__} gave scores that are no numbers ({error}); accepted: ({len(blocks)},) numbers"
            ) from error
        if scores.shape != (len(blocks),):
            raise ValueError(
                f"{type(self).__name__} gave scores of shape {scores.shape}; accepted: ({len(blocks)},), one for each"
                " block of the archive"
            )
        return Hits(np.arange(blocks.start, blocks.stop), scores)

    def may_hit(self, latest: Sequence[int], least: float) -> bool:
        """Whether a brief query may find a block of at least this score. False must be certain, and the answer cheap.

        Parameters
        ----------
        latest : sequence of int
            The last `LATEST` ids of the query, or all if it has fewer.
        """
        return True

    def prepare(self, query: Query) -> None:  # noqa: B027
        """Warm up for the next query, which has one token more than `query` and the same archive.

        Called while the host waits for the last id of the next query.
        """

    def head_keys(self, first: int) -> Mapping[Head, torch.Tensor]:
        """Keys ``(tokens, head_dim)`` of the tokens from `first` on, as `add` took them, for the file of a stream."""
        return {}

    def copy(self) -> Self:
        """An independent copy."""
        raise NotImplementedError


@dataclass(frozen=True)
class Chooser(ABC):
    """Scores the blocks of the archive. Subclasses are frozen dataclasses of their options.

    Attributes
    ----------
    block : int
        Tokens of a block: block b is the tokens b * block to (b + 1) * block - 1 of the stream.
    query_tokens : int
        Latest tokens in a query that is no question.
    foresees : bool
        The index reads ids alone, accepts tokens before they have left the window, and scores only tokens before
        ``query.end``. Then a prompt is fed in long chunks, up to the next choice that changes something.
    window_competes : bool
        Of a chooser that foresees: blocks of the window are scored for a question too, and those that win bring nothing
        back. False for a chooser that ignores the question: it would bring back less, or nothing.
    heads : tuple of (layer, kv_head)
        Whose unrotated keys and queries the index must be given.
    alarms : int
        Default of ``recall_alarms``: false alarms per 1,000 tokens from which on the gate rises; 0: never.
    """

    foresees: ClassVar[bool] = False
    window_competes: ClassVar[bool] = True
    heads: ClassVar[tuple[Head, ...]] = ()
    alarms: ClassVar[int] = 0

    block: int = option(16, "tokens of a block of the archive", minimum=1)
    query_tokens: int = option(32, "latest tokens in a query", minimum=1)

    def __post_init__(self):
        check_options(self)

    @classmethod
    def for_model(cls, model: Any, **options: Any) -> Self:
        """The chooser for one model; a chooser that must know the model overrides this."""
        return cls(**options)

    def with_tokenizer(self, tokenizer: Any) -> Self:
        """The chooser for a tokenizer, or for None; a chooser that reads text overrides this, and may refuse None."""
        return self

    def check(self, model: Any) -> None:
        """Raise ValueError unless the model has the heads that the chooser reads."""
        if self.heads:
            check_heads(self.heads, model)

    @abstractmethod
    def start(self) -> Index:
        """The empty index of a new stream."""


def check_heads(heads: Sequence[Head], model: Any) -> None:
    """Raise ValueError unless the model has these heads, at least one."""
    layers, kv_heads = shape_of(model)
    wrong = [head for head in heads if not (0 <= head[0] < layers and 0 <= head[1] < kv_heads)]
    if wrong or not heads:
        what = f"head {wrong[0][0]}.{wrong[0][1]} is not one of the model's" if wrong else "no retrieval head is given"
        raise ValueError(f"recall_heads: {what}; accepted: layers 0 to {layers - 1}, kv heads 0 to {kv_heads - 1}")


def shape_of(model: Any) -> tuple[int, int]:
    """Layers and kv heads of a model."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return config.num_hidden_layers, heads
