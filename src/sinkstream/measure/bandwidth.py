"""Memory bandwidth of a device: the ceiling that decode figures are compared with, measured before they are."""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch

from sinkstream.measure.timing import TokenClock, timed

COPY_BYTES = {"cuda": 1 << 31, "cpu": 1 << 28}  # far more than any cache holds
REPEATS = 11
WARM_SEC = {"cuda": 2.0, "cpu": 0.0}  # of copying first: what is compared with it is measured on a memory at work
KINDS = {"cuda": "device-to-device copy", "cpu": "host memcpy"}


@dataclass(frozen=True)
class Bandwidth:
    """The measured bandwidth of a device."""

    kind: str  # how: "device-to-device copy" on a GPU, "host memcpy" on a CPU
    copy_gbs: float  # GB/s (1e9 bytes) of a large copy, bytes read and bytes written both counted
    read_gbs: float  # GB/s of reading the same bytes in a reduction
    copy_bytes: int  # bytes of what was copied

    def record(self) -> dict:
        """JSON-able."""
        return asdict(self)

    def milliseconds(self, size: float) -> float:
        """Time to move that many bytes at the speed of the copy."""
        return size / self.copy_gbs / 1e6

    def __str__(self) -> str:
        return f"{self.kind} {self.copy_gbs:,.1f} GB/s, read {self.read_gbs:,.1f} GB/s"


def memory_bandwidth(device: torch.device | str, *, size: int | None = None, repeats: int = REPEATS) -> Bandwidth:
    """Measure the bandwidth of a device's memory: medians over `repeats` passes, on a GPU after two seconds of warm-up.

    `size` is the number of bytes to copy, default: 2 GiB on a GPU, 256 MiB on a CPU; twice that is allocated meanwhile.
    """
    device = torch.device(device)
    size = COPY_BYTES[device.type] if size is None else size
    source = torch.ones(size // 4, dtype=torch.int32, device=device)
    target = torch.zeros_like(source)

    def median_seconds(work: Callable[[], object]) -> float:
        clock = TokenClock(device)
        work()
        clock.start()
        for _ in range(repeats):
            work()
            clock.tick()
        return float(np.median(clock.seconds()))

    warm, copy = 0.0, lambda: target.copy_(source)
    while warm < WARM_SEC[device.type]:
        warm += timed(lambda: [copy() for _ in range(REPEATS)], device=device)[1]
    copied = median_seconds(copy)
    read = median_seconds(source.amax)
    return Bandwidth(KINDS[device.type], 2 * size / copied / 1e9, size / read / 1e9, size)
