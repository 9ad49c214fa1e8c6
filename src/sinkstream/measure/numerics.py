"""Switches that change figures: TF32, and which attention kernels scaled-dot-product attention may choose."""

from typing import Any

import torch


def set_numerics(*, tf32: bool, cudnn_attention: bool) -> None:
    """Allow or forbid TF32 in float32 matrix products and convolutions, and cuDNN's attention.

    cuDNN builds an execution plan for every new cache length, which costs tens of milliseconds a token while a cache
    grows. The protocol forbids cuDNN's attention, so that a growing cache is not charged for these plans.
    """
    cudnn: Any = torch.backends.cudnn  # which declares no `conv`
    torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
    cudnn.conv.fp32_precision = "tf32" if tf32 else "ieee"
    torch.backends.cuda.enable_cudnn_sdp(cudnn_attention)


def numerics() -> dict[str, Any]:
    """The switches as they are, for records."""
    return {
        "tf32": torch.backends.cuda.matmul.fp32_precision == "tf32",
        "cudnn_attention": torch.backends.cuda.cudnn_sdp_enabled(),
    }
