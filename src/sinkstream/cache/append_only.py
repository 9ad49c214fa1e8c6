"""What transformers and other software may ask of a cache: answered, or refused with what is accepted."""

from collections.abc import Iterator
from typing import Any

import torch

from sinkstream.cache.hooks import HookedCache
from sinkstream.cache.stream import Stream


class AppendOnlyCache(HookedCache):
    """A cache that takes new tokens and nothing else: no rollback."""

    stream: Stream

    # ---- read ----

    def __iter__(self) -> Iterator[tuple[torch.Tensor | None, torch.Tensor | None]]:
        """Keys and values of every layer; see `StreamingLayer.keys`."""
        return (self[index] for index in range(len(self.layers)))

    def __getitem__(self, index: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Keys and values of one layer, ``(batch, kv_heads, kept, head_dim)``; None before the first token."""
        layer: Any = self.layers[index]
        return layer.keys, layer.values

    @property
    def is_initialized(self) -> bool:
        """Whether the buffers are allocated."""
        return self.stream.ring is not None or self.stream.batch > 0

    @property
    def batch_size(self) -> int:
        """Rows of the batch; -1 before the first token."""
        return self.stream.ring.keys.shape[1] if self.stream.ring is not None else self.stream.batch or -1

    @property
    def max_batch_size(self) -> int:
        """As `batch_size`; transformers before 5.24 has it."""
        return self.batch_size

    @property
    def max_cache_len(self) -> int:
        """As `get_max_length`: -1, no limit; transformers before 5.24 has it. `policy.peak` counts the entries held."""
        return self.get_max_length()

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """As `max_cache_len`."""
        return self.get_max_length(layer_idx)

    def early_initialization(
        self,
        batch_size: int,
        num_heads: int | list[int],
        head_dim: int | list[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Allocate the buffers before the first token; a first forward of another batch allocates them again.

        Raises
        ------
        ValueError
            If a size or the dtype is not the model's.
        """
        spec = self.stream.spec
        for name, given, wanted in (
            ("num_heads", num_heads, spec.kv_heads),
            ("head_dim", head_dim, spec.head_dim),
            ("dtype", dtype, spec.dtype),
        ):
            if given not in (wanted, [wanted] * spec.layers):
                raise ValueError(f"{name}={given} is not accepted; accepted: {wanted}, the model's")
        if self.stream.seen == 0:
            self.stream.allocate(batch_size, torch.device(device))

    # ---- refused ----

    def offload(self, layer_idx: int = 0, only_non_sliding: bool = True) -> None:
        """Refused: all layers lie in one buffer, whose size does not grow."""
        raise ValueError(
            "offloading is not supported by StreamingCache, whose memory is bounded (stats()['bytes']); accepted: a"
            " smaller cap, or cache.save(path) for a stream that rests"
        )

    def prefetch(self, layer_idx: int = 0, only_non_sliding: bool = True) -> None:
        """Refused, as `offload`."""
        self.offload(layer_idx)

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
        raise ValueError(
            "StreamingCache cannot be rolled back; assisted decoding and crop() are not supported; accepted: go on from"
            " cache.fork(), made before the tokens in question"
        )
