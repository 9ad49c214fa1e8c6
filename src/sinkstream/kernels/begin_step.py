"""The beginning of a step: its row of the plan, its tokens and their embeddings, the rotations of its query.

The plan holds the scalars of many steps. A cursor on the device says which of its rows is next, and a negative token id
means the likeliest token of the logits, so that one captured graph can run step after step without the host. The ids
are written back to the row, where the host can read them later.
"""

import torch

from sinkstream.kernels.layout import DRAWN, FIELDS, FRAME_POSITION, IDLE, NO_TOKEN, TOKEN, WINDOW_POSITION
from sinkstream.kernels.likeliest import Tiles, likeliest_of_tiles
from sinkstream.kernels.runtime import (
    FLOAT_DTYPES,
    check_tensor,
    gdc_wait,
    jit,
    launch,
    tl,
    triton,
    use_triton,
)
from sinkstream.kernels.sample import Draws


@jit
def _begin_step_kernel(
    token_ptr, value_ptr, index_ptr, plan_ptr, cursor_ptr, embedding_ptr, freq_ptr, scalar_ptr, hidden_ptr, rope_ptr,
    count_ptr, tiles, vocab, rows, plan_stride, hidden, factor, HALF: tl.constexpr, BLOCK: tl.constexpr,
    ANGLES: tl.constexpr, SIZE: tl.constexpr, FIELDS: tl.constexpr, TOKEN: tl.constexpr, POSITIONS: tl.constexpr,
    DRAWN: tl.constexpr, COUNTS: tl.constexpr, IDLE: tl.constexpr, NO_TOKEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a stream. Angles are formed in float64. DRAWN: what marks drawn streams; 0: there are none.

    Before its wait it may overlap with the kernel that fills the tiles, which reads nothing that is written until then:
    a draw reads the cursor.
    """
    stream = tl.program_id(0)
    at = (tl.load(cursor_ptr + stream) + 1) % rows
    tl.debug_barrier()  # all threads have read the cursor before one of them moves it
    if not DRAWN:
        tl.store(cursor_ptr + stream, at)
    source = plan_ptr + at * plan_stride + stream * FIELDS
    field = tl.arange(0, FIELDS)
    planned = tl.load(source + field)
    pair = tl.arange(0, ANGLES)
    freq = tl.load(freq_ptr + pair, mask=pair < HALF, other=0.0)
    for frame in tl.static_range(2):
        angle = tl.load(source + POSITIONS + frame).to(tl.float64) * freq
        place = rope_ptr + (stream * 2 + frame) * 2 * HALF + pair
        tl.store(place, tl.cos(angle).to(tl.float32) * factor, mask=pair < HALF)
        tl.store(place + HALF, tl.sin(angle).to(tl.float32) * factor, mask=pair < HALF)
    if PDL:
        gdc_wait()
    if DRAWN:
        tl.store(cursor_ptr + stream, at)
    given = tl.load(token_ptr + stream).to(tl.int64)
    token = given
    noted = given
    if given < 0:
        top, token = likeliest_of_tiles(value_ptr, index_ptr, stream, tiles, vocab, SIZE)
        noted = token
        if DRAWN:  # noqa: SIM102  (known when the kernel is compiled)
            if given == DRAWN:
                noted = tl.where((top == float("inf")) | (top == -float("inf")), NO_TOKEN, token)
                if COUNTS:  # noqa: SIM102
                    if tl.sum(tl.where(field == TOKEN, planned, 0), 0) != IDLE:
                        counter = count_ptr + stream.to(tl.int64) * vocab + token
                        count = tl.load(counter)
                        tl.store(counter, tl.where((count & 16383) < 16383, count + 1, count))
    tl.store(source + TOKEN, noted.to(tl.int32))
    tl.store(scalar_ptr + stream * FIELDS + field, tl.where(field == TOKEN, token.to(tl.int32), planned))
    columns = tl.arange(0, BLOCK)
    row = tl.load(embedding_ptr + token * hidden + columns, mask=columns < hidden, other=0.0)
    tl.store(hidden_ptr + stream * hidden + columns, row.to(hidden_ptr.dtype.element_ty), mask=columns < hidden)


def begin_step(
    tokens: torch.Tensor,
    logits: torch.Tensor,
    plan: torch.Tensor,
    cursor: torch.Tensor,
    embedding: torch.Tensor,
    inv_freq: torch.Tensor,
    *,
    factor: float = 1.0,
    tiles: Tiles | None = None,
    draws: Draws | None = None,
    scalars: torch.Tensor | None = None,
    hidden: torch.Tensor | None = None,
    rope: torch.Tensor | None = None,
    implementation: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Move the cursor, choose tokens, copy that row of the plan, gather embeddings, compute the angles of both frames.

    Parameters
    ----------
    tokens : Tensor, (streams,), int64 or int32
        A negative one means the likeliest token of the stream's logits, as in `likeliest`.
    logits : Tensor, (streams, vocab), float32
        Of the step before; not read where the token is given.
    plan : Tensor, (rows, streams, 8), int32
        Scalars of the coming steps, see `sinkstream.kernels.layout`; after the last row comes the first. The token ids
        are written to the row. Rows may be strided.
    cursor : Tensor, (streams,), int64
        Row of the step before, -1 before the first. All values are alike: each stream moves its own.
    embedding : Tensor, (vocab, width)
    inv_freq : Tensor, (rotary_dim / 2,), float64
        Radians per position.
    factor : float
        What rotated dimensions are multiplied by (yarn).
    tiles : Tiles, optional
        Room for the search, for these logits; default: a new one.
    draws : Draws, optional
        How streams that are told `DRAWN` draw; needed if there is one.
    scalars : Tensor, (streams, 8), int32, optional
        Written in place, with the token ids filled in.
    hidden : Tensor, (streams, width), optional
        Written in place; default: a new one of the embedding's dtype.
    rope : Tensor, (streams, 2, 2, rotary_dim / 2), float32, optional

    Returns
    -------
    scalars, hidden, rope : Tensor

    Raises
    ------
    ValueError
        Naming the argument that the op cannot serve and what is accepted.
    """
    streams, device, width, half = len(tokens), tokens.device, embedding.shape[1], len(inv_freq)
    check_tensor("tokens", tokens, (None,), dtypes=(torch.int64, torch.int32), device=device)
    check_tensor("logits", logits, (streams, None), dtypes=(torch.float32,), device=device, contiguous=False)
    check_tensor("plan", plan, (None, streams, FIELDS), dtypes=(torch.int32,), device=device, contiguous=False)
    check_tensor("cursor", cursor, (streams,), dtypes=(torch.int64,), device=device)
    check_tensor("embedding", embedding, (None, None), dtypes=FLOAT_DTYPES, device=device)
    check_tensor("inv_freq", inv_freq, (None,), dtypes=(torch.float64,), device=device)
    if scalars is None:
        scalars = torch.empty(streams, FIELDS, dtype=torch.int32, device=device)
    if hidden is None:
        hidden = torch.empty(streams, width, dtype=embedding.dtype, device=device)
    if rope is None:
        rope = torch.empty(streams, 2, 2, half, device=device)
    check_tensor("scalars", scalars, (streams, FIELDS), dtypes=(torch.int32,), device=device)
    check_tensor("hidden", hidden, (streams, width), dtypes=FLOAT_DTYPES, device=device)
    check_tensor("rope", rope, (streams, 2, 2, half), dtypes=(torch.float32,), device=device)
    if not use_triton(implementation, tokens):
        read_plan(tokens, logits, plan, cursor, scalars, draws)
        hidden.copy_(embedding[scalars[:, TOKEN].long()])
        return scalars, hidden, rope.copy_(rope_twin(scalars, inv_freq, factor))
    counts = draws.table.counts if draws is not None and draws.kernels.tables else None
    if draws is None:
        tiles = Tiles(streams, logits.shape[1], device) if tiles is None else tiles
        early = tiles.find(logits, tokens)
    else:
        tiles = draws.buffers.tiles
        early = draws.find(logits, tokens, plan, cursor)
    launch(
        _begin_step_kernel, (streams,), tokens, tiles.values, tiles.indices, plan, cursor, embedding, inv_freq,
        scalars, hidden, rope, plan if counts is None else counts, tiles.count, logits.shape[1], len(plan),
        plan.stride(0), width, factor, HALF=half, BLOCK=triton.next_power_of_2(width),
        ANGLES=triton.next_power_of_2(half),
        SIZE=triton.next_power_of_2(tiles.count), FIELDS=FIELDS, TOKEN=TOKEN, POSITIONS=WINDOW_POSITION,
        DRAWN=0 if draws is None else DRAWN, COUNTS=counts is not None, IDLE=IDLE, NO_TOKEN=NO_TOKEN, num_warps=4,
        pdl=early,
    )  # fmt: skip
    return scalars, hidden, rope


def read_plan(
    tokens: torch.Tensor,
    logits: torch.Tensor,
    plan: torch.Tensor,
    cursor: torch.Tensor,
    scalars: torch.Tensor,
    draws: Draws | None = None,
) -> None:
    """Move the cursor, choose tokens, fill `scalars` from its row of the plan and write the ids there; the twin."""
    cursor.add_(1).remainder_(len(plan))
    scalars.copy_(plan.index_select(0, cursor[:1])[0])
    found = torch.where(tokens < 0, logits.argmax(-1), tokens)
    noted = found
    if draws is not None:
        planned = scalars[:, TOKEN].long()
        drawn, told = draws.draw(logits, -1 - planned), tokens == DRAWN
        found = torch.where(told & (drawn >= 0), drawn, found)
        noted = torch.where(told & (drawn < 0), NO_TOKEN, found)
        if draws.kernels.tables:
            draws.table.note(found, told & (planned != IDLE))
    scalars[:, TOKEN] = noted
    plan.index_copy_(0, cursor[:1], scalars[None])
    scalars[:, TOKEN] = found


def rope_twin(scalars, inv_freq, factor) -> torch.Tensor:
    """Cosines and sines of both frames in plain PyTorch; angles in float64."""
    angle = scalars[:, WINDOW_POSITION : FRAME_POSITION + 1, None].to(torch.float64) * inv_freq
    return torch.stack([angle.cos(), angle.sin()], 2) * factor
