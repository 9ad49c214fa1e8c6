"""Gemma."""

from sinkstream.cache.families.base import FAMILY, Family


@FAMILY.register("gemma")
class Gemma(Family):
    """Gemma 1: full attention in every layer."""
