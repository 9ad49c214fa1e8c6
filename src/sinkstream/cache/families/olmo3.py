"""OLMo 3."""

from typing import Any

from sinkstream.cache.families.base import FAMILY, Family, windows_by_layer_type


@FAMILY.register("olmo3")
class Olmo3(Family):
    """OLMo 3: three sliding layers for one full layer, each kind with its own rotation."""

    @classmethod
    def windows(cls, config: Any) -> list[int | None]:
        return windows_by_layer_type(config)
