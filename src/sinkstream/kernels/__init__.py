"""The kernels of the decode step, each with a plain PyTorch twin of the same meaning.

Importing this package imports Triton if it is there; without it (or on a CPU) every op runs its twin.
"""

from sinkstream.kernels.attention_decode import Workspace, attention_decode
from sinkstream.kernels.attention_linear import attention_linear
from sinkstream.kernels.begin_step import begin_step
from sinkstream.kernels.config import (
    AttentionConfig,
    AttentionLinearConfig,
    LinearConfig,
)
from sinkstream.kernels.likeliest import likeliest
from sinkstream.kernels.linear_residual import linear_residual
from sinkstream.kernels.norm_linear import norm_linear
from sinkstream.kernels.runtime import NO_PREFETCH, Prefetch, set_implementation

__all__ = [
    "NO_PREFETCH",
    "AttentionConfig",
    "AttentionLinearConfig",
    "LinearConfig",
    "Prefetch",
    "Workspace",
    "attention_decode",
    "attention_linear",
    "begin_step",
    "likeliest",
    "linear_residual",
    "norm_linear",
    "set_implementation",
]
