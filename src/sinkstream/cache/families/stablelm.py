"""StableLM."""

from sinkstream.cache.families.base import FAMILY, Family


@FAMILY.register("stablelm")
class StableLm(Family):
    """StableLM 2 and 3B: partial rotary positions, parallel or sequential residual."""
