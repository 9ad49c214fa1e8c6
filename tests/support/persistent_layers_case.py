"""Layers over filled rings and one new token: what the cases of the persistent kernels have in common."""

from typing import ClassVar

import torch

from sinkstream.kernels.persistent_layers import persistent_layers


class PersistentLayersCase:
    """Has `hidden`, the residual stream, and `cases`, a ring of each layer; the rings are filled alike."""

    #: Slots and tokens of a `ring_case.Case`, unless a test says otherwise.
    RING: ClassVar = {"pinned_slots": 4, "ring": 41, "pinned": 4, "first": 30, "length": 33}

    def run(self, kernel, implementation):
        """The residual stream after all layers; keys and values of the new token are written to the rings."""
        other = torch.full_like(self.hidden, float("nan"))
        scalars, rope = self.cases[0].scalars, self.cases[0].rope
        return persistent_layers(self.hidden.clone(), other, kernel, scalars, rope, implementation=implementation)
