"""`PackedReader`: keys and values of archived text, by a forward of the packed weights in a ring of its own."""

from collections.abc import Sequence

import torch

from sinkstream.cache import ModelSpec
from sinkstream.cache.pinned import unrotated
from sinkstream.engine.geometry import Counters
from sinkstream.engine.packing import PackedWeights
from sinkstream.engine.prompt import Coming, PromptForward
from sinkstream.engine.state import REBASE_AT, StreamState
from sinkstream.kernels.band import Band
from sinkstream.policies import EvictionPolicy, PruneSchedule


class PackedReader:
    """Keys and values of the tokens of a text, in each other's company alone; see `sinkstream.archive.text.Reread`.

    Every text begins an empty ring, so the band of a text depends on its length alone and is kept on the device. Where
    the forward is captured, a text costs two small copies and a replay.

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
        self.prompts = PromptForward(weights, self.state, tokens, short_sizes, predicts=False)
        self.prompts.short.prepare(tokens)
        self._staged = torch.empty(tokens, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._copied = torch.cuda.Event() if device.type == "cuda" else None
        self._bands: dict[int, tuple[Band, torch.Tensor]] = {}  # by tokens: a band, and what is in its table

    @torch.no_grad()
    def __call__(self, ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Read a text; keys are not rotated, float32."""
        state, count = self.state, len(ids)
        with torch.cuda.device_of(state.keys):  # Triton launches on the current device
            short = self.prompts.short.size(count)
            if short is None:
                self._begin()
                self.prompts.append(self._on_device(ids), 0, last=False)
            else:
                self.prompts.short(self._on_device(ids), self._band(count, short))
        read = slice(0, count)
        return unrotated(state.spec.rope, state.keys[..., read, :], 0), state.values[..., read, :].clone()

    def _begin(self) -> None:
        state = self.state
        state.counters[0], state.schedules[0] = Counters(state.geometry), PruneSchedule(state.policy)

    def _on_device(self, ids: Sequence[int]) -> torch.Tensor:
        """The ids, ``(tokens,)`` int64; copied from page-locked memory, since another copy may wait for a step."""
        if self._copied is None:
            return torch.tensor(list(ids), device=self.state.device)
        self._copied.synchronize()  # nothing is copied out of the buffer any more
        staged = self._staged[: len(ids)].copy_(torch.tensor(list(ids)))
        found = staged.to(self.state.device, non_blocking=True)
        self._copied.record()
        return found

    def _band(self, count: int, size: int) -> Band:
        """The band of a text of so many tokens that is padded to a size, in the table of that size."""
        table = self.prompts.short.table(size)
        if count in self._bands:
            band, held = self._bands[count]
            table.copy_(held)
            return band
        self._begin()
        band = Coming(self.state, 0, self.state.schedules[0].advance(count), table).band
        self._bands[count] = band, table.clone()
        return band


def reading_policy(tokens: int) -> EvictionPolicy:
    """The policy of a ring that holds a text of so many tokens."""
    return EvictionPolicy.build(sink=0, window=tokens)
