"""JSON files of records: reading, the family that the `schema` field names, writing."""

import json
from collections.abc import Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NoReturn

from sinkstream.records.files import write_atomically


def read_json(path: Path) -> Any:
    """Content of a record's file. Raises ValueError, naming the file, if it is missing, cannot be read or no JSON."""
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: there is no such record") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from error


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError, also for NaN, and for values nested deeper than Python's stack."""
    try:
        return json.loads(text, parse_constant=_no_number)
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def as_text(content: Mapping[str, Any]) -> str:
    """Content of a record's file: one line a field."""
    line = partial(json.dumps, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return "{\n " + ",\n ".join(f"{json.dumps(name)}: {line(value)}" for name, value in content.items()) + "\n}\n"


def write_json(path: Path, content: Mapping[str, Any]) -> Path:
    """Write a record's file atomically; returns its path. Raises WriteError if it could not be written."""
    return write_atomically(path, as_text(content))


def check_schema(content: Any, schema: str, kind: str, where: str) -> None:
    """Raise ValueError, naming `where`, unless the `schema` field of `content` is this one ("family/version")."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{where}: not a {kind} record: expected a JSON object, got {type(content).__name__}")
    if content.get("schema") != schema:
        raise ValueError(f"{where}: field 'schema' is {content.get('schema')!r}; this version reads {schema!r}")


def family_of(path: Path) -> str | None:
    """The family that a file's `schema` field names ("sinkstream.run"); None if it has none.

    Raises ValueError as `read_json`: a record that was cut short is not passed over in silence.
    """
    try:
        at = path.stat()
    except OSError:
        return _family(path)  # which says what is wrong
    return _family_as_of(path, (at.st_ino, at.st_mtime_ns, at.st_size))


@lru_cache(maxsize=8192)
def _family_as_of(path: Path, state: tuple[int, ...]) -> str | None:
    """As `family_of`: each kind of record asks every file of a folder, so a file in the same state is parsed once."""
    return _family(path)


def _family(path: Path) -> str | None:
    content = read_json(path)
    return str(content["schema"]).partition("/")[0] if isinstance(content, Mapping) and "schema" in content else None
