"""The engine backends, the rungs of the benchmark's ladder: several implementations of one decode step.

Every backend reads and writes the same `StreamState`, so that backends can be exchanged and compared.
"""

from abc import ABC, abstractmethod

import torch

from sinkstream.cache import ModelSpec
from sinkstream.engine import ablations, plain
from sinkstream.engine.fused import FusedDecode, check_kernels
from sinkstream.engine.graphs import captured
from sinkstream.engine.packing import PackedWeights
from sinkstream.engine.state import StreamState
from sinkstream.kernels.sample import SampleKernels
from sinkstream.policies import EvictionPolicy
from sinkstream.registry import Registry

STEPS: Registry = Registry("engine backend")


class StepFunction(ABC):
    """An implementation of the decode step.

    Parameters
    ----------
    weights : PackedWeights
    state : StreamState
        Empty; `prepare` may run steps on it and leaves it empty.
    """

    captures = False  # whether work is captured in CUDA graphs

    def __init__(self, weights: PackedWeights, state: StreamState):
        self.weights, self.state = weights, state

    @classmethod  # noqa: B027  (most backends serve everything that packing serves)
    def check(cls, spec: ModelSpec, policy: EvictionPolicy, device: torch.device) -> None:
        """Refuse, by name, a model, policy or device that this backend does not serve. Raises ValueError."""

    def prepare(self) -> None:  # noqa: B027  (most backends need none)
        """Compile or capture, once, before the first token."""

    @abstractmethod
    def __call__(self) -> None:
        """Append ``state.tokens`` to all streams; the next-token logits are in ``state.logits`` afterwards."""


@STEPS.register("ring")
class RingStep(StepFunction):
    """Static ring in plain PyTorch, on a CPU or a GPU."""

    @torch.no_grad()
    def __call__(self) -> None:
        plain.decode(self.state, self.weights)


class GraphedStep(StepFunction):
    """Any step under a CUDA graph: captured once for each kind of draw, replayed for every token."""

    captures = True
    warmups = 3
    _graphs: dict[SampleKernels | None, torch.cuda.CUDAGraph]

    @abstractmethod
    def run(self) -> None:
        """The step to capture."""

    @abstractmethod
    def rehearse(self) -> None:
        """Launch the kernels of the draws, which a capture must find loaded; streams do not notice."""

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
        name = "a decode step"
        self._graphs = {None: captured(self.run, state.device, name=name, warmups=self.warmups)}
        state.clear()

    @torch.no_grad()
    def __call__(self) -> None:
        kernels, device = self.state.sampling.kernels, self.state.device
        if kernels not in self._graphs:
            name = "a decode step that draws"
            self._graphs[kernels] = captured(self.run, device, name=name, warm_up=self.rehearse, warmups=1)
        with torch.cuda.device(device):
            self._graphs[kernels].replay()


@STEPS.register("graph")
class GraphStep(GraphedStep):
    """The plain PyTorch step under one CUDA graph."""

    def run(self) -> None:
        plain.decode(self.state, self.weights)

    def rehearse(self) -> None:
        draws, state = self.state.sampling.draws, self.state
        if draws is not None:
            draws.draw(state.logits, torch.zeros_like(state.tokens))


@STEPS.register("graph-norm")
class GraphNormStep(GraphStep):
    """The plain PyTorch step under one CUDA graph, residual additions and norms fused into one kernel."""

    def run(self) -> None:
        ablations.decode_add_norm(self.state, self.weights)

    @classmethod
    def check(cls, spec: ModelSpec, policy: EvictionPolicy, device: torch.device) -> None:
        super().check(spec, policy, device)
        check_kernels(spec, policy, device)


@STEPS.register("graph-linear")
class GraphLinearStep(GraphedStep):
    """Fused projections and MLP, with their norms and residuals, and PyTorch's attention, under one CUDA graph."""

    def __init__(self, weights: PackedWeights, state: StreamState):
        super().__init__(weights, state)
        self.decode = ablations.LinearDecode(weights, state)

    def run(self) -> None:
        self.decode()

    def rehearse(self) -> None:
        self.decode.rehearse()

    @classmethod
    def check(cls, spec: ModelSpec, policy: EvictionPolicy, device: torch.device) -> None:
        super().check(spec, policy, device)
        check_kernels(spec, policy, device)


@STEPS.register("kernels")
class KernelStep(StepFunction):
    """Fused kernels, launched one by one; on a CPU their plain PyTorch twins."""

    def __init__(self, weights: PackedWeights, state: StreamState):
        super().__init__(weights, state)
        self.decode = FusedDecode(weights, state)

    @classmethod
    def check(cls, spec: ModelSpec, policy: EvictionPolicy, device: torch.device) -> None:
        check_kernels(spec, policy, device)

    @torch.no_grad()
    def __call__(self) -> None:
        with torch.cuda.device_of(self.state.logits):  # Triton launches on the current device
            self.decode()


@STEPS.register("fused")
class FusedStep(GraphedStep):
    """Fused kernels under one CUDA graph: the fastest backend."""

    def __init__(self, weights: PackedWeights, state: StreamState):
        super().__init__(weights, state)
        self.decode = FusedDecode(weights, state)

    def run(self) -> None:
        self.decode()

    def rehearse(self) -> None:
        self.decode.rehearse()

    @classmethod
    def check(cls, spec: ModelSpec, policy: EvictionPolicy, device: torch.device) -> None:
        super().check(spec, policy, device)
        check_kernels(spec, policy, device)
