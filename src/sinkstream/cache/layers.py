"""One layer of a streaming cache, as transformers and other software read it."""

import weakref
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin


class StreamingLayer(CacheLayerMixin):
    """One layer's window onto the cache: transformers writes through it, the cache keeps the books."""

    is_croppable = False
    is_sliding = False  # of masks: what is cached is visible to every query
    supports_early_init = False  # see `StreamingCache.early_initialization`

    def __init__(self, cache: Any, index: int):
        self._cache: Any = weakref.proxy(cache)
        self._index = index

    @property
    def keys(self) -> torch.Tensor | None:  # type: ignore[override]
        """What is cached now, ``(batch, kv_heads, kept, head_dim)``: pinned entries first, then the window.

        A view, good until the next forward; not to be written to. None before the first token. Keys are rotated to
        places in the cache, not to indices in the stream.
        """
        return self._stored("keys")

    @property
    def values(self) -> torch.Tensor | None:  # type: ignore[override]
        """As `keys`; values have no rotation."""
        return self._stored("values")

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        """Whether the buffers are allocated."""
        return self._cache.is_initialized

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
        return self._cache.spec.dtype

    @property
    def device(self) -> torch.device | None:
        """Of the buffers; None before they are allocated."""
        return self._cache.stream.device

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do: the cache allocates all layers at once."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Write new entries ``(batch, kv_heads, new, head_dim)``; returns everything the queries may see."""
        return self._cache.update(key_states, value_states, self._index)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Physical length with the new entries, and the stream index that its first column stands for."""
        return self._cache.kept_tokens + query_length, self._cache.seen_tokens - self._cache.kept_tokens

    def get_seq_length(self) -> int:
        """Tokens seen since the beginning of the stream, evicted ones included."""
        return self._cache.seen_tokens

    def get_max_length(self) -> int:
        """No limit: the stream may be endless."""
        return -1

    def offload(self) -> None:
        """Refused, as `StreamingCache.offload`."""
        self._cache.offload(self._index)

    def prefetch(self) -> None:
        """Refused, as `StreamingCache.offload`."""
        self._cache.prefetch(self._index)

    def reset(self) -> None:
        """Refused: layers share one stream."""
        raise ValueError("one layer of a StreamingCache cannot be reset; accepted: cache.reset(), all of them")

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Refused, as `StreamingCache.reorder_cache`."""
        self._cache.reorder_cache(beam_idx)

    def crop(self, *args: Any) -> None:
        """Refused, as `StreamingCache.crop`."""
        self._cache.crop()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refused, as `StreamingCache.batch_repeat_interleave`."""
        self._cache.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Refused, as `StreamingCache.batch_select_indices`."""
        self._cache.batch_select_indices(indices)

    def _stored(self, name: str) -> torch.Tensor | None:
        if not self.is_initialized:
            return None
        buffers, row = self._cache.stream.buffers_of(self._index)
        if buffers is None:
            raise ValueError(
                "rows that differ hold different entries, not one tensor; accepted: cache.fork() and"
                " batch_select_indices(torch.tensor([row])) for each row"
            )
        return buffers.stored[name][row]
