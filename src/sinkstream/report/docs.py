"""Generated parts of documents: the text between two markers in a Markdown file is replaced, the rest is untouched.

<!-- generated:NAME -->
...
<!-- /generated -->
"""

import re
from collections.abc import Mapping
from pathlib import Path

from sinkstream.records.files import write_atomically

_SECTION = re.compile(
    r"(?P<open>^<!-- generated:(?P<name>[\w.-]+) -->\n)"
    r"(?P<body>(?:(?!^<!-- generated:).)*?)"
    r"(?P<close>^<!-- /generated -->)",
    flags=re.MULTILINE | re.DOTALL,
)
_OPEN = re.compile(r"^<!-- generated:([\w.-]+) -->$", flags=re.MULTILINE)


def generated_names(path: Path | str) -> list[str]:
    """Names of the generated sections of a document, in order.

    Raises ValueError: the file does not exist, a section is not closed, or a name occurs twice.
    """
    return [found["name"] for found in _sections(Path(path))[1]]


def update_document(path: Path | str, sections: Mapping[str, str], *, check: bool = False) -> list[str]:
    """Bring the generated sections of a document up to date; returns the names of those that were not.

    `sections` is name -> Markdown that belongs between the markers; names that are not given keep their text. With
    `check` nothing is written.

    Raises ValueError: the document is malformed (see `generated_names`) or has no section of a given name.
    """
    path = Path(path)
    text, found = _sections(path)
    names = [section["name"] for section in found]
    for name in sections:
        if name not in names:
            raise ValueError(f"{path}: there is no section {name!r}; it has: {', '.join(names) or 'none'}")
    wanted = {name: f"\n{body.strip()}\n\n" for name, body in sections.items()}
    stale = [s["name"] for s in found if s["name"] in wanted and s["body"] != wanted[s["name"]]]
    if stale and not check:
        write_atomically(path, _SECTION.sub(lambda s: s["open"] + wanted.get(s["name"], s["body"]) + s["close"], text))
    return stale


def _sections(path: Path) -> tuple[str, list[re.Match]]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not in UTF-8: byte {error.start} is invalid") from error
    found = list(_SECTION.finditer(text))
    names = [section["name"] for section in found]
    opened = _OPEN.findall(text)
    if opened != names:
        unclosed = next(name for name in opened if opened.count(name) > names.count(name))
        raise ValueError(f"{path}: section {unclosed!r} has no closing <!-- /generated --> of its own")
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise ValueError(f"{path}: section {repeated[0]!r} occurs twice")
    return text, found
