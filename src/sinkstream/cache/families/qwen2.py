"""Qwen2 and Qwen2.5."""

from typing import Any

from sinkstream.cache.families.base import FAMILY, Family, windows_by_layer_type


@FAMILY.register("qwen2")
class Qwen2(Family):
    """Qwen2 and Qwen2.5: layers with a sliding window keep a ring of their own."""

    @classmethod
    def windows(cls, config: Any) -> list[int | None]:
        return windows_by_layer_type(config)
