"""What transformers may ask of a cache and a cache that evicts cannot do: refused, each with what is accepted."""

from typing import Any

import torch

from sinkstream.cache.hooks import HookedCache


class AppendOnlyCache(HookedCache):
    """A cache that takes new tokens and nothing else: no rollback, no other batch, no copy."""

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Refused: rows of a streaming cache share one schedule."""
        raise ValueError(
            "beam search is not supported by StreamingCache; accepted: greedy decoding and sampling."
            " The prompt is in the cache, once for every beam: call reset() before using it again"
        )

    def activate_past_recording(self) -> None:
        """Refused, as `crop`: generate() asks for it before an assisted decoding."""
        self.crop()

    def crop(self, *args: Any) -> None:
        """Refused: evicted entries cannot come back."""
        raise ValueError("StreamingCache cannot be rolled back; assisted decoding and crop() are not supported")

    def __deepcopy__(self, memo: dict) -> None:
        """Refused: a copy would have no hooks on the model."""
        raise ValueError("StreamingCache cannot be copied; make another one with StreamingCache.for_model(model, …)")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refused, as `reorder_cache`."""
        raise ValueError("StreamingCache cannot change its batch; accepted: the batch size of the first call")

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Refused, as `reorder_cache`."""
        raise ValueError("StreamingCache cannot change its batch; accepted: the batch size of the first call")
