"""`QueryLog`: the latest queries of a few heads, unrotated, for choosers that read attention."""

import copy
from collections.abc import Sequence
from typing import Any, Self

import torch

from sinkstream.cache.pinned import unrotated
from sinkstream.cache.ring import SoftRing


class QueryLog:
    """Is shown the queries of every forward; what a forward shows is kept apart until `commit`.

    Parameters
    ----------
    heads : sequence of (layer, kv_head)
    keep : int
        Latest queries to keep.
    """

    def __init__(self, heads: Sequence[tuple[int, int]], keep: int):
        self.heads, self.keep = tuple(heads), keep
        self.layers = sorted({layer for layer, _ in heads})
        self.scaling = 1.0
        self._kv_heads = 1
        self._kept: dict[int, torch.Tensor] = {}
        self._new: dict[int, torch.Tensor] = {}
        self._first = 0

    @property
    def bytes(self) -> int:
        """Memory held, in bytes."""
        return sum(q.numel() * q.element_size() for q in self._kept.values())

    def begin(self, ring: SoftRing) -> None:
        """A forward begins: forget an unfinished one."""
        self._rope, self._first, self._new = ring.rope, ring.seen - ring.base, {}

    @torch.no_grad()
    def see(self, layer: int, query: torch.Tensor, key: torch.Tensor, scaling: float) -> None:
        """As `AttentionObserver.see`: queries ``(1, query_heads, new, head_dim)``."""
        if layer in self.layers:
            self.scaling, self._kv_heads = scaling, key.shape[1]
            self._new[layer] = unrotated(self._rope.layer(layer), query[0], self._first)

    def commit(self, tokens: int) -> None:
        """Take over the first `tokens` of what the forward showed.

        Raises
        ------
        ValueError
            If the attention of a layer was not seen.
        """
        if set(self._new) != set(self.layers):
            raise ValueError(
                "this recall reads queries, but the model's attn_implementation was changed after the cache was made;"
                " make the cache again"
            )
        for layer, new in self._new.items():
            older = self._kept.get(layer)
            joined = new[:, :tokens] if older is None else torch.cat([older, new[:, :tokens]], 1)
            self._kept[layer] = joined[:, -self.keep :].clone()
        self._new = {}

    def read(self, count: int) -> dict[tuple[int, int], torch.Tensor]:
        """The last `count` queries, or as many as there are, by head: ``(tokens, query heads of it, head_dim)``."""
        grouped = {i: q[:, -count:].unflatten(0, (self._kv_heads, -1)) for i, q in self._kept.items()}
        return {(layer, head): grouped[layer][head].transpose(0, 1) for layer, head in self.heads}

    def saved(self) -> tuple[dict[str, Any], torch.Tensor]:
        """Counts, and what is kept, ``(layers, query_heads, kept, head_dim)``, for the file of a stream."""
        kept = torch.stack([self._kept[layer] for layer in self.layers])
        return {"scaling": self.scaling, "kv_heads": self._kv_heads, "layers": len(kept), "kept": kept.shape[2]}, kept

    def load(self, counts: dict[str, Any], kept: torch.Tensor) -> None:
        """Take over what `saved` gave."""
        self.scaling, self._kv_heads = float(counts["scaling"]), int(counts["kv_heads"])
        self._kept = dict(zip(self.layers, kept, strict=True))

    def rewind(self, tokens: int) -> None:
        """Forget the latest ones."""
        self._kept = {layer: q[:, : max(0, q.shape[1] - tokens)] for layer, q in self._kept.items()}

    def fork(self) -> Self:
        """The same queries, to go on independently."""
        other = copy.copy(self)
        other._kept, other._new = dict(self._kept), {}
        return other
