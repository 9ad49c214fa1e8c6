"""Shared by the tests of the ops: random inputs, a relative error, and how a test says that Triton cannot run."""

import pytest
import torch

from sinkstream.kernels import runtime

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RUNNABLE = runtime.triton is not None and (DEVICE.type == "cuda" or runtime.INTERPRETED)
NEEDS_TRITON = pytest.mark.skipif(
    not RUNNABLE,
    reason="the kernel itself is not run: triton has no release for this machine, or there is neither a CUDA device nor"
    " TRITON_INTERPRET=1",
)
IMPLEMENTATIONS = ["torch", pytest.param("triton", marks=NEEDS_TRITON)]
HALF = [torch.float16, torch.bfloat16]
EARLY = [  # weights of a linear kernel in flight before its wait for the previous kernel
    pytest.param({}, id="nothing"),
    pytest.param({"hold": True}, id="hold"),
    pytest.param({"fill": True}, id="fill"),
]
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.2e-2, torch.float32: 1e-5}


def on_implementations(cases: list, quick: int) -> list:
    """(case, implementation) for every implementation; the kernel on all cases but the first `quick` is marked slow."""
    kernels = [
        pytest.param(case, "triton", marks=[NEEDS_TRITON, *([pytest.mark.slow] if i >= quick else [])])
        for i, case in enumerate(cases)
    ]
    return [pytest.param(case, "torch") for case in cases] + kernels


def draw(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Normal random numbers on the test's device."""
    return (torch.randn(*shape) * scale).to(DEVICE, dtype)


def error(result: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference over the norm of the reference, in float64; NaN counts as infinite."""
    difference = (result.double() - reference.double()).norm() / reference.double().norm()
    return float(torch.nan_to_num(difference, nan=float("inf")))
