"""Capturing work in CUDA graphs: one way for a decode step and for a short chunk of a prompt."""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class GraphCaptures:
    """Captures the CUDA graphs that work on one state, and counts them.

    The graphs share a pool of memory and the stream on which they are captured, since no two of them run at the same
    time. Warm-ups run on the present stream, and nothing ever runs on the stream of captures: a handful of kernels that
    ran on a second stream make later replays slower for the rest of the process (H100: 0.16 µs for each kernel).

    Parameters
    ----------
    device : torch.device

    Attributes
    ----------
    count : int
        Graphs so far.
    seconds : float
        What they took, warm-up and compilation included.
    told : callable
        ``told(name, seconds)`` after each capture.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self.count, self.seconds = 0, 0.0
        self.told: Callable[[str, float], None] = lambda name, seconds: None
        self._side: torch.cuda.Stream | None = None
        self._pool: Any = None

    def __call__(self, run: Callable[[], None], *, name: str, warmups: int) -> torch.cuda.CUDAGraph:
        """Run work a few times, so that nothing is compiled or allocated for good while it is captured, and capture it.

        Parameters
        ----------
        run : callable
            Launches the work; reads and writes tensors whose addresses do not change.
        name : str
            What the work is, for the note on an error.

        Raises
        ------
        Exception
            Whatever the work or the capture raises, with a note that names the work; nothing falls back.
        """
        begin = time.perf_counter()
        try:
            graph = self._capture(run, warmups)
        except Exception as error:
            error.add_note(
                f"while {name} was captured in a CUDA graph; backends that capture nothing: 'ring', 'kernels'"
            )
            raise
        seconds = time.perf_counter() - begin
        self.count, self.seconds = self.count + 1, self.seconds + seconds
        self.told(name, seconds)
        return graph

    def _capture(self, run: Callable[[], None], warmups: int) -> torch.cuda.CUDAGraph:
        try:
            with torch.cuda.device(self._device):
                if self._side is None:
                    self._side, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
                for _ in range(warmups):
                    run()
                graph = torch.cuda.CUDAGraph()
                with (
                    nothing_collected(),
                    torch.cuda.graph(graph, pool=self._pool, stream=self._side, capture_error_mode="thread_local"),
                ):
                    run()
            return graph
        except BaseException:
            self._side = self._pool = None  # what a capture that failed leaves in them is not known
            raise


@contextmanager
def nothing_collected() -> Iterator[None]:
    """Python collects no garbage meanwhile: an engine that nobody holds would free its graphs, which ends a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
