"""Caches: they move memory and keep positions right."""

from sinkstream.cache.families import (
    ATTENTION,
    BOUNDED_ROPE_TYPES,
    FAMILIES,
    FAMILY,
    ROPE_TYPES,
    UNSERVED,
    ModelSpec,
    describe,
)
from sinkstream.cache.ring import SoftRing
from sinkstream.cache.rope import Rope
from sinkstream.cache.streaming import POSITIONS, StreamingCache
from sinkstream.cache.wrappers import inner_model

__all__ = [
    "ATTENTION",
    "BOUNDED_ROPE_TYPES",
    "FAMILIES",
    "FAMILY",
    "POSITIONS",
    "ROPE_TYPES",
    "UNSERVED",
    "ModelSpec",
    "Rope",
    "SoftRing",
    "StreamingCache",
    "describe",
    "inner_model",
]
