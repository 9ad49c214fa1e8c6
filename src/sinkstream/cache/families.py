"""Which models the cache serves, and why it refuses the others.

A model that is not on the list is refused by name: with the wrong positions or masks it would be silently wrong.
"""

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from sinkstream.cache.attention import SINKSTREAM_SDPA
from sinkstream.cache.rope import Rope
from sinkstream.compat import attention_implementation

FAMILIES = ("gpt_neox", "llama", "mistral", "qwen2", "qwen3")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
ATTENTION = ("sdpa", "eager")

_REFUSED = {
    "bloom": "ALiBi instead of rotary positions",
    "mpt": "ALiBi instead of rotary positions",
    "deepseek_v2": "multi-head latent attention",
    "deepseek_v3": "multi-head latent attention",
    "gemma2": "alternating sliding-window layers",
    "gemma3_text": "alternating sliding-window layers",
    "gpt_oss": "alternating sliding-window layers and learned sinks",
    "mamba": "no KV cache",
    "gpt2": "learned absolute positions",
    "opt": "learned absolute positions",
}


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
    attention : {"sdpa", "eager"}
    dtype : torch.dtype
    decoder : PreTrainedModel
        The decoder whose forward receives the cache.
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


def describe(model: PreTrainedModel) -> ModelSpec:
    """Check that a model is supported and say what the cache must know of it.

    Raises
    ------
    ValueError
        Naming the model, what is not supported and what is.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        raise ValueError(f"model={type(model).__name__} is not accepted; accepted: a transformers model")
    _check_config(config)
    attention = _checked_attention(config)
    decoder: PreTrainedModel = model.get_decoder()
    rotary = getattr(decoder, "rotary_emb", None)
    if rotary is None:
        raise ValueError(f"{type(model).__name__} has no rotary_emb module on its decoder; it cannot stream")
    heads = config.num_attention_heads
    return ModelSpec(
        family=config.model_type,
        layers=config.num_hidden_layers,
        query_heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        trained_positions=config.max_position_embeddings,
        rope=Rope(rotary.inv_freq),
        attention=attention,
        dtype=model.dtype,
        decoder=decoder,
    )


def _check_config(config) -> None:
    name = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"model type {name!r} is an encoder-decoder; accepted: decoder-only {', '.join(FAMILIES)}")
    if name not in FAMILIES:
        why = f" ({_REFUSED[name]})" if name in _REFUSED else ""
        raise ValueError(f"model type {name!r} is not supported{why}; accepted: {', '.join(FAMILIES)}")
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if kinds != {"full_attention"} or window is not None:
        raise ValueError(
            f"model type {name!r} with layer types {', '.join(sorted(kinds))} and sliding_window={window} is not"
            " supported; accepted: full attention in every layer (sliding_window=None)"
        )
    rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope_type not in ROPE_TYPES:
        why = ": its frequencies change with the length" if rope_type in ("dynamic", "longrope") else ""
        raise ValueError(f"rope_type={rope_type!r} is not supported{why}; accepted: {', '.join(ROPE_TYPES)}")


def _checked_attention(config) -> str:
    name = attention_implementation(config)
    if name == SINKSTREAM_SDPA:
        return "sdpa"
    if name not in ATTENTION:
        raise ValueError(f"attn_implementation={name!r} is not supported; accepted: {', '.join(ATTENTION)}")
    return name
