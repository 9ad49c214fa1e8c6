"""The one entry: from what a user types after `--text` to a text."""

from pathlib import Path

from sinkstream.data import builtin, files, hub  # noqa: F401  (they register their texts, in this order)
from sinkstream.data.text import TEXTS, Text


def load_text(spec: str) -> Text:
    """The text of a name in `TEXTS`, or of a file.

    A file is `.txt` (UTF-8), or `.json`: an object with a "text", or a list of such objects or of strings, which are
    joined by empty lines.

    Raises ValueError for an unknown name or suffix, a file that is missing, empty, binary or of another form, and for
    a text that cannot be had from the hub.
    """
    if spec in TEXTS:
        return TEXTS[spec]()
    if not Path(spec).suffix and not Path(spec).exists():
        raise ValueError(
            f"unknown text {spec!r}; accepted: {', '.join(TEXTS)}, or a file {' or '.join(files.SUFFIXES)}"
        )
    return files.read_text(Path(spec).expanduser())
