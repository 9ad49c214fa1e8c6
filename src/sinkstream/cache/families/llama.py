"""Llama."""

from sinkstream.cache.families.base import FAMILY, Family


@FAMILY.register("llama")
class Llama(Family):
    """Llama 1 to 3, SmolLM, TinyLlama and other models of its shape."""
