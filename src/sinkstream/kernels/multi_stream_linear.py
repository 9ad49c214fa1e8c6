"""Linear layers of several streams: the matrix units multiply every weight, read once, by the inputs of all streams.

One stream takes a single kernel for norm and product; several streams take two kernels. The first computes the norms,
one program a stream. The programs of the second stream tiles of weight rows through a pipeline of shared-memory stages,
column chunk by column chunk, along with the chunks of all inputs. Each part of a chunk is multiplied by warps of its
own: in the sum of one warp every product waits for the one before, which takes longer than reading the weights. The
epilogue adds the parts up and applies bias, activation and residual. With `MultiStreamConfig.held` another kernel keeps
the inputs in registers, so that whole weight rows are in flight before it waits for the kernel that computes them.
"""

import torch

from sinkstream.kernels.chunks import check_weight
from sinkstream.kernels.config import MAX_STREAMS, MultiStreamConfig, default_multi_stream, stream_columns
from sinkstream.kernels.multi_stream_held import multi_stream_held_kernel
from sinkstream.kernels.multi_stream_kernel import multi_stream_linear_kernel, norm_rows_kernel
from sinkstream.kernels.runtime import (
    NO_PREFETCH,
    Prefetch,
    dot_kind,
    even_programs,
    launch,
    multiprocessors,
    shared_bytes,
)


def refuse_early(streams: int, pdl: bool) -> None:
    """Refuse `pdl` where a library product serves the streams. Raises ValueError."""
    if pdl:
        raise ValueError(f"pdl=True with {streams} streams; accepted: at most {MAX_STREAMS}")


def norm_rows(x, norm_weight, norm_bias, eps, norm, dtype, pdl, second=None) -> torch.Tensor:
    """The norm of every stream, (streams, hidden) of `dtype`; arguments as in `norm_linear`, which checks them.

    With `second`, the weight and bias of another norm of the same kind, both: (2, streams, hidden).
    """
    streams, hidden = x.shape
    first = (norm_weight, norm_weight if norm_bias is None else norm_bias)
    other = first if second is None else (second[0], second[0] if second[1] is None else second[1])
    norms = 1 if second is None else 2
    out = torch.empty(norms, streams, hidden, dtype=dtype, device=x.device)
    launch(
        norm_rows_kernel, (streams, norms), x, *first, *other, out,
        x.stride(0), eps, K=hidden, BK=1024, LAYER=norm == "layer", HAS_BETA=norm_bias is not None, num_warps=4,
        pdl=pdl,
    )  # fmt: skip
    return out[0] if second is None else out


def multi_stream_linear(
    a: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    *,
    f: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    activation: str = "none",
    second: tuple[torch.Tensor, torch.Tensor] | None = None,
    config: MultiStreamConfig | None = None,
    prefetch: Prefetch = NO_PREFETCH,
    pdl: bool = False,
) -> torch.Tensor:
    """out = act(weight · [a, f] + bias) + residual for all streams; arguments as in `norm_linear`, `linear_residual`.

    Parameters
    ----------
    second : (inputs, outputs), optional
        Of a second layer, as wide, whose rows follow those of the first in `weight` and `bias`. Then the activation is
        that of the second layer alone, and there is no residual.

    Raises
    ------
    ValueError
        If there are more streams than one tile holds, or the weight is not in half precision or not aligned, or a tile
        would have rows of both layers, or the kernel that holds its inputs does not serve the product.
    """
    (streams, n), gated = a.shape, activation == "swiglu"
    plain, rows = out.shape[1], out.shape[1] + (0 if second is None else second[1].shape[1])
    if streams > MAX_STREAMS:
        raise ValueError(f"{streams} streams; accepted by the kernel: at most {MAX_STREAMS}")
    if config is None:
        config = default_multi_stream(rows, gated, streams, shared_bytes(a.device), multiprocessors(a.device))
    if second is not None and plain % config.rows:
        raise ValueError(f"rows={config.rows} in the configuration; accepted: a divisor of the first layer's {plain}")
    for part in (a, f):
        if part is not None:
            check_weight(weight, part.shape[1])
    if config.held:
        if f is not None or second is not None or activation != "none":
            raise ValueError("held=True in the configuration; accepted: for one input, one layer and no activation")
        return _held(a, weight, out, bias, residual, config, prefetch, pdl)
    other, z = (a if f is None else f, out) if second is None else second
    programs = even_programs(-(-rows // config.rows), multiprocessors(a.device) * config.per_sm)
    launch(
        multi_stream_linear_kernel, (programs,),
        a, other, weight, weight if bias is None else bias, a if residual is None else residual, out, z,
        rows, streams, a.stride(0), other.stride(0), weight.stride(0), 0 if residual is None else residual.stride(0),
        out.stride(0), z.stride(0), plain, config.ahead,
        *prefetch.arguments(weight, programs),
        KA=n, KF=0 if f is None else f.shape[1], BN=config.rows, BK=config.columns, S=stream_columns(streams, config),
        PARTS=config.parts, PAIR=second is not None, ACT=activation == "gelu", GATED=gated, HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None, EVEN=rows % config.rows == 0, EVICT="evict_first", STAGES=config.stages,
        KIND=dot_kind(weight.dtype), LATE=config.late, NEXT=bool(prefetch), num_warps=config.warps, pdl=pdl,
    )  # fmt: skip
    return out


def _held(a, weight, out, bias, residual, config, prefetch, pdl) -> torch.Tensor:
    """`multi_stream_linear` with inputs that stay with a program."""
    (streams, n), rows = a.shape, out.shape[1]
    programs = even_programs(-(-rows // config.rows), multiprocessors(a.device) * config.per_sm)
    launch(
        multi_stream_held_kernel, (programs,), a, weight, weight if bias is None else bias,
        a if residual is None else residual, out, rows, streams, a.stride(0), weight.stride(0),
        0 if residual is None else residual.stride(0), out.stride(0), *prefetch.arguments(weight, programs),
        K=n, BN=config.rows, BK=config.columns, S=stream_columns(streams, config), PARTS=config.parts,
        HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, EVEN=rows % config.rows == 0,
        EVICT="evict_first", STAGES=config.stages, KIND=dot_kind(weight.dtype), LATE=config.late, NEXT=bool(prefetch),
        num_warps=config.warps, pdl=pdl,
    )  # fmt: skip
    return out
