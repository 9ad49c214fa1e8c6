"""What a step begins with: the embedding row of every token, and the rotations of its query in both frames."""

import torch

from sinkstream.engine.ops.runtime import (
    FLOAT_DTYPES,
    check_tensor,
    gdc_launch_dependents,
    gdc_wait,
    jit,
    launch,
    tl,
    triton,
    use_triton,
)


@jit
def _begin_step_kernel(
    token_ptr, scalar_ptr, embedding_ptr, freq_ptr, hidden_ptr, rope_ptr, hidden, factor,
    HALF: tl.constexpr, BLOCK: tl.constexpr, ANGLES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program a stream. Angles are formed in float64."""
    stream = tl.program_id(0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.load(token_ptr + stream).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    row = tl.load(embedding_ptr + token * hidden + columns, mask=columns < hidden, other=0.0)
    tl.store(hidden_ptr + stream * hidden + columns, row.to(hidden_ptr.dtype.element_ty), mask=columns < hidden)
    pair = tl.arange(0, ANGLES)
    freq = tl.load(freq_ptr + pair, mask=pair < HALF, other=0.0)
    for frame in tl.static_range(2):
        angle = tl.load(scalar_ptr + stream * 8 + 1 + frame).to(tl.float64) * freq
        place = rope_ptr + (stream * 2 + frame) * 2 * HALF + pair
        tl.store(place, tl.cos(angle).to(tl.float32) * factor, mask=pair < HALF)
        tl.store(place + HALF, tl.sin(angle).to(tl.float32) * factor, mask=pair < HALF)


def begin_step(
    tokens: torch.Tensor,
    scalars: torch.Tensor,
    embedding: torch.Tensor,
    inv_freq: torch.Tensor,
    *,
    factor: float = 1.0,
    hidden: torch.Tensor | None = None,
    rope: torch.Tensor | None = None,
    pdl: bool = False,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gather embeddings and compute the cosines and sines of both frames.

    Parameters
    ----------
    tokens : Tensor, (streams,), int64 or int32
    scalars : Tensor, (streams, 8), int32
        Columns 1 and 2: window and frame position of the query.
    embedding : Tensor, (vocab, width)
    inv_freq : Tensor, (rotary_dim / 2,), float64
        Radians per position.
    factor : float
        What rotated dimensions are multiplied by (yarn).
    hidden : Tensor, (streams, width), optional
        Written in place; default: a new one of the embedding's dtype.
    rope : Tensor, (streams, 2, 2, rotary_dim / 2), float32, optional

    Returns
    -------
    hidden, rope : Tensor

    Raises
    ------
    ValueError
        Naming the argument that the op cannot serve and what is accepted.
    """
    streams, device, width, half = len(tokens), tokens.device, embedding.shape[1], len(inv_freq)
    check_tensor("tokens", tokens, (None,), dtypes=(torch.int64, torch.int32), device=device)
    check_tensor("scalars", scalars, (streams, 8), dtypes=(torch.int32,), device=device)
    check_tensor("embedding", embedding, (None, None), dtypes=FLOAT_DTYPES, device=device)
    check_tensor("inv_freq", inv_freq, (None,), dtypes=(torch.float64,), device=device)
    if hidden is None:
        hidden = torch.empty(streams, width, dtype=embedding.dtype, device=device)
    if rope is None:
        rope = torch.empty(streams, 2, 2, half, device=device)
    check_tensor("hidden", hidden, (streams, width), dtypes=FLOAT_DTYPES, device=device)
    check_tensor("rope", rope, (streams, 2, 2, half), dtypes=(torch.float32,), device=device)
    if not use_triton(backend, tokens):
        row, angles = begin_step_twin(tokens, scalars, embedding, inv_freq, factor)
        return hidden.copy_(row), rope.copy_(angles)
    launch(
        _begin_step_kernel, (streams,), tokens, scalars, embedding, inv_freq, hidden, rope, width, factor,
        HALF=half, BLOCK=triton.next_power_of_2(width), ANGLES=triton.next_power_of_2(half), num_warps=4, pdl=pdl,
    )  # fmt: skip
    return hidden, rope


def begin_step_twin(tokens, scalars, embedding, inv_freq, factor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in plain PyTorch; angles in float64."""
    angle = scalars[:, 1:3, None].to(torch.float64) * inv_freq.to(torch.float64)
    return embedding[tokens.long()], torch.stack([angle.cos(), angle.sin()], 2) * factor
