"""The one entry: from what a user types after `--text` to a text."""

from pathlib import Path

from sinkstream.data import builtin, files, hub  # noqa: F401  (they register their texts, in this order)
from sinkstream.data.text import TEXTS, Text


def load_text(spec: str) -> Text:
    """The text of a name in `TEXTS`, or of a file.

    A file in UTF-8 is a text; a `.json` file (an object, or a list of objects or strings) and the lines of a `.jsonl`
    file (objects or strings) give their "text", or the field of ``FILE:FIELD``, joined by empty lines. Of a directory:
    all its files, sorted by path, joined likewise.

    Raises ValueError for an empty spec, an unknown name or field, a file that is missing, empty, binary or of another
    form, and for a text that cannot be had from the hub.
    """
    if not spec:
        raise ValueError(f"the text is empty; accepted: {', '.join(TEXTS)}, or a file: {', '.join(files.FORMATS)}")
    if spec in TEXTS:
        return TEXTS[spec]()
    path, field = Path(spec).expanduser(), None
    if not path.exists() and ":" in spec:
        file, _, field = spec.rpartition(":")
        path = Path(file).expanduser()
        if not field:
            raise ValueError(f"text {spec!r} names no field; accepted: FILE:FIELD")
    if not path.suffix and not path.exists():
        raise ValueError(f"unknown text {spec!r}; accepted: {', '.join(TEXTS)}, or a file: {', '.join(files.FORMATS)}")
    return files.read_text(path, field)
