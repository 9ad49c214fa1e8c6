"""`ModelSpec`: what the cache must know of a model, and which policies the model bears."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from sinkstream.cache.rope import Rope
from sinkstream.policies import EvictionPolicy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HEADROOM = 8  # the share of a bounded length that is left free, so that a key is set back a few times only


@dataclass(frozen=True)
class SlidingLayers:
    """The layers of a hybrid model that attend to a window of their own.

    Attributes
    ----------
    layers : tuple of int
        Their indices in the model.
    window : int
        Tokens that a query sees, its own included.
    rope : Rope
        Of these layers, stacked in this order.
    """

    layers: tuple[int, ...]
    window: int
    rope: Rope


@dataclass(frozen=True)
class ModelSpec:
    """What the cache must know of a model.

    Attributes
    ----------
    family : str
        ``config.model_type``.
    layers, query_heads, kv_heads, head_dim : int
    trained_positions : int
        ``config.max_position_embeddings``.
    rope : Rope
        Of the layers that stream under the policy.
    attention : {"sdpa", "eager"}
    dtype : torch.dtype
    decoder : PreTrainedModel
        The decoder whose forward receives the cache.
    sliding : SlidingLayers or None
        Layers that do not stream under the policy.
    every_window : int or None
        The sliding window of all layers, which no cap may exceed.
    original_length : int or None
        Positions inside which the rotary frequencies are constant; None: everywhere.
    frequencies : dict of Tensor, (rotary_dim / 2,), float64
        What the buffers of the model's rotary module hold, by name.
    observable : bool
        Whether a scorer can read the attention.
    drops_long_caches : bool
        See `Family`.
    """

    family: str
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    trained_positions: int
    rope: Rope
    attention: str
    dtype: torch.dtype
    decoder: PreTrainedModel
    sliding: SlidingLayers | None = None
    every_window: int | None = None
    original_length: int | None = None
    frequencies: dict[str, torch.Tensor] = field(default_factory=dict)
    observable: bool = True
    drops_long_caches: bool = False

    @cached_property
    def full_layers(self) -> tuple[int, ...]:
        """Indices of the layers that stream under the policy."""
        slides = self.sliding.layers if self.sliding else ()
        return tuple(i for i in range(self.layers) if i not in slides)

    @cached_property
    def streaming_rows(self) -> dict[int, int]:
        """Rows of the stacked buffers, by layer, of the layers that stream under the policy."""
        return {layer: row for row, layer in enumerate(self.full_layers)}

    @cached_property
    def sliding_rows(self) -> dict[int, int]:
        """The same of the layers that slide."""
        return {layer: row for row, layer in enumerate(self.sliding.layers)} if self.sliding else {}

    @property
    def largest_bounded_peak(self) -> int | None:
        """The most entries whose positions stay inside the original length; None: no bound."""
        return None if self.original_length is None else self.original_length - self.original_length // HEADROOM


def check_policy(spec: ModelSpec, policy: EvictionPolicy, positions: str, *, compiled: bool = False) -> None:
    """Raise ValueError unless a model, compiled or not, computes under a policy what it was trained to compute."""
    peak, window, most = policy.peak, spec.every_window, spec.largest_bounded_peak
    if window is not None and (peak > window or positions == "original"):
        held = f"the cache would hold up to {peak} entries" if peak > window else f"positions={positions!r}"
        raise ValueError(
            f"{spec.family} with sliding_window={window} in every layer: a cap at or below the window makes the window"
            f" moot, a larger one would let a query see further than the model was trained to, and {held};"
            f" accepted: a cap of at most {window} (growth included) and positions='cache'"
        )
    if most is not None and (peak > most or positions == "original"):
        held = f"the cache would hold up to {peak} entries" if peak > most else f"positions={positions!r}"
        raise ValueError(
            f"the rotary frequencies of this {spec.family} are constant inside its original length of"
            f" {spec.original_length} positions only, and {held}; accepted: positions='cache' and a cap of at most"
            f" {most} (growth included; positions run on through the rest before they are set back)"
        )
    if not spec.observable and {"attention", "accumulated"} & policy.needs:
        raise ValueError(
            f"scorers that read attention are not supported for {spec.family}, whose attention does not go through"
            " transformers' attention interface; accepted: policies that do not read attention"
        )
    if not spec.observable and compiled:
        raise ValueError(
            f"a compiled {spec.family} is not supported: its attention does not go through transformers'"
            " attention interface; accepted: the model before torch.compile"
        )
