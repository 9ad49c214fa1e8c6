"""Peak memory of a run, on the GPU or on the CPU, always with the kind of figure named beside it.

On CUDA the allocator keeps an exact peak that can be reset. On the CPU there is no such counter: `ru_maxrss` is the
peak of the whole life of the process and can not be reset, which makes it useless for the second run of a process. So
a thread reads the resident set size (RSS) of the process every 50 ms; a read takes tens of microseconds. The figure
includes Python, libraries and weights, and a peak shorter than the interval can be missed.
"""

import threading

import psutil
import torch

BYTES_PER_MB = 2**20
SAMPLING_SECONDS = 0.05


def held_mb(device: torch.device | str) -> float:
    """Memory held now, in MB of 2**20 bytes: allocated by torch on a GPU, the process's RSS on a CPU."""
    device = torch.device(device)
    held = torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
    return held / BYTES_PER_MB


def free_bytes(device: torch.device | str) -> int:
    """Bytes that can still be allocated on `device`: free on the GPU or in torch's pool, or available to the host."""
    device = torch.device(device)
    if device.type != "cuda":
        return psutil.virtual_memory().available
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


class PeakMemory:
    """Context manager that measures the peak memory of its body.

    On `cuda` it is the peak of the bytes allocated by torch on that device, weights included; on anything else the peak
    RSS of the process, sampled.
    """

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)
        self.kind = "cuda_allocated" if self.device.type == "cuda" else "process_rss_sampled"
        self.peak_mb: float | None = None  # MB of 2**20 bytes; None until the body has ended

    def __enter__(self) -> "PeakMemory":
        if self.kind == "cuda_allocated":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self._process = psutil.Process()
            self._peak_bytes = self._process.memory_info().rss
            self._stop = threading.Event()
            self._thread = threading.Thread(target=self._sample, name="peak-memory", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.kind == "cuda_allocated":
            self.peak_mb = torch.cuda.max_memory_allocated(self.device) / BYTES_PER_MB
            return
        self._stop.set()
        self._thread.join()
        self.peak_mb = max(self._peak_bytes, self._process.memory_info().rss) / BYTES_PER_MB

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLING_SECONDS):
            self._peak_bytes = max(self._peak_bytes, self._process.memory_info().rss)
