"""Cut and re-rotate: start and recent tokens in a plain `DynamicCache`, as published; the soft ring is judged by it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from sinkstream.cache import describe
from sinkstream.compat import with_cache
from sinkstream.evaluation.decoders import ModuleDecoder
from sinkstream.evaluation.settings import RunSettings
from sinkstream.policies import Step
from sinkstream.policies.schedule import PruneSchedule

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class CutDecoder(ModuleDecoder):
    """Every prune concatenates what stays into new tensors, in every layer, and rotates all window keys back.

    Positions are places in the cache, as those of `StreamingDecoder` are. Keys are rotated in place of their stored
    values, so that rounding accumulates in half precision; that is the published way. Source: arXiv 2309.17453.

    Raises ValueError for a policy with pinned tokens or observations, original positions, a baseline, and for a model
    whose layers differ.
    """

    def __init__(self, model: PreTrainedModel, settings: RunSettings):
        super().__init__(model, settings)
        policy, spec = settings.policy(), describe(model)
        if policy is None or not policy.plan_known or settings.positions != "cache":
            raise ValueError(
                f"cut and re-rotate does not run policy {settings.label()!r}; accepted: strict, lazy, slack and their"
                " options, without refresh and adaptive intervals, with positions=cache"
            )
        if spec.sliding is not None or spec.rope.inv_freq.dim() != 1:
            raise ValueError(f"the layers of a {spec.family} model differ; accepted here: models of one kind of layer")
        self.policy, self.rope = policy, spec.rope
        self.schedule = PruneSchedule(policy)
        self.cache = DynamicCache(config=model.config)
        self._steps: list[Step] = []
        self._angles: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by drop: cosines and sines

    def feed(self, ids: torch.Tensor, *, last_only: bool) -> torch.Tensor:
        """Logits of one token, or of several before the first prune."""
        self._steps = [self.schedule.step() for _ in range(len(ids))]
        drops = sum(step.drop for step in self._steps)
        assert not drops or len(ids) == 1, "prunes come between forwards"
        if drops:
            self._cut(drops)
        out = self.model(ids[None], **with_cache(self.model, self.cache), logits_to_keep=1 if last_only else 0)
        return out.logits[0]

    def prefill(self, ids: torch.Tensor, stream: int = 0) -> torch.Tensor:
        """In one forward up to the first prune, then token by token."""
        first = min(len(ids), self.policy.peak)
        logits = self.feed(ids[:first], last_only=True)
        for i in range(first, len(ids)):
            logits = self.feed(ids[i : i + 1], last_only=True)
        return logits

    def steps(self) -> Sequence[Step]:
        return self._steps

    def _cut(self, drop: int) -> None:
        """Evict the `drop` oldest window tokens of every layer."""
        sink, layers = self.policy.sink, self.cache.layers
        if drop not in self._angles:
            self._angles[drop] = self.rope.angles(torch.full((), -drop, device=self.model.device))
        cos, sin = self._angles[drop]
        for layer in layers:
            held: Any = layer
            window = held.keys[:, :, sink + drop :]
            moved = self.rope.rotate(window, cos, sin).to(window.dtype)
            held.keys = torch.cat([held.keys[:, :, :sink], moved], dim=2)
            held.values = torch.cat([held.values[:, :, :sink], held.values[:, :, sink + drop :]], dim=2)
