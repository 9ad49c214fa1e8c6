"""Residual addition and norm in one kernel: x + delta, and one or two norms of the sum, which is read once.

A step of its own between the library's products, for a rung that fuses nothing else; `norm_linear` and
`linear_residual` fuse norm and residual with the products themselves.
"""

import torch

from sinkstream.kernels.runtime import FLOAT_DTYPES, check_tensor, jit, launch, tl, triton, use_triton

NormTensors = tuple[torch.Tensor, torch.Tensor | None]  # weight (hidden,), and bias (hidden,) of a LayerNorm


@jit
def _scaled(y, w_ptr, b_ptr, columns, mask, LAYER: tl.constexpr):
    """Weight and bias of a norm applied to the normalised sum."""
    y = y * tl.load(w_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    if LAYER:
        y += tl.load(b_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    return y


@jit
def _add_norm_kernel(
    x_ptr, delta_ptr, sum_ptr, w_ptr, b_ptr, y_ptr, w2_ptr, b2_ptr, y2_ptr, hidden, eps,
    LAYER: tl.constexpr, HAS_DELTA: tl.constexpr, TWO: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (stream)."""
    row, columns = tl.program_id(0).to(tl.int64) * hidden, tl.arange(0, BLOCK)
    mask = columns < hidden
    x = tl.load(x_ptr + row + columns, mask=mask, other=0.0)
    if HAS_DELTA:
        x = (x.to(tl.float32) + tl.load(delta_ptr + row + columns, mask=mask, other=0.0).to(tl.float32)).to(
            sum_ptr.dtype.element_ty
        )
    tl.store(sum_ptr + row + columns, x, mask=mask)
    wide = x.to(tl.float32)
    if LAYER:
        wide = tl.where(mask, wide - tl.sum(wide) / hidden, 0.0)
    y = wide * (1.0 / tl.sqrt(tl.sum(wide * wide) / hidden + eps))
    out = _scaled(y, w_ptr, b_ptr, columns, mask, LAYER)
    tl.store(y_ptr + row + columns, out.to(y_ptr.dtype.element_ty), mask=mask)
    if TWO:
        out = _scaled(y, w2_ptr, b2_ptr, columns, mask, LAYER)
        tl.store(y2_ptr + row + columns, out.to(y2_ptr.dtype.element_ty), mask=mask)


def add_norm(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    norm: NormTensors,
    second: NormTensors | None = None,
    *,
    eps: float,
    implementation: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sum of x and delta, rounded to x's dtype, and its norms.

    Parameters
    ----------
    x : Tensor, (streams, hidden)
        The residual stream.
    delta : Tensor, (streams, hidden), optional
        What is added; without it the sum is x.
    norm, second : (weight, bias), each (hidden,)
        A LayerNorm, or without a bias an RMSNorm; both of one kind and with the same `eps`.
    implementation : {"auto", "triton", "torch"}, optional

    Returns
    -------
    (sum, normed, normed by `second`) : Tensor, (streams, hidden) each
        Without `second` the last is the same as `normed`.

    Raises
    ------
    ValueError
        Naming the argument that the op cannot serve and what is accepted.
    """
    check_tensor("x", x, (None, None), dtypes=FLOAT_DTYPES, device=x.device)
    streams, hidden = x.shape
    if delta is not None:
        check_tensor("delta", delta, (streams, hidden), dtypes=FLOAT_DTYPES, device=x.device)
    norms = [norm] if second is None else [norm, second]
    for weight, bias in norms:
        check_tensor("norm weight", weight, (hidden,), dtypes=FLOAT_DTYPES, device=x.device)
        if bias is not None:
            check_tensor("norm bias", bias, (hidden,), dtypes=FLOAT_DTYPES, device=x.device)
    if len({bias is None for _, bias in norms}) > 1:
        raise ValueError("one norm has a bias and the other has none; accepted: two LayerNorms, or two RMSNorms")
    if not use_triton(implementation, x):
        return _twin(x, delta, norms, eps)
    total, outs = torch.empty_like(x), [torch.empty_like(x) for _ in norms]
    pairs = [(w, w if b is None else b) for w, b in norms]
    launch(
        _add_norm_kernel, (streams,), x, x if delta is None else delta, total, *pairs[0], outs[0], *pairs[-1], outs[-1],
        hidden, eps, LAYER=norm[1] is not None, HAS_DELTA=delta is not None, TWO=second is not None,
        BLOCK=triton.next_power_of_2(hidden), num_warps=8, pdl=False,
    )  # fmt: skip
    return total, outs[0], outs[-1]


def _twin(x, delta, norms, eps) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The twin of the kernel: plain PyTorch, norms in float32 (float64 for float64 inputs)."""
    total = x if delta is None else (x + delta).to(x.dtype)
    wide = total.to(torch.promote_types(x.dtype, torch.float32))
    if norms[0][1] is not None:
        wide = wide - wide.mean(-1, keepdim=True)
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    outs = [(normed * w if b is None else normed * w + b).to(x.dtype) for w, b in norms]
    return total, outs[0], outs[-1]
