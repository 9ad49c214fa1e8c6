"""Texts from files and directories, with errors that name the file and what is wrong with it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sinkstream.data.text import Text

TEXT_FIELD = "text"  # of the objects of a JSON file, unless another one is named
FORMATS = (".txt", ".md", ".json", ".jsonl", "any other text file", "a directory of such files")
FORM = "an object, or a list of strings or of objects"


def read_text(path: Path, field: str | None = None) -> Text:
    """Read a file, or all files of a directory, joined by empty lines.

    Parameters
    ----------
    path : Path
        Objects of a .json file and of the lines of a .jsonl file give one field each; any other file is text. Of a
        directory: all files in it and in its folders, sorted by path; names that begin with a dot are left out.
    field : str or None
        Default: "text".

    Raises
    ------
    ValueError
        Naming the file, if there is no text to be had from it.
    """
    if not path.exists():
        raise ValueError(f"text file {str(path)!r} does not exist")
    if not path.is_dir():
        if field is not None and not _has_fields(path):
            raise ValueError(f"text file {str(path)!r} has no fields; accepted: FILE.json:FIELD or FILE.jsonl:FIELD")
        return Text.of(_read(path, field), name=path.stem, source=_source(f"file {path.name}", field))
    files = sorted(_files_of(path), key=lambda file: file.relative_to(path).as_posix())
    if not files:
        raise ValueError(f"directory {str(path)!r} holds no text files (names with a leading dot are left out)")
    if field is not None and not any(_has_fields(file) for file in files):
        raise ValueError(f"directory {str(path)!r} holds no .json or .jsonl files, and field {field!r} is named")
    name = path.resolve().name
    source = _source(f"directory {name}, {len(files)} files", field)
    return Text.of("\n\n".join(_read(file, field) for file in files), name=name, source=source)


def _files_of(folder: Path) -> Iterator[Path]:
    """All files below a directory, in any order, but for hidden ones; links to directories are not followed."""
    for entry in folder.iterdir():
        if entry.name.startswith("."):
            continue
        if entry.is_dir() and not entry.is_symlink():
            yield from _files_of(entry)
        elif not entry.is_dir():
            yield entry


def _source(what: str, field: str | None) -> str:
    return what if field is None else f"{what}, field {field!r}"


def _has_fields(path: Path) -> bool:
    return path.suffix.lower() in (".json", ".jsonl")


def _read(path: Path, field: str | None) -> str:
    if not path.is_file():
        raise ValueError(f"text file {str(path)!r} is not a file")
    raw = _decode(path)
    if not _has_fields(path):
        return raw
    field = TEXT_FIELD if field is None else field
    parts = _parts_of_json(raw, path) if path.suffix.lower() == ".json" else _parts_of_lines(raw, path)
    return "\n\n".join(_field_of(part, field, path, where) for part, where in parts)


def _decode(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"text file {str(path)!r} cannot be read: {error.strerror}") from error
    if not content:
        raise ValueError(f"text file {str(path)!r} is empty")
    if b"\0" in content:
        raise ValueError(
            f"text file {str(path)!r} holds NUL bytes: it is binary, or not in UTF-8; accepted: text in UTF-8"
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"text file {str(path)!r} is binary or not in UTF-8: byte {error.start} is invalid; accepted: text in UTF-8"
        ) from error


def _parts_of_json(raw: str, path: Path) -> Iterator[tuple[Any, str]]:
    """The texts of a file, or what holds them, each with its place in words."""
    value = _parsed(raw, path, "")
    if not isinstance(value, list | dict):
        raise ValueError(f"text file {str(path)!r} has another form; accepted: {FORM}")
    if isinstance(value, dict):
        yield value, "its object"
    else:
        yield from ((part, f"entry {i}") for i, part in enumerate(value, 1))


def _parts_of_lines(raw: str, path: Path) -> Iterator[tuple[Any, str]]:
    for number, line in enumerate(raw.split("\n"), 1):
        if line.strip():
            yield _parsed(line, path, f": line {number}"), f"line {number}"


def _parsed(raw: str, path: Path, where: str) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"text file {str(path)!r}{where} is not valid JSON: {error}") from error


def _field_of(part: Any, field: str, path: Path, where: str) -> str:
    if isinstance(part, dict):
        if field not in part:
            names = ", ".join(name for name, value in part.items() if isinstance(value, str)) or "none that is text"
            raise ValueError(
                f"text file {str(path)!r}: {where} has no field {field!r}; its fields: {names} (FILE:FIELD)"
            )
        part = part[field]
        where = f"field {field!r} of {where}"
    if not isinstance(part, str):
        raise ValueError(f"text file {str(path)!r} has another form: {where} is no string; accepted: {FORM}")
    return part
