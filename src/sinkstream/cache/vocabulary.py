"""Token ids against the vocabulary of a model: torch itself has an IndexError for them, or loses the GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sinkstream.cache.wrappers import plain

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def vocabulary_size(model: PreTrainedModel) -> int:
    """How many token ids a model, or its decoder, embeds; adapters around the embedding do not matter."""
    embedding = plain(model.get_input_embeddings())
    return getattr(embedding, "num_embeddings", None) or model.config.vocab_size


def check_vocabulary(ids: torch.Tensor, size: int, name: str = "input_ids", first: int = 0) -> None:
    """Raise ValueError, with the first one and its place, if token ids ``(batch, tokens)`` or ``(tokens,)`` are none.

    `first` is the place of the first column. On a GPU the host waits once, for the smallest and largest id.
    """
    if not ids.numel():
        return
    least, most = torch.stack(torch.aminmax(ids)).tolist()
    if least >= 0 and most < size:
        return
    *row, position = ((ids < 0) | (ids >= size)).nonzero()[0].tolist()
    found = int(ids[(*row, position)])
    where = f"position {first + position}" + (f" of row {row[0]}" if row and len(ids) > 1 else "")
    raise ValueError(
        f"{name}: token id {found} at {where} is not in the vocabulary of {size} tokens; accepted: 0 to {size - 1}"
    )
