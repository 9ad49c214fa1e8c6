"""sinkstream: language models that stream for ever in a fixed amount of memory."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Engine", "EvictionPolicy", "StreamingCache", "__version__"]

_HOMES = {
    "Engine": "sinkstream.engine",
    "EvictionPolicy": "sinkstream.policies",
    "StreamingCache": "sinkstream.cache",
}

if TYPE_CHECKING:
    from sinkstream.cache import StreamingCache
    from sinkstream.engine import Engine
    from sinkstream.policies import EvictionPolicy


def __getattr__(name: str) -> Any:
    """Import a public class at its first use: torch and transformers take seconds to import."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'sinkstream' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
