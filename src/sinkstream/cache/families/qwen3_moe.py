"""Qwen3-MoE."""

from typing import Any

from sinkstream.cache.families.base import FAMILY, Family, one_window


@FAMILY.register("qwen3_moe")
class Qwen3Moe(Family):
    """Qwen3-MoE: Qwen3's attention, experts that the cache does not see; a sliding window bounds the cap."""

    @classmethod
    def windows(cls, config: Any) -> list[int | None]:
        return one_window(config)
