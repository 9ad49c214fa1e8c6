"""Retrieval-heads chooser: the attention of a few heads over every archived token."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from sinkstream.archive.choosers.base import CHOOSERS, Chooser, Evicted, Head, Index, Query, check_heads, shape_of
from sinkstream.policies.options import option

FOLDER = Path(__file__).parent.parent / "heads"  # of the models whose heads are known
LEVELS = ("level", "row_level")
SAME = 5e-3  # by how much the signature of a model may differ, relative: half precision and quantising round it


class HeadKeys:
    """Unrotated keys of one head, every archived token's, in a buffer on the device that grows by half when it is full.

    So taking in a token costs as much late in a stream as early, and nothing is copied when the keys are asked for.
    """

    def __init__(self) -> None:
        self.first: int | None = None
        self._buffer: torch.Tensor | None = None
        self._begin = self._end = 0  # rows of the buffer that are held

    def add(self, first: int, keys: torch.Tensor) -> None:
        """Keys ``(tokens, head_dim)`` of the tokens from `first` on."""
        self.first = first if self.first is None else self.first
        end = self._end + len(keys)
        if self._buffer is None or end > len(self._buffer):
            self._move(len(keys), keys)
            end = self._end + len(keys)
        assert self._buffer is not None, "it has been made"
        self._buffer[self._end : end] = keys
        self._end = end

    def read(self, first: int) -> torch.Tensor:
        """Keys ``(tokens, head_dim)`` of the tokens from `first` on, a view; those before are forgotten."""
        assert self.first is not None and self._buffer is not None, "something was added"
        if first > self.first:
            self._begin, self.first = self._begin + first - self.first, first
        return self._buffer[self._begin : self._end]

    def copy(self) -> "HeadKeys":
        """The same keys, to go on independently: a full buffer, so that the next keys go to another one."""
        other = HeadKeys()
        other.first, other._begin, other._end = self.first, self._begin, self._end
        other._buffer = None if self._buffer is None else self._buffer[: self._end]
        return other

    def _move(self, more: int, like: torch.Tensor) -> None:
        """Go on in a new buffer, with room for so many more keys, and half as many again."""
        held = self._end - self._begin
        with torch.inference_mode(False):
            buffer = torch.empty((held + more) * 3 // 2, like.shape[1], dtype=like.dtype, device=like.device)
        if self._buffer is not None:
            buffer[:held] = self._buffer[self._begin : self._end]
        self._buffer, self._begin, self._end = buffer, 0, held


def attention(query: Query, head: Head, keys: torch.Tensor) -> torch.Tensor:
    """Attention of the queries of one head, over archived tokens alone.

    Parameters
    ----------
    keys : Tensor, (tokens, head_dim)
        Of the tokens `query.first` to `query.end` - 1.

    Returns
    -------
    Tensor, (queries, tokens), float32
        Mean over the query heads; every row sums to 1.
    """
    return (query.queries[head] @ keys.T * query.scaling).softmax(-1).mean(1)


def in_a_row(given: torch.Tensor, wanted: int) -> torch.Tensor:
    """How well the latest queries attend to tokens in a row, by the token with which the text would go on.

    A head that copies attends to the token behind the one that it reads again: the latest query to the token that comes
    next, the query before to the token before, and so on. One query that attends to one token much is no row, so the
    logarithm counts: log(1 + n a) / log(1 + n), where n is the number of tokens and an even attention is a = 1 / n.

    Parameters
    ----------
    given : Tensor, (queries, tokens), float32
        What `attention` gives.
    wanted : int
        Queries that make a row; missing ones count as 0.

    Returns
    -------
    Tensor, (tokens,), float32
        From 0 to 1; a mean over the queries.
    """
    count, tokens = given.shape
    told = (given * tokens).log1p() / math.log1p(tokens)
    # row i is moved by as many places as its query is old: a row of `tokens + count - 1` read as one longer by 1
    moved = torch.nn.functional.pad(told.flip(0), (0, count)).flatten()[:-count].view(count, tokens + count - 1)
    return moved[:, :tokens].sum(0) / wanted


def of_blocks(found: torch.Tensor, query: Query, block: int) -> torch.Tensor:
    """Numbers ``(tokens,)`` of the archived tokens by block, ``(blocks, block)``; 0 where a block is not whole."""
    before, blocks = query.first % block, len(query.blocks(block))
    return torch.nn.functional.pad(found, (before, blocks * block - before - len(found))).view(blocks, block)


class KeptKeys(Index):
    """Keys of the heads of a chooser, every archived token's."""

    def __init__(self, chooser: Any):
        self.chooser = chooser
        self.keys = {head: HeadKeys() for head in chooser.heads}

    def add(self, evicted: Evicted) -> None:
        """Keep the keys."""
        for head, keys in self.keys.items():
            keys.add(evicted.first, evicted.keys[head])

    def head_keys(self, first: int) -> Mapping[Head, torch.Tensor]:
        """As `Index.head_keys`."""
        return {head: keys.read(first) for head, keys in self.keys.items()}

    def copy(self) -> Self:
        """Keys of its own."""
        other = type(self)(self.chooser)
        other.keys = {head: keys.copy() for head, keys in self.keys.items()}
        return other


class HeadsIndex(KeptKeys):
    """Keys of the chosen heads."""

    def scores(self, query: Query) -> np.ndarray:
        """A question: the attention that it gives to each block. Else: attention in a row, where the text would go on.

        Each is a mean over the heads in units of its own level.
        """
        chooser = self.chooser
        given = [attention(query, head, keys.read(query.first)) for head, keys in self.keys.items()]
        if query.asked:
            mass = torch.stack([one.mean(0) for one in given]).mean(0)
            found = of_blocks(mass, query, chooser.block).sum(1) / chooser.level
        else:
            rows = torch.stack([in_a_row(one, chooser.query_tokens) for one in given]).mean(0)
            found = of_blocks(rows, query, chooser.block).amax(1) / chooser.row_level
        return found.double().cpu().numpy()


@CHOOSERS.register("heads")
@dataclass(frozen=True)
class Heads(Chooser):
    """Blocks that one or two retrieval heads of the model attend to: every archived token has its keys on the device.

    ``sinkstream probe-heads MODEL`` finds the heads of a model and the level of their gate. Source: Wu et al.,
    arXiv:2404.15574 (retrieval heads), and Olsson et al., arXiv:2209.11895 (heads that copy attend to tokens in a row).
    Means of a block's keys, and means over many heads, find nothing.
    """

    heads: tuple[Head, ...] = ()  # type: ignore[misc]  # an option here, nothing for other choosers
    query_tokens: int = option(16, "latest tokens whose queries are asked", minimum=1)
    level: float = option(0.5, "attention of a question to one block that is 1", minimum=1e-9, maximum=1.0)
    row_level: float = option(0.6, "attention in a row that opens the gate", minimum=1e-9, maximum=1.0)

    def __post_init__(self):
        object.__setattr__(self, "heads", read_heads(self.heads))
        super().__post_init__()

    @classmethod
    def for_model(cls, model: Any, **options: Any) -> Self:
        """With the heads that are given, in a file or by name, or those that are known of the model."""
        given = options.get("heads")
        if isinstance(given, str | Path) and Path(given).suffix == ".json":
            options = known_heads(Path(given)) | {name: v for name, v in options.items() if name != "heads"}
        elif given is None:
            options = heads_of(model) | options
        return cls(**options)

    def check(self, model: Any) -> None:
        """As `Chooser.check`; raises ValueError without heads too."""
        check_heads(self.heads, model)

    def start(self) -> HeadsIndex:
        """No keys."""
        return HeadsIndex(self)


def read_heads(given: Any) -> tuple[Head, ...]:
    """Heads of ``"17.1,18.2"``, ``"17.1+18.2"`` or of pairs (layer, kv head). Raises ValueError."""
    try:
        named = given.replace("+", ",").split(",") if isinstance(given, str) else []
        pairs = [part.split(".") for part in named if part] if isinstance(given, str) else list(given)
        return tuple((int(layer), int(head)) for layer, head in pairs)
    except (TypeError, ValueError):
        raise ValueError(
            f"recall_heads={given!r} is not accepted; accepted: LAYER.KV_HEAD[,LAYER.KV_HEAD], as in 17.1,18.2, or the"
            " file that sinkstream probe-heads writes"
        ) from None


def signature(model: Any) -> float:
    """A number that tells models of one shape apart: the mean absolute weight of the input embedding."""
    return float(model.get_input_embeddings().weight.detach().abs().mean(dtype=torch.float64))


def known_heads(path: Path) -> dict[str, Any]:
    """Heads and their levels of a file of ``sinkstream probe-heads``, as options. Raises ValueError if it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        levels = {name: float(content[name]) for name in LEVELS}
        return {"heads": read_heads(content["heads"])} | levels
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"recall_heads: {str(path)!r} holds no heads: {error}; accepted: a file of sinkstream probe-heads"
        ) from None


def heads_of(model: Any) -> dict[str, Any]:
    """Heads and levels that are known of a model, as options.

    Raises
    ------
    ValueError
        If none are: the message says how to find them.
    """
    shape, own = shape_of(model), signature(model)
    for path in sorted(FOLDER.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        same_shape = (content["model_type"], *content["shape"]) == (model.config.model_type, *shape)
        if same_shape and abs(content["signature"] - own) <= SAME * own:
            return known_heads(path)
    raise ValueError(
        f"no retrieval heads are known of this {model.config.model_type} of {shape[0]} layers; accepted:"
        " recall_heads=LAYER.KV_HEAD, or the file that `sinkstream probe-heads MODEL` writes, or recall='lexical'"
    )
