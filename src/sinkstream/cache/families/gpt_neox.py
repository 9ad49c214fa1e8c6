"""GPT-NeoX."""

from sinkstream.cache.families.base import FAMILY, Family


@FAMILY.register("gpt_neox")
class GPTNeoX(Family):
    """GPT-NeoX, Pythia: partial rotary positions, parallel or sequential residual."""
