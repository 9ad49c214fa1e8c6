"""Texts from files, with errors that name the file and what is wrong with it."""

import json
from pathlib import Path
from typing import Any

from sinkstream.data.text import Text

SUFFIXES = (".txt", ".json")


def read_text(path: Path) -> Text:
    """Read a .txt or .json file. Raises ValueError, naming the file, if there is no text to be had from it."""
    suffix = path.suffix.lower()
    if not path.exists():
        raise ValueError(f"text file {str(path)!r} does not exist")
    if not path.is_file():
        raise ValueError(f"text file {str(path)!r} is not a file")
    if suffix not in SUFFIXES:
        raise ValueError(f"text file {str(path)!r} has the suffix {path.suffix!r}; accepted: {', '.join(SUFFIXES)}")
    raw = _decode(path)
    text = raw if suffix == ".txt" else _text_of_json(raw, path)
    return Text.of(text, name=path.stem, source=f"file {path.name}")


def _decode(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"text file {str(path)!r} cannot be read: {error.strerror}") from error
    if not content:
        raise ValueError(f"text file {str(path)!r} is empty")
    if b"\0" in content:
        raise ValueError(f"text file {str(path)!r} holds NUL bytes: it is binary, or not in UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"text file {str(path)!r} is binary or not in UTF-8: byte {error.start} is invalid") from error


def _text_of_json(raw: str, path: Path) -> str:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"text file {str(path)!r} is not valid JSON: {error}") from error
    parts = value if isinstance(value, list) else [value]
    texts: list[Any] = [part.get("text") if isinstance(part, dict) else part for part in parts]
    if isinstance(value, str) or not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"text file {str(path)!r} has another form; accepted: an object with a string under 'text', "
            "or a list of strings or of such objects"
        )
    return "\n\n".join(texts)
