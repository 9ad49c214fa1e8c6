"""Gemma 3."""

from typing import Any

from transformers import PreTrainedConfig

from sinkstream.cache.families.base import FAMILY, Family, windows_by_layer_type
from sinkstream.cache.families.gemma2 import check_one_direction


@FAMILY.register("gemma3_text")
class Gemma3(Family):
    """Gemma 3, text: five sliding layers for one full layer, each kind with its own rotary base."""

    @classmethod
    def check(cls, config: PreTrainedConfig) -> None:
        check_one_direction(config)

    @classmethod
    def windows(cls, config: Any) -> list[int | None]:
        return windows_by_layer_type(config)
