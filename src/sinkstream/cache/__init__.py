"""Caches: they move memory and keep positions right."""

from sinkstream.cache.families import ATTENTION, FAMILIES, ROPE_TYPES, ModelSpec, describe
from sinkstream.cache.ring import SoftRing
from sinkstream.cache.rope import Rope
from sinkstream.cache.streaming import POSITIONS, StreamingCache
from sinkstream.cache.wrappers import inner_model

__all__ = [
    "ATTENTION",
    "FAMILIES",
    "POSITIONS",
    "ROPE_TYPES",
    "ModelSpec",
    "Rope",
    "SoftRing",
    "StreamingCache",
    "describe",
    "inner_model",
]
