"""Figures of several runs that need per-token arrays: computed from the arrays, stored for checkouts without arrays.

``pairs.json`` beside the records holds them: `figures` has, by name of the figure and ids of its runs, plain JSON.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sinkstream.records.json_files import as_text, check_schema, read_json
from sinkstream.records.schema import check_keys

if TYPE_CHECKING:
    from sinkstream.records.records import Record

PAIRS_FILE = "pairs.json"
SCHEMA = "sinkstream.pairs/1"


class Pairs:
    """Figures of several runs; `kept` is name of a figure -> ids of its runs, separated by blanks -> value."""

    def __init__(self, kept: Mapping[str, Mapping[str, Any]] | None = None):
        self.kept = kept or {}
        self.used: dict[str, dict[str, Any]] = {}

    @classmethod
    def load(cls, folder: Path | str) -> "Pairs":
        """The stored figures of a folder; none without a ``pairs.json``. Raises ValueError for another kind of file."""
        path = Path(folder) / PAIRS_FILE
        if not path.is_file():
            return cls()
        content = read_json(path)
        check_schema(content, SCHEMA, "pairs", str(path))
        check_keys(content, {"figures": {}}, str(path))
        for name, kept in content["figures"].items():
            check_keys(kept, {}, str(path), f"figures.{name}.")
        return cls(content["figures"])

    def figure(self, name: str, runs: Sequence["Record"], compute: Callable[[], Any]) -> Any:
        """The figure `name` of these runs, as plain JSON: `compute()` if all have their arrays, else the kept value.

        Raises ValueError: the arrays of a run are absent, and the figure was not kept.
        """
        key = " ".join(run.id for run in runs)
        if all(run.has_arrays for run in runs):
            value = compute()
        elif key in self.kept.get(name, {}):
            value = self.kept[name][key]
        else:
            absent = next(run for run in runs if not run.has_arrays)
            raise ValueError(f"{absent.absent_arrays()}, and {PAIRS_FILE} does not hold {name!r} of {key}")
        self.used.setdefault(name, {})[key] = value
        return value

    def text(self) -> str:
        """Content of ``pairs.json`` with the figures that were asked for."""
        return as_text(
            {"schema": SCHEMA, "figures": {k: dict(sorted(v.items())) for k, v in sorted(self.used.items())}}
        )
