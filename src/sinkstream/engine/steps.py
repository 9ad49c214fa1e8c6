"""The engine backends, which are rungs of the benchmark too: several implementations of one decode step.

Every backend reads and writes the same `StreamState`, so that backends can be exchanged and compared.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch

from sinkstream.cache import ModelSpec
from sinkstream.engine import ablations, plain
from sinkstream.engine.fused import FusedDecode, check_kernels
from sinkstream.engine.geometry import Geometry
from sinkstream.engine.packing import PackedWeights
from sinkstream.engine.span import Block
from sinkstream.engine.state import StreamState
from sinkstream.kernels.sample import SampleKernels
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
    decodes: "Decodes | None" = None

    def __init__(self, weights: PackedWeights, state: StreamState):
        self.weights, self.state = weights, state

    @classmethod  # noqa: B027  (most backends serve everything that packing serves)
    def check(cls, spec: ModelSpec, geometry: Geometry, device: torch.device) -> None:
        """Refuse, by name, a model, slots or a device that this backend does not serve. Raises ValueError."""

    def prepare(self) -> None:  # noqa: B027  (most backends need none)
        """Compile or capture, once, before the first token."""

    def ready(self, active: Sequence[int]) -> None:  # noqa: B027  (most backends need none)
        """Called before a step of these streams is planned: capture what it needs and was not captured yet."""

    @property
    def persistent(self) -> bool:
        """Whether one kernel computes all layers of a stream that is stepped alone."""
        return self.decodes is not None and any(d.persistent is not None for d in self.decodes.values())

    @abstractmethod
    def __call__(self) -> None:
        """Append ``state.tokens`` to the streams of ``state.block``; their logits are in ``state.logits`` then."""


@STEPS.register("ring")
class RingStep(StepFunction):
    """Static ring in plain PyTorch, on a CPU or a GPU."""

    @torch.no_grad()
    def __call__(self) -> None:
        plain.decode(self.state.span(self.state.block), self.weights)


class GraphedStep(StepFunction):
    """Any step under a CUDA graph, replayed for every token: one graph for each block of streams and kind of draw."""

    captures = True
    warmups = 3

    def __init__(self, weights: PackedWeights, state: StreamState):
        super().__init__(weights, state)
        self._graphs: dict[tuple[Block, SampleKernels | None], torch.cuda.CUDAGraph] = {}

    @abstractmethod
    def run(self, block: Block) -> None:
        """The step to capture."""

    @classmethod
    def check(cls, spec: ModelSpec, geometry: Geometry, device: torch.device) -> None:
        if device.type != "cuda":
            raise ValueError(
                f"this backend captures a CUDA graph, and the model is on {device};"
                " accepted: a model on a CUDA device, or backend='ring'"
            )

    def prepare(self) -> None:
        self.ready(range(self.state.streams))

    @torch.no_grad()
    def ready(self, active: Sequence[int]) -> None:
        block = self.state.block_of(active)
        self._capture(block)
        if self.state.geometry.framed:  # recall changes the frame between two steps
            self._capture(block._replace(framed=not block.framed))

    def _capture(self, block: Block) -> None:
        state = self.state
        kernels = state.sampling.kernels
        key = block, kernels
        if key in self._graphs:
            return
        name = "a decode step" if kernels is None else "a decode step that draws"
        with state.rehearsing(block):
            self._graphs[key] = state.captures(lambda: self.run(block), name=name, warmups=self.warmups)

    @torch.no_grad()
    def __call__(self) -> None:
        with torch.cuda.device_of(self.state.logits):
            self._graphs[self.state.block, self.state.sampling.kernels].replay()


@STEPS.register("graph")
class GraphStep(GraphedStep):
    """The plain PyTorch step under one CUDA graph."""

    def run(self, block: Block) -> None:
        plain.decode(self.state.span(block), self.weights)


class Decodes(dict[Block, FusedDecode]):
    """The fused steps of blocks of streams, each made when it is first asked for."""

    def __init__(self, weights: PackedWeights, state: StreamState, kind: type[FusedDecode] = FusedDecode):
        super().__init__()
        self.weights, self.state, self.kind = weights, state, kind

    def __missing__(self, block: Block) -> FusedDecode:
        self[block] = self.kind(self.weights, self.state.span(block))
        return self[block]


@STEPS.register("graph-norm")
class GraphNormStep(GraphStep):
    """The plain PyTorch step under one CUDA graph, residual additions and norms fused into one kernel."""

    def run(self, block: Block) -> None:
        ablations.decode_add_norm(self.state.span(block), self.weights)

    @classmethod
    def check(cls, spec: ModelSpec, geometry: Geometry, device: torch.device) -> None:
        super().check(spec, geometry, device)
        check_kernels(spec, geometry, device)


class GraphedDecode(GraphedStep):
    """A step of fused kernels under a CUDA graph."""

    kind: type[FusedDecode] = FusedDecode

    def __init__(self, weights: PackedWeights, state: StreamState):
        super().__init__(weights, state)
        self.decodes: Decodes = Decodes(weights, state, self.kind)

    def run(self, block: Block) -> None:
        self.decodes[block]()

    @classmethod
    def check(cls, spec: ModelSpec, geometry: Geometry, device: torch.device) -> None:
        super().check(spec, geometry, device)
        check_kernels(spec, geometry, device)


@STEPS.register("graph-linear")
class GraphLinearStep(GraphedDecode):
    """Fused projections and MLP, with their norms and residuals, and PyTorch's attention, under one CUDA graph."""

    kind = ablations.LinearDecode


@STEPS.register("fused-ops")
class FusedOpsStep(GraphedDecode):
    """As `fused`, without the persistent kernel: every op of a layer is a launch."""

    kind = ablations.OpsDecode


@STEPS.register("kernels")
class KernelStep(StepFunction):
    """Fused kernels, launched one by one; on a CPU their plain PyTorch twins."""

    def __init__(self, weights: PackedWeights, state: StreamState):
        super().__init__(weights, state)
        self.decodes: Decodes = Decodes(weights, state)

    @classmethod
    def check(cls, spec: ModelSpec, geometry: Geometry, device: torch.device) -> None:
        check_kernels(spec, geometry, device)

    @torch.no_grad()
    def __call__(self) -> None:
        with torch.cuda.device_of(self.state.logits):  # Triton launches on the current device
            self.decodes[self.state.block]()


@STEPS.register("fused")
class FusedStep(GraphedDecode):
    """Fused kernels under one CUDA graph: the fastest backend."""
