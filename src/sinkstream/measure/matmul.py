"""Matrix products of a device: the rate that prompt figures are compared with, measured before they are."""

from dataclasses import asdict, dataclass

import torch

from sinkstream.measure.timing import timed

SIZE = {"cuda": 8192, "cpu": 1024}  # of square matrices
REPEATS = {"cuda": 20, "cpu": 3}  # products that are timed together
WARM_SEC = {"cuda": 2.0, "cpu": 0.0}  # of products first: clocks are what they are under load


@dataclass(frozen=True)
class MatmulRate:
    """The measured rate of matrix products of a device."""

    tflops: float  # 1e12 operations a second of a product of square matrices, additions and multiplications counted
    size: int  # rows of the matrices
    dtype: str

    def record(self) -> dict:
        """JSON-able."""
        return asdict(self)

    def milliseconds(self, flops: float) -> float:
        """Time that many operations take at this rate."""
        return flops / self.tflops / 1e9

    def __str__(self) -> str:
        return f"product of {self.size:,} x {self.size:,} {self.dtype}: {self.tflops:,.4g} TFLOP/s"


def matmul_rate(device: torch.device | str, dtype: torch.dtype, *, size: int | None = None) -> MatmulRate:
    """Measure the rate of matrix products in a dtype, on a GPU after two seconds of warm-up.

    `size` is the number of rows of the matrices, default: 8,192 on a GPU, 1,024 on a CPU.
    """
    device = torch.device(device)
    size, repeats = SIZE[device.type] if size is None else size, REPEATS[device.type]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = a @ b

    def products() -> None:
        for _ in range(repeats):
            torch.mm(a, b, out=out)

    warm = 0.0
    while warm < WARM_SEC[device.type]:
        warm += timed(products, device=device)[1]
    seconds = timed(products, device=device)[1] / repeats
    return MatmulRate(2 * size**3 / seconds / 1e12, size, str(dtype).removeprefix("torch."))
