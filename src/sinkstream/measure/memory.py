"""Peak memory of a run, on the GPU or on the CPU, always with the kind of figure named beside it.

On CUDA the allocator keeps an exact peak that can be reset. On the CPU there is no such counter: `ru_maxrss` is the
peak of the whole life of the process and can not be reset, which makes it useless for the second run of a process. So
a thread reads the resident set size (RSS) of the process every 50 ms; a read takes tens of microseconds. The figure
includes Python, libraries and weights, and a peak shorter than the interval can be missed.

A GPU's peak is that of the process too. Each stream on which a graph was captured leaves a workspace of cuBLAS there,
32 MiB on recent GPUs, so that the tenth engine of a process seems to need ten times as much beside its weights as the
first: `free_unused` gives them back.
"""

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

BYTES_PER_MB = 2**20
OWN = "cuda_allocated_alone"  # kind of a peak that holds nothing of what ran in the process before
SAMPLING_SECONDS = 0.05
_contexts_open = 0  # of `old_objects_aside`


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


def free_unused(device: torch.device | str) -> bool:
    """Give back what closed engines, caches and graphs have left on a GPU; whether nothing of theirs is left.

    The workspaces of cuBLAS stay, and so do their bytes in a peak, where the process holds a captured graph: the
    graph may write to them when it is replayed.
    """
    gc.collect()
    if torch.device(device).type != "cuda":
        return False
    graphs = any(issubclass(type(entry), torch.cuda.CUDAGraph) for entry in gc.get_objects())
    if not graphs:
        torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    return not graphs


def set_old_objects_aside() -> None:
    """Python's garbage collector passes over everything that exists now, from here on (`gc.freeze`).

    A process with torch and transformers holds some 400,000 objects. A full collection reads them all, now and then
    while the process decodes, and stops it meanwhile: for 130 and 280 ms where that was timed.
    """
    gc.collect()
    gc.freeze()


@contextmanager
def old_objects_aside() -> Iterator[None]:
    """Context manager: `set_old_objects_aside` for its body.

    Inside another one it only collects: `gc.unfreeze` at its end would undo what the outer one did.
    """
    global _contexts_open
    if _contexts_open:
        gc.collect()
    else:
        set_old_objects_aside()
    _contexts_open += 1
    try:
        yield
    finally:
        _contexts_open -= 1
        if not _contexts_open:
            gc.unfreeze()


class PeakMemory:
    """Context manager that measures the peak memory of its body.

    On `cuda` it is the peak of the bytes allocated by torch on that device, weights included; on anything else the peak
    RSS of the process, sampled. `alone`: whether `free_unused` has just said that nothing else is in the figure.
    """

    def __init__(self, device: torch.device | str, *, alone: bool = False):
        self.device = torch.device(device)
        on_gpu = self.device.type == "cuda"
        self.kind = (OWN if alone else "cuda_allocated") if on_gpu else "process_rss_sampled"
        self.peak_mb: float | None = None  # MB of 2**20 bytes; None until the body has ended

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
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
        if self.device.type == "cuda":
            self.peak_mb = torch.cuda.max_memory_allocated(self.device) / BYTES_PER_MB
            return
        self._stop.set()
        self._thread.join()
        self.peak_mb = max(self._peak_bytes, self._process.memory_info().rss) / BYTES_PER_MB

    def _sample(self) -> None:
        while not self._stop.wait(SAMPLING_SECONDS):
            self._peak_bytes = max(self._peak_bytes, self._process.memory_info().rss)
