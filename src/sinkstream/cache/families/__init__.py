"""Which models the cache serves: one file a family, and one reason a family that is not served."""

from sinkstream.cache.families.base import ATTENTION, FAMILY, Family
from sinkstream.cache.families.describe import BOUNDED_ROPE_TYPES, ROPE_TYPES, describe
from sinkstream.cache.families.spec import ModelSpec, SlidingLayers, check_policy
from sinkstream.cache.families.unserved import UNSERVED
from sinkstream.registry import import_folder

import_folder(__name__, __path__)
FAMILIES = tuple(FAMILY)

__all__ = [
    "ATTENTION",
    "BOUNDED_ROPE_TYPES",
    "FAMILIES",
    "FAMILY",
    "ROPE_TYPES",
    "UNSERVED",
    "Family",
    "ModelSpec",
    "SlidingLayers",
    "check_policy",
    "describe",
]
