"""A text that every Python brings along: the language reference that `help()` shows."""

import platform
from pydoc_data.topics import topics

from sinkstream.data.text import TEXTS, Text


@TEXTS.register("builtin")
def builtin() -> Text:
    """Python's own help topics (no network, about 465,000 characters; they differ a little between Python versions)."""
    joined = "\n\n".join(topics[name].strip() for name in sorted(topics))
    version = ".".join(platform.python_version_tuple()[:2])
    return Text.of(joined, name="builtin", source=f"pydoc_data.topics of Python {version}", default_tokens=4096)
