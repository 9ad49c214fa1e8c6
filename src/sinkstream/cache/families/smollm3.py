"""SmolLM3."""

from typing import Any

from sinkstream.cache.families.base import FAMILY, Family, windows_by_layer_type


@FAMILY.register("smollm3")
class SmolLM3(Family):
    """SmolLM3: layers without rotation, whose pinned keys are not rotated either."""

    @classmethod
    def windows(cls, config: Any) -> list[int | None]:
        return windows_by_layer_type(config)

    @classmethod
    def rotated(cls, config: Any) -> list[bool]:
        return [bool(rotates) for rotates in config.no_rope_layers]  # 1 where a layer rotates, whatever the name says
