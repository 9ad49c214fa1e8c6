"""The rows of a plan, computed for all of its tokens at once, against one token after the other."""

import numpy as np
import pytest

from sinkstream.engine.geometry import Counters, Geometry, rows_ahead

TOKENS = 24
GEOMETRIES = [
    Geometry(sink=4, refresh=0, ring=13, original=False),
    Geometry(sink=2, refresh=3, ring=7, original=False),
    Geometry(sink=0, refresh=0, ring=5, original=True),
    Geometry(sink=4, refresh=0, ring=9, original=False, framed=6),
]


def case(geometry: Geometry, seed: int) -> tuple[Counters, list[int]]:
    """A stream at a random place, and the drops before its next tokens."""
    rng = np.random.default_rng(seed)
    counters = Counters(geometry, seen=int(rng.integers(0, 40)), sink=int(rng.integers(0, geometry.sink + 1)))
    counters.first_window += int(rng.integers(0, 6))
    counters.base, counters.pruned = int(rng.integers(0, 4)), bool(rng.integers(0, 2))
    return counters, rng.integers(0, 3, size=TOKENS).tolist()


@pytest.mark.parametrize("queries", [0, 4])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_rows_are_those_of_one_token_after_the_other(geometry, queries):
    streams, drops = zip(*(case(geometry, seed) for seed in range(60)))
    ahead, expected = [Counters(**vars(one)) for one in streams], []
    for before in zip(*drops):
        for one, drop in zip(streams, before):
            one.append(drop)
        expected.append([one.row(queries) for one in streams])
    assert rows_ahead(ahead, np.array(drops).T, queries).tolist() == expected
    assert ahead == list(streams)


def test_a_drop_one_token_late_would_show():
    streams, drops = zip(*(case(GEOMETRIES[0], seed) for seed in range(60)))
    before = np.array(drops).T
    rows = [rows_ahead([Counters(**vars(one)) for one in streams], d, 0) for d in (before, np.roll(before, 1, 0))]
    assert (rows[0] != rows[1]).any((0, 2)).sum() > 50
