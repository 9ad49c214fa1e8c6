"""A text that is read through the model again: keys and values of its tokens, in each other's company alone."""

from collections.abc import Sequence
from functools import partial

import torch
from transformers import DynamicCache

from sinkstream.archive.text import Reread
from sinkstream.cache.families import ModelSpec
from sinkstream.cache.pinned import unrotated
from sinkstream.compat import with_cache


@torch.no_grad()
def _reread(spec: ModelSpec, ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    decoder = spec.decoder
    plain = DynamicCache(config=decoder.config)
    device = decoder.get_input_embeddings().weight.device
    decoder(torch.tensor([list(ids)], device=device), **with_cache(decoder, plain), use_cache=True)
    keys = torch.stack([plain.layers[i].keys for i in spec.full_layers])
    values = torch.stack([plain.layers[i].values for i in spec.full_layers])
    return unrotated(spec.rope, keys, 0), values


def reader(spec: ModelSpec) -> Reread:
    """What a text archive reads with; see `sinkstream.archive.text.Reread`."""
    return partial(_reread, spec)
