"""Capturing work in CUDA graphs: one way for a decode step and for a short chunk of a prompt."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def captured(
    run: Callable[[], None],
    device: torch.device,
    *,
    name: str,
    warm_up: Callable[[], None] | None = None,
    warmups: int = 3,
    stream: torch.cuda.Stream | None = None,
    pool: Any = None,
) -> torch.cuda.CUDAGraph:
    """Run work a few times, so that nothing is compiled or allocated for good while it is captured, and capture it.

    Parameters
    ----------
    run : callable
        Launches the work; reads and writes tensors whose addresses do not change.
    name : str
        What the work is, for the note on an error.
    warm_up : callable or None
        What runs before the capture, `warmups` times; default: `run`.
    stream : torch.cuda.Stream or None
        Where it is captured; default: a new one.
    pool : pool handle or None
        Memory that the graph shares with others, none of which run at the same time.

    Raises
    ------
    Exception
        Whatever the work or the capture raises, with a note that names the work; nothing falls back.
    """
    try:
        with torch.cuda.device(device):
            side = torch.cuda.Stream() if stream is None else stream
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(warmups):
                    (warm_up or run)()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with (
                nothing_collected(),
                torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"),
            ):
                run()
        return graph
    except Exception as error:
        error.add_note(f"while {name} was captured in a CUDA graph; backends that capture nothing: 'ring', 'kernels'")
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
