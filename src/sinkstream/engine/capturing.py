"""Capture in advance the CUDA graphs that steps and prompts would otherwise capture at their first use."""

from collections.abc import Callable, Sequence
from functools import partial

import torch

from sinkstream.engine.foreseen_chunks import ForeseenChunks
from sinkstream.engine.prompt import PromptForward
from sinkstream.engine.prompt_events import EventPrompts
from sinkstream.engine.recalling import StreamRecall
from sinkstream.engine.sampling import Sampler, StreamSampler
from sinkstream.engine.short_chunks import ShortChunks
from sinkstream.engine.span import Block
from sinkstream.engine.state import StreamState
from sinkstream.engine.steps import StepFunction


@torch.no_grad()
def capture_ahead(
    step: StepFunction,
    chunks: Sequence[ShortChunks | ForeseenChunks],
    samplers: Sequence[Sampler],
    told: Callable[[int, int], None],
) -> None:
    """Capture the step of every block of streams for every kind of draw, and the forward of every size of chunk.

    Parameters
    ----------
    step : StepFunction
        Of a state whose streams may hold tokens; they do not notice.
    chunks : sequence of ShortChunks or ForeseenChunks
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
    sizes = [partial(kind.ready, size) for kind in chunks for size in kind.due()]
    kinds = {None if sampler.bare else sampler.kernels: sampler for sampler in samplers} if step.captures else {}
    blocks, done = blocks_of(state), 0
    total = len(sizes) + len(kinds) * len(blocks)
    with torch.cuda.device_of(state.logits):  # Triton launches on the current device
        for ready in sizes:
            ready()
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


def chunks_of(append: Callable[[torch.Tensor, int], None]) -> Sequence[ShortChunks | ForeseenChunks]:
    """The chunks of prompts that are captured, of what feeds prompts."""
    if isinstance(append, StreamRecall):
        return [forward.short for forward in append.prompts]
    if isinstance(append, EventPrompts):
        if append.state.signals:
            return [append.foreseen]
        return [append.forward.short] + ([append.choosing.short] if append.choosing else [])
    return [append.short] if isinstance(append, PromptForward) else []
