"""A record that lacks a field which a table reads is refused by file and field, wherever the field stands."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sinkstream.records.pairs import Pairs
from sinkstream.report.documents import render_tables
from sinkstream.report.summary import write_summary

RESULTS = Path(__file__).resolve().parents[2] / "results"
KINDS = ("recall", "facts", "reply", "streameval")
ANYTHING = ("arguments", "environment", "model.shape")  # the first are kept as given; the others are checked elsewhere


def fields(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Places of all fields of a record; of a list those of its first entry."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if ".".join(map(str, path)) not in ANYTHING:
                yield (*path, name)
                yield from fields(inner, (*path, name))
    elif isinstance(value, list) and value:
        yield from fields(value[0], (*path, 0))


def smallest(kind: str) -> Path:
    """The smallest kept record of a kind."""
    found = [path for path in RESULTS.glob("recall/*.json") if f"sinkstream.{kind}/1" in path.read_text()[:60]]
    return min(found, key=lambda path: (path.stat().st_size, path.name))


@pytest.mark.parametrize("kind", KINDS)
def test_a_field_that_a_table_reads_is_missed_by_its_name(kind, tmp_path):
    path = Path(shutil.copy(smallest(kind), tmp_path))
    whole, refused = path.read_text(), 0
    places = list(fields(json.loads(whole)))
    assert len(places) > 40
    for place in places:
        content = json.loads(whole)
        part = content
        for name in place[:-1]:
            part = part[name]
        del part[place[-1]]
        path.write_text(json.dumps(content))
        try:
            write_summary(tmp_path, Pairs())
            render_tables(tmp_path, Pairs())
        except ValueError as error:
            refused += 1
            assert path.name in str(error) and str(place[0]) in str(error), place
    assert refused > 20, "control"
