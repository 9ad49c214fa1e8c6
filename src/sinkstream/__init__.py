"""sinkstream: language models that stream for ever in a fixed amount of memory."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["EvictionPolicy", "StreamingCache", "__version__"]

_HOMES = {"StreamingCache": "sinkstream.cache", "EvictionPolicy": "sinkstream.policies"}


def __getattr__(name: str) -> Any:
    """Import the public classes when they are first asked for: torch and transformers are slow to load."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'sinkstream' has no attribute {name!r}")
