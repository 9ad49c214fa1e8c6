"""Two norms of one residual and a linear layer after each, their weights packed one after the other: several streams.

In a GPT-NeoX layer with parallel residual queries, keys, values and the up-projection are such a pair. One kernel
computes both norms of every stream, another streams all rows of the packed weight. One stream does not take this op:
its up-projection runs beside attention, `attention_linear`.
"""

import torch

from sinkstream.kernels.config import MAX_STREAMS, MultiStreamConfig
from sinkstream.kernels.multi_stream_linear import multi_stream_linear, norm_rows
from sinkstream.kernels.norm_linear import check_inputs, norm_linear_twin
from sinkstream.kernels.runtime import FLOAT_DTYPES, check_tensor, use_triton

NormTensors = tuple[torch.Tensor, torch.Tensor | None]  # weight (hidden,), and bias (hidden,)


def norm_linear_pair(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    norms: tuple[NormTensors, NormTensors],
    out: torch.Tensor,
    second_out: torch.Tensor,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    norm: str = "layer",
    activation: str = "gelu",
    config: MultiStreamConfig | None = None,
    pdl: bool = False,
    implementation: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out = W₁ · norm₁(x) + b₁ and second_out = act(W₂ · norm₂(x) + b₂), with weight = [W₁; W₂] and bias = [b₁; b₂].

    Parameters
    ----------
    x : Tensor, (streams, hidden)
        Of 2 to 16 streams, float16, bfloat16 or float32.
    weight : Tensor, (rows of both, hidden)
    norms : pair of (weight, bias), each (hidden,)
        Both with a bias, or none.
    out, second_out : Tensor, (streams, rows of one)
        Written in place.
    bias : Tensor, (rows of both,), optional
    eps, norm
        As in `norm_linear`, of both norms.
    activation : {"none", "gelu"}
        Of the second layer.
    config, pdl, implementation
        As in `norm_linear`; the rows of the first layer are a multiple of `MultiStreamConfig.rows`.

    Returns
    -------
    out, second_out : Tensor

    Raises
    ------
    ValueError
        Naming the argument that the op cannot serve and what is accepted.
    """
    if activation not in ("none", "gelu"):
        raise ValueError(f"activation={activation!r} of a pair; accepted: none, gelu")
    first, second = norms
    if (first[1] is None) != (second[1] is None):
        raise ValueError("norms with one bias; accepted: both with a bias, or none")
    for weights, biases in norms:
        check_inputs(x, weight, weights, biases, bias, norm, activation)
    streams, plain = len(x), out.shape[1]
    if not 1 < streams <= MAX_STREAMS:
        raise ValueError(f"{streams} streams of a pair; accepted: 2 to {MAX_STREAMS}")
    check_tensor("out", out, (streams, None), dtypes=FLOAT_DTYPES, device=x.device, contiguous=False)
    rest = (streams, len(weight) - plain)
    check_tensor("second_out", second_out, rest, dtypes=FLOAT_DTYPES, device=x.device, contiguous=False)
    if not use_triton(implementation, x):
        parts = (weight[:plain], weight[plain:]), (None, None) if bias is None else (bias[:plain], bias[plain:])
        out.copy_(norm_linear_twin(x, parts[0][0], *first, parts[1][0], eps, norm, "none"))
        second_out.copy_(norm_linear_twin(x, parts[0][1], *second, parts[1][1], eps, norm, activation))
        return out, second_out
    normed = norm_rows(x, *first, eps, norm, weight.dtype, pdl, second)
    multi_stream_linear(
        normed[0], weight, out, second=(normed[1], second_out), bias=bias, activation=activation, config=config, pdl=pdl
    )  # fmt: skip
    return out, second_out
