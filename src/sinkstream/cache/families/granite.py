"""Granite."""

from sinkstream.cache.families.base import FAMILY, Family


@FAMILY.register("granite")
class Granite(Family):
    """Granite 3: multipliers of embedding, attention, residual and logits."""
