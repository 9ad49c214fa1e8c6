"""Mean-key chooser: what the field uses, one mean key a block, for comparison."""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch

from sinkstream.archive.choosers.base import CHOOSERS, Chooser, Head, Query, check_heads, shape_of
from sinkstream.archive.choosers.heads import KeptKeys, read_heads


class MeanKeyIndex(KeptKeys):
    """Keys of all heads of a few layers."""

    def scores(self, query: Query) -> np.ndarray:
        """1, so that the gate is open, and the softmax over blocks of mean query and mean key, averaged over heads."""
        blocks = torch.arange(query.first, query.end) // self.chooser.block - query.first // self.chooser.block
        total = torch.zeros(len(query.blocks(self.chooser.block)))
        for head, held in self.keys.items():
            keys, group = held.read(query.first), query.queries[head].mean(0)
            index = blocks.to(keys.device)
            count = torch.bincount(index, minlength=len(total))[:, None]
            mean = keys.new_zeros(len(total), keys.shape[1]).index_add_(0, index, keys) / count
            total += (group @ mean.T * query.scaling).softmax(-1).mean(0).cpu()
        return 1.0 + total.double().numpy() / len(self.keys)


@CHOOSERS.register("mean-key")
@dataclass(frozen=True)
class MeanKey(Chooser):
    """Blocks whose mean unrotated key is nearest to the mean query, over all heads of three layers, always.

    For comparison: what block digests of the field do. Source: KVMem (arXiv:2609.04852).
    """

    heads: tuple[Head, ...] = ()  # type: ignore[misc]  # an option here, nothing for other choosers

    def __post_init__(self):
        object.__setattr__(self, "heads", read_heads(self.heads))
        super().__post_init__()

    @classmethod
    def for_model(cls, model: Any, **options: Any) -> Self:
        """Over all heads of the layers at a quarter, half and three quarters of the depth, unless heads are given."""
        layers, kv_heads = shape_of(model)
        depths = sorted({layers // 4, layers // 2, 3 * layers // 4})
        return cls(**{"heads": [(layer, head) for layer in depths for head in range(kv_heads)]} | options)

    def check(self, model: Any) -> None:
        """As `Chooser.check`; raises ValueError without heads too."""
        check_heads(self.heads, model)

    def start(self) -> MeanKeyIndex:
        """No keys."""
        return MeanKeyIndex(self)
