"""The latest queries of a chunk, each kept where a step would keep it; and those kept before, in front of the chunk's.

Nothing that is launched depends on the host, so that a CUDA graph can hold it.
"""

import torch

from sinkstream.kernels.band import PAST, TOKENS, Band
from sinkstream.kernels.runtime import FLOAT_DTYPES, check_tensor, jit, launch, tl, triton, use_triton

ROWS = 16  # of one program


@jit(do_not_specialize=["places", "rows"])
def _keep_queries_kernel(
    kept_ptr, query_ptr, joined_ptr, band_ptr, kept_row, kept_head, query_row, query_head, places, rows,
    D: tl.constexpr, SIZE: tl.constexpr, TM: tl.constexpr, JOINS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (tile of places, the oldest query first, with JOINS then of the chunk's queries; query head)."""
    tokens, past, held = tl.load(band_ptr), tl.load(band_ptr + 1), tl.load(band_ptr + 6).to(tl.int64)
    head, row = tl.program_id(1).to(tl.int64), tl.program_id(0) * TM + tl.arange(0, TM)
    columns = tl.arange(0, SIZE)[None, :]
    wide, is_place = columns < D, row < places
    place = (past + row) % places
    mine = query_ptr + head * query_head + columns
    slot = kept_ptr + held * kept_row + head * kept_head + place.to(tl.int64)[:, None] * D + columns
    if JOINS:
        joined = joined_ptr + (head * (places + rows) + row)[:, None] * D + columns
        older = is_place[:, None] & wide
        tl.store(joined, tl.load(slot, mask=older, other=0.0), mask=older)
        own = ((row >= places) & (row - places < tokens))[:, None] & wide
        tl.store(joined, tl.load(mine + (row - places).to(tl.int64)[:, None] * query_row, mask=own), mask=own)
        tl.debug_barrier()
    latest = past + tokens - 1
    token = latest - (latest - place + places) % places - past  # the latest of every place, from the chunk's first on
    newer = (is_place & (token >= 0))[:, None] & wide
    tl.store(slot, tl.load(mine + token.to(tl.int64)[:, None] * query_row, mask=newer), mask=newer)


def keep_queries(kept: torch.Tensor, queries: torch.Tensor, band: Band, *, implementation: str | None = None) -> None:
    """Keep the latest queries of a chunk.

    Parameters
    ----------
    kept : Tensor, (rows, query_heads, places, head_dim)
        Row `band.row` is written in place: the query of token t of the stream in place ``t % places``. Rows and heads
        may be strided.
    queries : Tensor, (tokens, query_heads, head_dim)
        At their window positions; padding, if any, comes last. May be strided, but for the last axis.
    band : Band
        Of these tokens.
    implementation : {"auto", "triton", "torch"}, optional

    Raises
    ------
    ValueError
        Naming the argument that the op cannot serve and what is accepted.
    """
    if _checked(kept, queries, implementation):
        _launch(kept, queries, band, None)
    else:
        _keep_twin(kept, queries, band)


def join_queries(
    kept: torch.Tensor, queries: torch.Tensor, band: Band, *, implementation: str | None = None
) -> torch.Tensor:
    """As `keep_queries`; returns those kept before, the oldest first, and behind them the chunk's.

    Returns
    -------
    Tensor, (query_heads, places + tokens, head_dim)
        Behind the chunk's tokens nothing is written.
    """
    if not _checked(kept, queries, implementation):
        places = kept.shape[2]
        order = (band.table[PAST].long() + torch.arange(places, device=kept.device)) % places
        older = kept.index_select(0, band.device_row)[0].index_select(1, order)
        joined = torch.cat([older, queries.transpose(0, 1)], 1)
        _keep_twin(kept, queries, band)
        return joined
    joined = queries.new_empty(queries.shape[1], kept.shape[2] + len(queries), queries.shape[2])
    _launch(kept, queries, band, joined)
    return joined


def _checked(kept: torch.Tensor, queries: torch.Tensor, implementation: str | None) -> bool:
    """Check the arguments; whether the kernel moves them."""
    _, heads, dim = queries.shape
    dtypes = (*FLOAT_DTYPES, torch.float64)
    check_tensor("queries", queries, (None, heads, dim), dtypes=dtypes, device=kept.device, contiguous=False)
    shape = (None, heads, None, dim)
    check_tensor("kept", kept, shape, dtypes=(queries.dtype,), device=queries.device, contiguous=False)
    if not kept.shape[2]:
        raise ValueError("kept has no place; accepted: at least one")
    return use_triton(implementation, kept) and kept.dtype in FLOAT_DTYPES


def _launch(kept: torch.Tensor, queries: torch.Tensor, band: Band, joined: torch.Tensor | None) -> None:
    (rows, heads, dim), places = queries.shape, kept.shape[2]
    assert kept.stride(2) == dim, "the places of a head are contiguous"
    count = places if joined is None else places + rows
    launch(
        _keep_queries_kernel, (-(-count // ROWS), heads), kept, queries, kept if joined is None else joined,
        band.table, *kept.stride()[:2], *queries.stride()[:2], places, rows, D=dim, SIZE=triton.next_power_of_2(dim),
        TM=ROWS, JOINS=joined is not None, num_warps=4, pdl=False,
    )  # fmt: skip


def _keep_twin(kept: torch.Tensor, queries: torch.Tensor, band: Band) -> None:
    """The twin of the kernel."""
    past, places, row = band.table[PAST].long(), kept.shape[2], band.device_row
    latest = past + band.table[TOKENS] - 1
    token = latest - (latest - torch.arange(places, device=kept.device)) % places - past  # the latest of every place
    new, older = queries.index_select(0, token.clamp(min=0)).transpose(0, 1), kept.index_select(0, row)[0]
    kept.index_copy_(0, row, torch.where((token >= 0)[:, None], new, older)[None])
