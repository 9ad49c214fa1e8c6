"""`describe`: check that a model is one that the cache serves, and say what the cache must know of it.

A model that is not on the list is refused by name: with the wrong positions or masks it would be silently wrong.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from sinkstream.cache.attention import SINKSTREAM_SDPA
from sinkstream.cache.families.base import FAMILY, FULL, SLIDING, Family
from sinkstream.cache.families.spec import ModelSpec, SlidingLayers
from sinkstream.cache.families.unserved import UNSERVED
from sinkstream.cache.families.weights import check_weights
from sinkstream.cache.rope import Rope
from sinkstream.compat import attention_implementation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BOUNDED_ROPE_TYPES = ("dynamic", "longrope")  # constant inside the original length only
ROPE_TYPES = ("default", "linear", "llama3", "yarn", *BOUNDED_ROPE_TYPES)


def describe(model: PreTrainedModel) -> ModelSpec:
    """Check that a model is supported and say what the cache must know of it.

    Raises
    ------
    ValueError
        Naming the model, what is not supported and what is.
    """
    config: Any = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        raise ValueError(f"model={type(model).__name__} is not accepted; accepted: a transformers model")
    family = _family(config)
    family.check(config)
    attention, dtype = _checked_attention(config, family), check_weights(model)
    decoder: PreTrainedModel = model.get_decoder()
    rotary = getattr(decoder, "rotary_emb", None)
    if rotary is None:
        raise ValueError(f"{type(model).__name__} has no rotary_emb module on its decoder; it cannot stream")
    windows = family.windows(config)
    sliding = [i for i, window in enumerate(windows) if window is not None]
    hybrid, every_window = 0 < len(sliding) < len(windows), None
    if sliding and not hybrid:
        sliding, every_window = [], windows[0]
    streaming = [i for i in range(len(windows)) if i not in sliding]
    kinds = [FULL, SLIDING] if hybrid else [SLIDING if every_window else FULL]
    ropes = {kind: _rope_parameters(config, kind) for kind in kinds}
    lengths = [length for rope in ropes.values() if (length := _bounded_length(config, rope)) is not None]
    names = {kind: _buffer(rotary, kind, bounded=bool(lengths)) for kind in kinds}
    frequencies = {name: _values(rotary, name) for name in names.values()}
    rotated = family.rotated(config)
    slides = None
    if hybrid:
        rope = _stacked(frequencies[names[SLIDING]], [rotated[i] for i in sliding])
        slides = SlidingLayers(tuple(sliding), config.sliding_window, rope)
    heads = config.num_attention_heads
    return ModelSpec(
        family=config.model_type,
        layers=config.num_hidden_layers,
        query_heads=heads,
        kv_heads=family.kv_heads(config),
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        trained_positions=config.max_position_embeddings,
        rope=_stacked(frequencies[names[kinds[0]]], [rotated[i] for i in streaming]),
        attention=attention,
        dtype=dtype,
        decoder=decoder,
        sliding=slides,
        every_window=every_window,
        original_length=min(lengths, default=None),
        frequencies=frequencies,
        observable=family.observable,
        drops_long_caches=family.drops_long_caches,
    )


def _family(config: PreTrainedConfig) -> type[Family]:
    name = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"model type {name!r} is an encoder-decoder; accepted: decoder-only {', '.join(FAMILY)}")
    if name not in FAMILY:
        why = f" ({UNSERVED[name]})" if name in UNSERVED else ""
        raise ValueError(f"model type {name!r} is not supported{why}; accepted: {', '.join(FAMILY)}")
    return FAMILY[name]


def _rope_parameters(config: Any, kind: str) -> dict[str, Any]:
    """The rope parameters of one kind of layers, the rope type checked."""
    given = getattr(config, "rope_parameters", None) or {}
    rope = (given[kind] or {}) if isinstance(given.get(kind), dict) else given
    rope_type = rope.get("rope_type", "default")
    if rope_type not in ROPE_TYPES:
        raise ValueError(f"rope_type={rope_type!r} is not supported; accepted: {', '.join(ROPE_TYPES)}")
    return rope


def _bounded_length(config: Any, rope: dict[str, Any]) -> int | None:
    rope_type = rope.get("rope_type", "default")
    if rope_type == "dynamic":  # transformers goes back to the first frequencies below this length, not at it
        return config.max_position_embeddings - 1
    return rope["original_max_position_embeddings"] if rope_type == "longrope" else None


def _buffer(rotary: nn.Module, kind: str, *, bounded: bool) -> str:
    """The name of the buffer that holds the frequencies of one kind of layers, as they are inside the original length.

    Frequencies that change are put back there by the rotary module itself, as soon as positions are small again.
    """
    prefix = f"{kind}_" if hasattr(rotary, f"{kind}_inv_freq") else ""
    return f"{prefix}original_inv_freq" if bounded else f"{prefix}inv_freq"


def _values(rotary: nn.Module, name: str) -> torch.Tensor:
    """Frequencies of the rotary module, ``(rotary_dim / 2,)`` float64, on the CPU. Raises ValueError without values."""
    buffer: torch.Tensor = getattr(rotary, name)
    if buffer.is_meta:
        raise ValueError(
            f"the buffer {name} of the model's rotary module lies on meta, so it has no values; accepted: a model that"
            " is loaded, with buffers that are not offloaded"
        )
    return buffer.detach().to("cpu", torch.float64)


def _stacked(frequencies: torch.Tensor, rotated: list[bool]) -> Rope:
    """The rotation of several layers; one that does not rotate has frequencies of zero."""
    if all(rotated):
        return Rope(frequencies)
    return Rope(frequencies * torch.tensor(rotated, dtype=torch.float64).view(-1, 1, 1, 1, 1))


def _checked_attention(config: PreTrainedConfig, family: type[Family]) -> str:
    name = attention_implementation(config)
    known = "sdpa" if name == SINKSTREAM_SDPA else name
    if known not in family.attention:
        why = f" ({family.why_attention})" if family.why_attention else ""
        raise ValueError(f"attn_implementation={name!r} is not supported{why}; accepted: {', '.join(family.attention)}")
    return known
