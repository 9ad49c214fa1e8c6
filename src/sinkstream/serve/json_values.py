"""Values of JSON that a client or a model has written: what no template, tokenizer or file can take is refused."""

from collections.abc import Iterable, Iterator
from typing import Any

from sinkstream.records.json_files import parse_json

DEEPEST = 100  # levels of a value


def parsed(text: str) -> Any:
    """The value of a JSON text. Raises ValueError, also as `check_value`."""
    value = parse_json(text)
    check_value(value)
    return value


def check_value(value: Any) -> None:
    """Raise ValueError for half of a surrogate pair, and for a value that is nested deeper than `DEEPEST` levels.

    A tokenizer makes nothing of the one. Templates, digests and the file of a session go down to the innermost value,
    one call of a function for each level.
    """
    level = [value]
    for _ in range(DEEPEST):
        if not all(map(_is_unicode, _texts(level))):
            raise ValueError("holds half of a surrogate pair; accepted: Unicode text")
        level = [inner for one in level for inner in _inner(one)]
        if not level:
            return
    raise ValueError(f"is nested deeper than {DEEPEST} levels; accepted: less")


def _texts(values: Iterable[Any]) -> Iterator[str]:
    """Those of the values that are texts, and names of fields."""
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            yield from (name for name in value if isinstance(name, str))


def _inner(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
