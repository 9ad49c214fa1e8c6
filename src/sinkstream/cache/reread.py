"""A text that is read through the model again: keys and values of its tokens, in each other's company alone."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache

from sinkstream.archive.text import Reread
from sinkstream.cache.families import ModelSpec
from sinkstream.cache.pinned import unrotated
from sinkstream.compat import with_cache


@torch.no_grad()
def _reread(spec: ModelSpec, ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    decoder, plain = spec.decoder, DynamicCache(config=spec.decoder.config)
    decoder(torch.tensor([list(ids)], device=decoder.device), **with_cache(decoder, plain), use_cache=True)
    layers: list[Any] = [plain.layers[i] for i in spec.full_layers]
    keys, values = (torch.stack([getattr(layer, name) for layer in layers]) for name in ("keys", "values"))
    return unrotated(spec.rope, keys, 0), values


def reader(spec: ModelSpec) -> Reread:
    """What a text archive reads with; see `sinkstream.archive.text.Reread`."""
    return partial(_reread, spec)
