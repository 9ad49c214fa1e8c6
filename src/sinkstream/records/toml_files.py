"""TOML files that people write: matrices and criteria."""

import tomllib
from pathlib import Path
from typing import Any


def read_toml(path: Path) -> dict[str, Any]:
    """Content of a TOML file.

    Raises ValueError, naming the file: a folder, a file that cannot be read, that is not in UTF-8, or no TOML, with the
    line.
    """
    if path.is_dir():
        found = sorted(file.name for file in path.glob("*.toml"))
        raise ValueError(f"{path} is a folder; accepted: a TOML file ({', '.join(found) or 'this folder has none'})")
    text = ""
    try:
        text = path.read_text(encoding="utf-8")
        return tomllib.loads(text)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not in UTF-8: byte {error.start} is invalid") from error
    except tomllib.TOMLDecodeError as error:
        last = f"at line {text.count(chr(10), 0, len(text.rstrip())) + 1}, the end of the document"
        raise ValueError(f"{path}: not valid TOML: {str(error).replace('at end of document', last)}") from error
