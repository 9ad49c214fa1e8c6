"""gpt-oss."""

from typing import Any, ClassVar

from sinkstream.cache.families.base import FAMILY, Family, windows_by_layer_type


@FAMILY.register("gpt_oss")
class GptOss(Family):
    """gpt-oss: every second layer slides; a learned sink in the softmax of every head, so eager attention only."""

    attention: ClassVar[tuple[str, ...]] = ("eager",)
    why_attention = "sdpa leaves out the learned sinks"

    @classmethod
    def windows(cls, config: Any) -> list[int | None]:
        return windows_by_layer_type(config)
