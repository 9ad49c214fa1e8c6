"""Falcon."""

from typing import Any

from transformers import PreTrainedConfig

from sinkstream.cache.families.base import FAMILY, Family


@FAMILY.register("falcon")
class Falcon(Family):
    """Falcon 7B, 40B, 180B: rotary variants; ALiBi variants are refused."""

    observable = False

    @classmethod
    def check(cls, config: PreTrainedConfig) -> None:
        if getattr(config, "alibi", False):
            raise ValueError(
                "model type 'falcon' with alibi=True is not supported (ALiBi instead of rotary positions);"
                " accepted: alibi=False"
            )

    @classmethod
    def kv_heads(cls, config: Any) -> int:
        if config.new_decoder_architecture:
            return config.num_attention_heads  # keys of a group are repeated before they are cached
        return 1 if config.multi_query else config.num_kv_heads
