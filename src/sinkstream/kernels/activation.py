"""The activation between two products of a chunk: gelu, or SwiGLU of gate and up columns; one pass over memory."""

import torch
import torch.nn.functional as F

from sinkstream.kernels.chunks import activated
from sinkstream.kernels.runtime import FLOAT_DTYPES, check_tensor, jit, launch, tl, use_triton

ACTIVATIONS = ("gelu", "swiglu")
BLOCK = 2048  # outputs of one program


@jit
def _activation_kernel(
    x_ptr, y_ptr, x_stride, y_stride, width, GATED: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """Program (block of columns, row)."""
    columns, row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1).to(tl.int64)
    mask = columns < width
    x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = x
    if GATED:
        up = tl.load(x_ptr + row * x_stride + width + columns, mask=mask, other=0.0).to(tl.float32)
    y = activated(x, up, not GATED, GATED)
    tl.store(y_ptr + row * y_stride + columns, y.to(y_ptr.dtype.element_ty), mask=mask)


def activation(
    x: torch.Tensor, kind: str, *, out: torch.Tensor | None = None, implementation: str | None = None
) -> torch.Tensor:
    """gelu of every column, or ``silu(gate) * up``.

    Parameters
    ----------
    x : Tensor, (rows, width), or (rows, 2 * width) for "swiglu": all gate columns, then all up columns
        Rows may be strided.
    kind : {"gelu", "swiglu"}
    out : Tensor, (rows, width), optional
        Rows may be strided.
    implementation : {"auto", "triton", "torch"}, optional

    Returns
    -------
    Tensor, (rows, width)

    Raises
    ------
    ValueError
        Naming the argument that the op cannot serve and what is accepted.
    """
    if kind not in ACTIVATIONS:
        raise ValueError(f"activation {kind!r} is unknown; accepted: {', '.join(ACTIVATIONS)}")
    gated = kind == "swiglu"
    check_tensor("x", x, (None, None), dtypes=FLOAT_DTYPES, device=x.device, contiguous=False)
    if gated and x.shape[1] % 2:
        raise ValueError(f"x has {x.shape[1]} columns; accepted: an even number, as many gates as ups")
    shape = len(x), x.shape[1] // 2 if gated else x.shape[1]
    out = x.new_empty(shape) if out is None else out
    check_tensor("out", out, shape, dtypes=FLOAT_DTYPES, device=x.device, contiguous=False)
    if not use_triton(implementation, x):
        gate, up = x.chunk(2, -1) if gated else (x, x)
        return out.copy_(F.silu(gate) * up if gated else F.gelu(x))
    launch(
        _activation_kernel, (-(-shape[1] // BLOCK), shape[0]), x, out, x.stride(0), out.stride(0), shape[1],
        GATED=gated, BLOCK=BLOCK, num_warps=4, pdl=False,
    )  # fmt: skip
    return out
