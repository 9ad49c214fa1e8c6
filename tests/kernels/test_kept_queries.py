"""The latest queries of a chunk, each where a step keeps it, and those before them in front of the chunk's."""

import numpy as np
import pytest
import torch
from ops_cases import DEVICE, draw, on_implementations

from sinkstream.kernels.band import SCALARS, Band
from sinkstream.kernels.kept_queries import join_queries, keep_queries

CASES = [(0, 3, 4, 5), (3, 9, 16, 5), (40, 5, 5, 21), (12, 1, 16, 5), (7, 40, 40, 33)]  # past, tokens, rows, places
ROW = 1


def case(past: int, tokens: int, rows: int, places: int, dtype: torch.dtype):
    """Queries kept in one layer of another tensor's axis, queries with padding that is no number, and the band."""
    kept, qkv = draw(3, 2, 3, places, 24, dtype=dtype)[:, 1], draw(rows, 3, 2, 24, dtype=dtype)
    qkv[tokens:] = float("nan")
    inv_freq = torch.ones(2, dtype=torch.float64, device=DEVICE)
    table = torch.zeros(SCALARS + 2 * rows, dtype=torch.int32, device=DEVICE)
    first = np.zeros(tokens, dtype=np.int64)
    return kept, qkv[:, :, 1], Band(first, None, inv_freq, past=past, length=past, row=ROW, table=table)


def expected(kept: torch.Tensor, queries: torch.Tensor, band: Band) -> torch.Tensor:
    """What is kept afterwards, token by token."""
    wanted = kept.clone()
    for i in range(band.tokens):
        wanted[ROW, :, (band.past + i) % kept.shape[2]] = queries[i]
    return wanted


@pytest.mark.parametrize(("sizes", "implementation"), on_implementations(CASES, quick=3))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_chunk_keeps_the_queries_that_steps_would_keep(sizes, dtype, implementation):
    kept, queries, band = case(*sizes, dtype)
    wanted = expected(kept, queries, band)
    assert not torch.equal(kept, wanted), "control"
    keep_queries(kept, queries, band, implementation=implementation)
    assert torch.equal(kept, wanted)


@pytest.mark.parametrize(("sizes", "implementation"), on_implementations(CASES, quick=3))
def test_queries_kept_before_stand_in_front_of_the_chunk_s_and_the_latest_are_kept(sizes, implementation):
    kept, queries, band = case(*sizes, torch.float16)
    before, wanted, places = kept.clone(), expected(kept, queries, band), kept.shape[2]
    joined = join_queries(kept, queries, band, implementation=implementation)
    assert torch.equal(kept, wanted)
    older = [before[ROW, :, (band.past + i) % places] for i in range(places)]
    parts = torch.stack([*older, *queries[: band.tokens]], 1)
    assert joined.is_contiguous() and joined.shape[1] == places + len(queries)
    assert torch.equal(joined[:, : places + band.tokens], parts)
    assert not torch.equal(joined[:, :places], kept[ROW]), "control: in the order of places, or those kept afterwards"


def test_mistakes_are_named():
    kept, queries, band = case(*CASES[0], torch.float32)
    with pytest.raises(ValueError, match="kept has shape"):
        keep_queries(kept[:, :2], queries, band)
    with pytest.raises(ValueError, match="kept has no place"):
        join_queries(kept[:, :, :0], queries, band)
