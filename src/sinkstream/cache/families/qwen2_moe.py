"""Qwen1.5-MoE and Qwen2-MoE."""

from typing import Any

from sinkstream.cache.families.base import FAMILY, Family, windows_by_layer_type


@FAMILY.register("qwen2_moe")
class Qwen2Moe(Family):
    """Qwen1.5-MoE and Qwen2-MoE: Qwen2's attention, experts that the cache does not see."""

    @classmethod
    def windows(cls, config: Any) -> list[int | None]:
        return windows_by_layer_type(config)
