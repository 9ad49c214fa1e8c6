"""What loading a model gives, what it takes, and the registry of places that models come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sinkstream.compat import attention_implementation
from sinkstream.registry import Registry

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class LoadRequest:
    """How a model shall be loaded: the arguments of `load_model` other than the spec."""

    dtype: torch.dtype
    device: torch.device
    attn_implementation: str
    seed: int


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model that is ready to run (eval mode, no gradients), and where it came from.

    Attributes
    ----------
    model : PreTrainedModel
    tokenizer : PreTrainedTokenizerBase or None
        None for random shapes, and for a directory that holds no tokenizer.
    name : str
        For people and tables; never a path of this machine.
    source : str
        Name in `MODEL_SOURCES`.
    hash : str
        SHA-256 over the contents of the weight files (a GGUF file: of the GGUF file itself). For a random shape: over
        the canonical JSON of family, shape and seed; the values then also depend on dtype, device and torch version.
    n_params : int
        Parameters; tied ones count once.
    weight_bytes : int
        Bytes of these parameters in memory.
    trained_positions : int or None
        Positions that the model was trained on; None if its config does not say.
    family : str
        `config.model_type`, as in "gpt_neox".
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    name: str
    source: str
    hash: str
    n_params: int
    weight_bytes: int
    trained_positions: int | None
    family: str

    @classmethod
    def of(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, *, name: str, source: str, hash: str
    ) -> LoadedModel:
        """Put `model` in eval mode without gradients and fill in the figures that follow from it."""
        model = model.eval().requires_grad_(False)
        parameters = list(model.parameters())
        return cls(
            model=model,
            tokenizer=tokenizer,
            name=name,
            source=source,
            hash=hash,
            n_params=sum(p.numel() for p in parameters),
            weight_bytes=sum(p.numel() * p.element_size() for p in parameters),
            trained_positions=trained_positions(model.config),
            family=model.config.model_type,
        )

    def record(self) -> dict:
        """JSON-able description for run records: identity, size, shape, dtype and attention implementation."""
        config = self.model.config
        shape_keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        shape = {key: getattr(config, key, None) for key in (*shape_keys, "num_key_value_heads", "vocab_size")}
        return {
            "name": self.name,
            "source": self.source,
            "family": self.family,
            "hash": self.hash,
            "n_params": self.n_params,
            "weight_bytes": self.weight_bytes,
            "trained_positions": self.trained_positions,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "attn_implementation": attention_implementation(config),
            "shape": shape,
        }


def trained_positions(config: PreTrainedConfig) -> int | None:
    """Positions that a model was trained on; None if its configuration does not say."""
    return getattr(config, "max_position_embeddings", None)


MODEL_SOURCES: Registry[Callable[[str, LoadRequest], LoadedModel]] = Registry("model source")
