"""Qwen3."""

from typing import Any

from sinkstream.cache.families.base import FAMILY, Family, windows_by_layer_type


@FAMILY.register("qwen3")
class Qwen3(Family):
    """Qwen3: norms of queries and keys; layers with a sliding window keep a ring of their own."""

    @classmethod
    def windows(cls, config: Any) -> list[int | None]:
        return windows_by_layer_type(config)
