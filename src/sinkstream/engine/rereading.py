"""`PackedReader`: a text that is read through the packed weights again, in a ring of its own."""

from collections.abc import Sequence

import torch

from sinkstream.cache import ModelSpec
from sinkstream.cache.pinned import unrotated
from sinkstream.engine.geometry import Counters
from sinkstream.engine.packing import PackedWeights
from sinkstream.engine.prompt import PromptForward
from sinkstream.engine.state import REBASE_AT, StreamState
from sinkstream.policies import EvictionPolicy, PruneSchedule


class PackedReader:
    """Keys and values of the tokens of a text, in each other's company alone; see `sinkstream.archive.text.Reread`.

    Parameters
    ----------
    weights : PackedWeights
    spec : ModelSpec
    tokens : int
        The most tokens of a text.
    short_sizes : sequence of int
        As for `PromptForward`.
    """

    def __init__(self, weights: PackedWeights, spec: ModelSpec, tokens: int, short_sizes: tuple[int, ...]):
        device, vocab = weights.head.device, weights.head.shape[0]
        self.state = StreamState(
            spec,
            reading_policy(tokens),
            positions="cache",
            streams=1,
            vocab=vocab,
            device=device,
            rebase_at=REBASE_AT,
        )
        self.prompts = PromptForward(weights, self.state, tokens, short_sizes)
        self.prompts.short.prepare(tokens)

    @torch.no_grad()
    def __call__(self, ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Read a text; keys are not rotated, float32."""
        state = self.state
        state.counters[0], state.schedules[0] = Counters(state.geometry), PruneSchedule(state.policy)
        with torch.cuda.device_of(state.keys):  # Triton launches on the current device
            self.prompts.append(torch.tensor(list(ids)).to(state.device, non_blocking=True), 0, last=False)
        read = slice(0, len(ids))
        return unrotated(state.spec.rope, state.keys[..., read, :], 0), state.values[..., read, :].clone()


def reading_policy(tokens: int) -> EvictionPolicy:
    """The policy of a ring that holds a text of so many tokens."""
    return EvictionPolicy.build(sink=0, window=tokens)
