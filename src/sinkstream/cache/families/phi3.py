"""Phi-3."""

from typing import Any

from sinkstream.cache.families.base import FAMILY, Family, one_window


@FAMILY.register("phi3")
class Phi3(Family):
    """Phi-3 and Phi-4: a sliding window bounds the cap, and so does the original length of longrope."""

    drops_long_caches = True

    @classmethod
    def windows(cls, config: Any) -> list[int | None]:
        return one_window(config)
