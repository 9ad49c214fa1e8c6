"""Cosines and sines of the positions of a chunk, in one launch each, from integers that lie on the device."""

import torch

from sinkstream.kernels.runtime import check_tensor, jit, launch, tl, triton, use_triton

ROWS = 16  # of one program


@jit(do_not_specialize=["stride", "count"])
def _angles_kernel(
    position_ptr, less_ptr, freq_ptr, out_ptr, stride, count, factor, HALF: tl.constexpr, SIZE: tl.constexpr,
    TM: tl.constexpr, RISES: tl.constexpr, LESS: tl.constexpr, BACK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (tile of rows). RISES: one position is given, that of the first row; LESS: after a subtraction."""
    row, columns = tl.program_id(0) * TM + tl.arange(0, TM), tl.arange(0, SIZE)
    here = row < count
    position = tl.load(position_ptr + row * stride, mask=here, other=0)
    if LESS:
        position -= tl.load(less_ptr)
    if RISES:
        position += row
    frequency = tl.load(freq_ptr + columns, mask=columns < HALF, other=0.0)
    angle = position.to(tl.float64)[:, None] * frequency[None, :]
    cos, sin = tl.cos(angle).to(tl.float32) * factor, tl.sin(angle).to(tl.float32) * factor
    if BACK:
        sin = -sin
    place, mask = row[:, None] * (2 * HALF) + columns[None, :], here[:, None] & (columns < HALF)[None, :]
    tl.store(out_ptr + place, cos, mask=mask)
    tl.store(out_ptr + place + HALF, sin, mask=mask)


def angles_of(
    positions: torch.Tensor, inv_freq: torch.Tensor, *, back: bool = False, implementation: str | None = None
) -> torch.Tensor:
    """Cosine and sine of every angle, computed in float64.

    Parameters
    ----------
    positions : Tensor, (rows,), int32
        May be strided.
    inv_freq : Tensor, (rotary_dim / 2,), float64
        Radians per position.
    back : bool
        Whether to turn back: by the opposite angles.
    implementation : {"auto", "triton", "torch"}, optional

    Returns
    -------
    Tensor, (rows, 2, rotary_dim / 2), float32

    Raises
    ------
    ValueError
        Naming the argument that the op cannot serve and what is accepted.
    """
    _check(positions, inv_freq)
    if not use_triton(implementation, positions):
        return _angles_twin(positions, inv_freq, back, 1.0)
    return _launch(positions, None, inv_freq, len(positions), back, 1.0)


def angles_from(
    first: torch.Tensor,
    count: int,
    inv_freq: torch.Tensor,
    *,
    less: torch.Tensor | None = None,
    back: bool = False,
    factor: float = 1.0,
    implementation: str | None = None,
) -> torch.Tensor:
    """As `angles_of`, of positions in a row.

    Parameters
    ----------
    first : Tensor, (1,), int32
        The first of them.
    count : int
        How many.
    less : Tensor or None, (1,), int32
        How many positions earlier they begin.
    factor : float
        What cosines and sines are multiplied by.
    """
    for part in (first,) if less is None else (first, less):
        _check(part, inv_freq)
        if len(part) != 1:
            raise ValueError(f"{len(part)} first positions; accepted: 1")
    if not use_triton(implementation, first):
        begin = first if less is None else first - less
        return _angles_twin(begin + torch.arange(count, device=first.device), inv_freq, back, factor)
    return _launch(first, less, inv_freq, count, back, factor, rises=True)


def _check(positions: torch.Tensor, inv_freq: torch.Tensor) -> None:
    if positions.dim() != 1 or positions.dtype != torch.int32:
        raise ValueError(f"positions {tuple(positions.shape)}, {positions.dtype}; accepted: one axis, torch.int32")
    check_tensor("inv_freq", inv_freq, (None,), dtypes=(torch.float64,), device=positions.device)


def _launch(positions, less, inv_freq, count: int, back: bool, factor: float, rises: bool = False) -> torch.Tensor:
    half = len(inv_freq)
    out = torch.empty(count, 2, half, device=positions.device)
    if count:
        launch(
            _angles_kernel, (-(-count // ROWS),), positions, positions if less is None else less, inv_freq, out,
            0 if rises else positions.stride(0), count, factor, HALF=half, SIZE=triton.next_power_of_2(half), TM=ROWS,
            RISES=rises, LESS=less is not None, BACK=back, num_warps=4, pdl=False,
        )  # fmt: skip
    return out


def _angles_twin(positions: torch.Tensor, inv_freq: torch.Tensor, back: bool, factor: float) -> torch.Tensor:
    """The twin of the kernel."""
    angle = positions.double()[:, None] * inv_freq
    return torch.stack([angle.cos(), -angle.sin() if back else angle.sin()], 1).float() * factor
