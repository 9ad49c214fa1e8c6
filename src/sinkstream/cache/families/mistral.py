"""Mistral."""

from typing import Any

from sinkstream.cache.families.base import FAMILY, Family, one_window


@FAMILY.register("mistral")
class Mistral(Family):
    """Mistral: a sliding window, where there is one, bounds the cap."""

    @classmethod
    def windows(cls, config: Any) -> list[int | None]:
        return one_window(config)
