"""The rungs of the ladder: one decode step, done in one of several ways.

Every rung reads and writes the same `StreamState`, so that they can be swapped for one another and compared.
"""

from abc import ABC, abstractmethod

import torch

from sinkstream.cache import ModelSpec
from sinkstream.engine import plain
from sinkstream.engine.packing import PackedWeights
from sinkstream.engine.state import StreamState
from sinkstream.policies import EvictionPolicy
from sinkstream.registry import Registry

STEPS: Registry = Registry("engine backend")


class StepFunction(ABC):
    """One way of doing a decode step.

    Parameters
    ----------
    weights : PackedWeights
    state : StreamState
        Empty; `prepare` may run steps on it and leaves it empty.
    """

    def __init__(self, weights: PackedWeights, state: StreamState):
        self.weights, self.state = weights, state

    @classmethod  # noqa: B027  (most rungs serve everything that packing serves)
    def check(cls, spec: ModelSpec, policy: EvictionPolicy, device: torch.device) -> None:
        """Refuse, by name, a model, policy or device that this rung does not serve. Raises ValueError."""

    def prepare(self) -> None:  # noqa: B027  (most rungs need none)
        """Compile or capture, once, before the first token."""

    @abstractmethod
    def __call__(self) -> None:
        """Append ``state.tokens`` to all streams; the logits are in ``state.logits`` afterwards."""


@STEPS.register("ring")
class RingStep(StepFunction):
    """Static ring in plain PyTorch, on a CPU or a GPU."""

    @torch.no_grad()
    def __call__(self) -> None:
        plain.decode(self.state, self.weights)


class GraphedStep(StepFunction):
    """Any step under one CUDA graph: captured once, replayed for ever."""

    warmups = 3

    @abstractmethod
    def run(self) -> None:
        """The step to capture."""

    @classmethod
    def check(cls, spec: ModelSpec, policy: EvictionPolicy, device: torch.device) -> None:
        if device.type != "cuda":
            raise ValueError(
                f"this backend captures a CUDA graph, and the model is on {device};"
                " accepted: a model on a CUDA device, or backend='ring'"
            )

    @torch.no_grad()
    def prepare(self) -> None:
        state = self.state
        idle = torch.tensor(state.geometry.idle_row(), dtype=torch.int32, device=state.device)
        state.plan.copy_(idle.expand_as(state.plan))
        side = torch.cuda.Stream(state.device)
        side.wait_stream(torch.cuda.current_stream(state.device))
        with torch.cuda.stream(side):
            for _ in range(self.warmups):
                self.run()
        torch.cuda.current_stream(state.device).wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.run()
        state.clear()

    def __call__(self) -> None:
        self.graph.replay()


@STEPS.register("graph")
class GraphStep(GraphedStep):
    """The plain PyTorch step under one CUDA graph."""

    def run(self) -> None:
        plain.decode(self.state, self.weights)
