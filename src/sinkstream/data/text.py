"""A text with its origin and hash, and the registry of texts that have a name."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from sinkstream.registry import Registry


@dataclass(frozen=True)
class Text:
    """A text and where it came from."""

    name: str  # for people and tables; never a path of this machine
    text: str
    sha256: str  # hex, over the text in UTF-8
    source: str  # where it came from, in words
    default_tokens: int | None  # tokens of it that a run takes unless told otherwise; None takes all

    @classmethod
    def of(cls, text: str, *, name: str, source: str, default_tokens: int | None = None) -> "Text":
        """Check and hash `text`. Raises ValueError, naming the source, if it is empty or not text."""
        if not text.strip():
            raise ValueError(f"text {name!r} ({source}) is empty")
        if "\0" in text:
            raise ValueError(f"text {name!r} ({source}) holds NUL characters: it is binary, not text")
        try:
            raw = text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text {name!r} ({source}) holds half of a character pair at {error.start}") from error
        return cls(name, text, hashlib.sha256(raw).hexdigest(), source, default_tokens)


TEXTS: Registry[Callable[[], Text]] = Registry("text")
