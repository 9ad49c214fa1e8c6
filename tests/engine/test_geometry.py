"""The rows of a plan, computed for all of its tokens at once, against one token after the other."""

import numpy as np
import pytest

from sinkstream.engine.geometry import Counters, Geometry

GEOMETRIES = [
    Geometry(sink=4, refresh=0, ring=13, original=False),
    Geometry(sink=2, refresh=3, ring=7, original=False),
    Geometry(sink=0, refresh=0, ring=5, original=True),
    Geometry(sink=4, refresh=0, ring=9, original=False, framed=6),
]


def case(geometry: Geometry, seed: int) -> tuple[Counters, np.ndarray]:
    """A stream at a random place, and the drops before its next tokens."""
    rng = np.random.default_rng(seed)
    counters = Counters(geometry, seen=int(rng.integers(0, 40)), sink=int(rng.integers(0, geometry.sink + 1)))
    counters.first_window += int(rng.integers(0, 6))
    counters.base, counters.pruned = int(rng.integers(0, 4)), bool(rng.integers(0, 2))
    return counters, rng.integers(0, 3, size=int(rng.integers(1, 25)))


@pytest.mark.parametrize("queries", [0, 4])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_rows_are_those_of_one_token_after_the_other(geometry, queries):
    for seed in range(40):
        one, drops = case(geometry, seed)
        all_at_once, expected = Counters(**vars(one)), []
        for drop in drops.tolist():
            one.append(drop)
            expected.append(one.row(queries))
        assert all_at_once.rows(drops, queries).tolist() == expected
        assert vars(all_at_once) == vars(one)


def test_a_drop_one_token_late_would_show():
    late = 0
    for seed in range(40):
        counters, drops = case(GEOMETRIES[0], seed)
        late += Counters(**vars(counters)).rows(drops, 0).tolist() != counters.rows(np.roll(drops, 1), 0).tolist()
    assert late > 30
