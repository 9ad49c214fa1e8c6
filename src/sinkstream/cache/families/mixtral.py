"""Mixtral."""

from typing import Any

from sinkstream.cache.families.base import FAMILY, Family, one_window


@FAMILY.register("mixtral")
class Mixtral(Family):
    """Mixtral: Mistral's attention, experts that the cache does not see."""

    @classmethod
    def windows(cls, config: Any) -> list[int | None]:
        return one_window(config)
