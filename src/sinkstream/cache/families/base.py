"""What the cache must be told of a model family, and the registry of the families that it serves."""

from typing import Any, ClassVar

from transformers import PreTrainedConfig

from sinkstream.registry import Registry

ATTENTION = ("sdpa", "eager")
FULL, SLIDING = "full_attention", "sliding_attention"  # names of layer types in transformers


class Family:
    """Models of one ``config.model_type``; what is said here holds unless a family says otherwise.

    Attributes
    ----------
    attention : tuple of str
        Attention implementations whose results are those of the model.
    why_attention : str
        Why the others are not accepted.
    observable : bool
        Whether attention goes through transformers' attention interface, so that a scorer can read it.
    drops_long_caches : bool
        Whether ``prepare_inputs_for_generation`` of the release drops the cache of a conversation that has outgrown
        the original length; the cache then has the one of ``GenerationMixin`` called.
    """

    attention: ClassVar[tuple[str, ...]] = ATTENTION
    why_attention: ClassVar[str] = ""
    observable: ClassVar[bool] = True
    drops_long_caches: ClassVar[bool] = False

    @classmethod
    def check(cls, config: PreTrainedConfig) -> None:
        """Raise ValueError, with what is accepted, for a variant of the family that the cache does not serve."""

    @classmethod
    def kv_heads(cls, config: Any) -> int:
        """Heads of the keys that reach the cache."""
        return getattr(config, "num_key_value_heads", None) or config.num_attention_heads

    @classmethod
    def windows(cls, config: Any) -> list[int | None]:
        """The attention window of every layer, in tokens; None: the layer attends to everything."""
        return [None] * config.num_hidden_layers

    @classmethod
    def rotated(cls, config: Any) -> list[bool]:
        """Whether every layer rotates its queries and keys."""
        return [True] * config.num_hidden_layers


def one_window(config: Any) -> list[int | None]:
    """`Family.windows` where ``config.sliding_window`` holds for every layer."""
    return [getattr(config, "sliding_window", None)] * config.num_hidden_layers


def windows_by_layer_type(config: Any) -> list[int | None]:
    """`Family.windows` where ``config.layer_types`` names the layers that slide.

    Raises
    ------
    ValueError
        For other layer types than full and sliding attention, and for sliding layers without a window.
    """
    kinds = list(config.layer_types)
    odd = sorted(set(kinds) - {FULL, SLIDING})
    if odd:
        raise ValueError(
            f"model type {config.model_type!r} with layer types {', '.join(odd)} is not supported;"
            f" accepted: {FULL}, {SLIDING}"
        )
    window = getattr(config, "sliding_window", None)
    if SLIDING in kinds and not window:
        raise ValueError(
            f"model type {config.model_type!r} with {SLIDING} layers and sliding_window={window} is not supported;"
            " accepted: a sliding_window of at least 1"
        )
    return [window if kind == SLIDING else None for kind in kinds]


FAMILY: Registry[type[Family]] = Registry("model family")
