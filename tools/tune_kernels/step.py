"""The engine's decode step over random weights and full rings: what the tuner launches, checks and times."""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from sinkstream.cache.families import describe
from sinkstream.engine.fused import FusedDecode, plan_sizes
from sinkstream.engine.geometry import Counters
from sinkstream.engine.packing import pack
from sinkstream.engine.state import REBASE_AT, StreamState
from sinkstream.kernels import set_implementation
from sinkstream.kernels.plans import LaunchPlan, OpLaunch, Sizes
from sinkstream.kernels.runtime import triton
from sinkstream.models.loaded import LoadRequest
from sinkstream.models.shapes import empty_model, fill_random
from sinkstream.policies import EvictionPolicy
from tune_kernels.shapes import SINK, Shape

H100 = {"shared_bytes": 228 * 1024, "multiprocessors": 132}
TOLERANCE = {torch.float16: 3e-3, torch.bfloat16: 2e-2}  # relative error of an op, and of the logits of a step


@contextmanager
def implementation(name: str) -> Iterator[None]:
    """All ops run their kernels ("triton") or their twins ("torch") while the context lasts."""
    set_implementation(name)
    try:
        yield
    finally:
        set_implementation("auto")


class RandomStep(FusedDecode):
    """`FusedDecode` in a model's shape, every ring full; one op can be left out, to see what it costs.

    Parameters
    ----------
    shape : Shape
    device : str
    initialised : bool
        Whether weights, keys and values are drawn; a worker that only compiles needs none, and two layers.

    Attributes
    ----------
    whole : StreamState
        Of all streams; `state` is its span.
    without : str
        Name of the op that is not launched, or "".
    """

    without = ""

    def __init__(self, shape: Shape, device: str, *, initialised: bool = True):
        self.shape = shape
        config = copy.deepcopy(shape.config)
        if not initialised:
            config.num_hidden_layers = 2
        model = empty_model(config, LoadRequest(shape.dtype, torch.device(device), "sdpa", 0))
        if initialised:
            fill_random(model, 0)
        state = StreamState(
            describe(model),
            EvictionPolicy.build(sink=SINK, cap=shape.cap),
            positions="cache",
            streams=shape.streams,
            vocab=config.vocab_size,
            device=model.device,
            rebase_at=REBASE_AT,
        )
        self.whole = state
        super().__init__(pack(model), state.span(), dict.fromkeys(shape.ops, OpLaunch()))
        self.last = config.num_hidden_layers - 1
        g = state.geometry
        window = 2 * g.ring  # index of the oldest token in a full window
        full = Counters(g, window + g.ring, window, pruned=True, base=window - g.pinned_slots)
        state.plan.copy_(torch.tensor(full.row(0), dtype=torch.int32).expand_as(state.plan))
        if initialised:
            state.keys.normal_()
            state.values.normal_()

    @property
    def cuda(self) -> bool:
        return self.state.device.type == "cuda"

    @property
    def sizes(self) -> Sizes:
        """What plans are fitted to; without a GPU an H100's sizes."""
        sizes = plan_sizes(self.state)
        return sizes if self.cuda else replace(sizes, **H100)

    def run(self, op: str, layer: int) -> None:
        if op != self.without:
            super().run(op, layer)

    def results(self, op: str) -> torch.Tensor:
        """What the latest call of an op left, ``(streams, values)`` float64."""
        return torch.cat([t.double() for t in self._outputs(op, self.hidden)], 1)

    def poison(self, op: str) -> None:
        """Fill the outputs of the next call of an op with NaN."""
        for output in self._outputs(op, self.other):
            output.fill_(float("nan"))

    def _outputs(self, op: str, residual: torch.Tensor) -> list[torch.Tensor]:
        outputs = {"qkv": [self.first], "attention": [self.context], "gate_up": [self.middle]}
        outputs |= {"attention_up": [self.context, self.middle], "head": [self.state.logits]}
        if self.paired:
            outputs |= {"qkv": [self.first, self.middle], "attention_up": [self.context]}
        return outputs.get(op, [residual])


class Checks:
    """Compares kernels with their twins, from the same inputs whatever ran before.

    The ops feed each other through the step's buffers, and a timing leaves another layer's results there. So the
    buffers of a whole step are kept, and put back before each check.
    """

    def __init__(self, step: RandomStep, kernels: str):
        self.step, self.kernels, self.tolerance = step, kernels, TOLERANCE[step.shape.dtype]
        step.state.tokens.fill_(3)
        with implementation("torch"):
            step()
            self._hidden = step.hidden, step.other
            self._kept = [(buffer, buffer.clone()) for buffer in (step.first, step.context, step.middle, *self._hidden)]
            self.expected = {op: self._run(op) for op in step.shape.ops}

    def _run(self, op: str) -> torch.Tensor:
        """What two calls of an op give, outputs poisoned; the second shows that counters are left as they were."""
        for _ in range(2):
            self.step.hidden, self.step.other = self._hidden
            for buffer, content in self._kept:
                buffer.copy_(content)
            self.step.poison(op)
            self.step.run(op, self.step.last)
        return self.step.results(op)

    def op(self, op: str, plan: LaunchPlan) -> float:
        """Relative error of one call against the twin. Raises ArithmeticError if it is too large."""
        self.step.use(plan)
        with implementation(self.kernels):
            return self._within(self._run(op), self.expected[op])

    def logits(self, plan: LaunchPlan) -> float:
        """Relative error of the logits of a whole step against the twins. Raises as `op`."""
        self.step.use(plan)
        self.step.state.tokens.fill_(3)
        self.step.state.logits.fill_(float("nan"))
        with implementation(self.kernels):
            self.step()
        found = self.step.results("head")
        with implementation("torch"):
            self.step()
        return self._within(found, self.step.results("head"), 2 * self.tolerance)

    def _within(self, found: torch.Tensor, reference: torch.Tensor, tolerance: float = 0.0) -> float:
        error, tolerance = float((found - reference).norm() / reference.norm()), tolerance or self.tolerance
        if not error < tolerance:
            raise ArithmeticError(f"relative error {error:.2g}; accepted: less than {tolerance:g}")
        return error


def time_ms(fn: Callable[[], object], device: torch.device, *, rep_ms: float) -> float:
    """Milliseconds of a call under a CUDA graph, median of ten replays of `rep_ms` each; without a GPU of one call."""
    if device.type == "cuda":
        return triton.testing.do_bench_cudagraph(fn, rep=rep_ms, return_mode="median")
    start = time.perf_counter()
    fn()
    return 1e3 * (time.perf_counter() - start)
