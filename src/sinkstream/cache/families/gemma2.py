"""Gemma 2."""

from typing import Any, ClassVar

from transformers import PreTrainedConfig

from sinkstream.cache.families.base import FAMILY, Family, windows_by_layer_type


@FAMILY.register("gemma2")
class Gemma2(Family):
    """Gemma 2: every second layer slides; soft-capped attention scores, so eager attention only."""

    attention: ClassVar[tuple[str, ...]] = ("eager",)
    why_attention = "sdpa leaves out the soft cap of the attention scores"

    @classmethod
    def check(cls, config: PreTrainedConfig) -> None:
        check_one_direction(config)

    @classmethod
    def windows(cls, config: Any) -> list[int | None]:
        return windows_by_layer_type(config)


def check_one_direction(config: PreTrainedConfig) -> None:
    """Refuse a variant whose tokens attend to later ones."""
    if getattr(config, "use_bidirectional_attention", False):
        raise ValueError(
            f"model type {config.model_type!r} with use_bidirectional_attention="
            f"{config.use_bidirectional_attention!r} is not supported (an encoder); accepted: causal attention"
        )
