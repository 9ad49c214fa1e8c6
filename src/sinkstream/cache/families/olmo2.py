"""OLMo 2."""

from sinkstream.cache.families.base import FAMILY, Family


@FAMILY.register("olmo2")
class Olmo2(Family):
    """OLMo 2: norms behind attention and MLP, and over all queries and all keys."""
