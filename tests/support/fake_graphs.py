"""CUDA graphs without a GPU: what is captured runs as it is, so that backends that capture run on a CPU."""

from types import SimpleNamespace

import pytest

from sinkstream.engine.graphs import GraphCaptures
from sinkstream.engine.steps import GraphedStep


def capture(self: GraphCaptures, run, warmups: int) -> SimpleNamespace:
    """Warm up, as a capture does; the graph runs the work."""
    for _ in range(warmups + 1):
        run()
    return SimpleNamespace(replay=run)


def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``backend="graph"`` run on a CPU."""
    monkeypatch.setattr(GraphCaptures, "_capture", capture)
    monkeypatch.setattr(GraphedStep, "check", classmethod(lambda *given: None))
