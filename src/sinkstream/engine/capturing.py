"""Capturing beforehand: every CUDA graph that steps and prompts would else capture when they first need it."""

from collections.abc import Callable, Sequence
from functools import partial

import torch

from sinkstream.engine.prompt import PromptForward
from sinkstream.engine.prompt_events import EventPrompts
from sinkstream.engine.recalling import StreamRecall
from sinkstream.engine.sampling import Sampler, StreamSampler
from sinkstream.engine.span import Block
from sinkstream.engine.state import StreamState
from sinkstream.engine.steps import StepFunction


@torch.no_grad()
def capture_ahead(
    step: StepFunction,
    forwards: Sequence[PromptForward],
    samplers: Sequence[Sampler],
    told: Callable[[int, int], None],
) -> None:
    """Capture the step of every block of streams for every kind of draw, and the forward of every short chunk.

    Parameters
    ----------
    step : StepFunction
        Of a state whose streams may hold tokens; they do not notice.
    forwards : sequence of PromptForward
    samplers : sequence of Sampler
        One for each kind of draw: what a draw needs is the same for all values of its options.
    told : callable
        ``told(done, total)`` after each piece of the work; never called where nothing is to be captured.

    Raises
    ------
    ValueError
        If a stream draws at present.
    """
    state = step.state
    if state.sampling.kernels is not None:
        raise ValueError("a stream draws at present; accepted: capture() before or after it")
    chunks = [partial(forward.short.table, size) for forward in forwards for size in forward.short.due()]
    kinds = {None if sampler.bare else sampler.kernels: sampler for sampler in samplers} if step.captures else {}
    blocks, done = blocks_of(state), 0
    total = len(chunks) + len(kinds) * len(blocks)
    with torch.cuda.device_of(state.logits):  # Triton launches on the current device
        for chunk in chunks:
            chunk()
            told(done := done + 1, total)
        for sampler in kinds.values():
            with state.sampling.using({0: StreamSampler(sampler, seed=0)}):
                for active in blocks.values():
                    step.ready(active)
                    told(done := done + 1, total)


def blocks_of(state: StreamState) -> dict[Block, tuple[int, int]]:
    """Every block that a step of these streams may compute, the largest first, with streams that it is computed for."""
    pairs = [(first, last) for first in range(state.streams) for last in range(first, state.streams)]
    found = {state.block_of(pair): pair for pair in pairs}
    return dict(sorted(found.items(), key=lambda one: (-one[0].streams, one[0].first)))


def forwards_of(append: Callable[[torch.Tensor, int], None]) -> Sequence[PromptForward]:
    """The forwards whose short chunks are captured, of what feeds prompts; none where every prune is foreseen."""
    if isinstance(append, StreamRecall):
        return append.prompts
    if isinstance(append, EventPrompts):
        return [] if append.state.signals else [append.forward]
    return [append] if isinstance(append, PromptForward) else []
