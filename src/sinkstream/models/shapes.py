"""Published model shapes with random weights, for measuring speed where the checkpoint itself is out of reach.

Shapes follow the published configurations (Pythia: arXiv 2304.01373; Llama 3.1 and 3.2: Meta's model cards; SmolLM2:
arXiv 2502.02737).
Weights are drawn on the target device in the wanted dtype; nothing is ever held in float32 beside them.
"""

from __future__ import annotations

from math import sqrt
from typing import TYPE_CHECKING

import torch

from sinkstream.models.hashing import sha256_of_json
from sinkstream.models.loaded import MODEL_SOURCES, LoadedModel, LoadRequest

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

PREFIX = "random:"
RESIDUAL_WRITERS = ("attention.dense", "mlp.dense_4h_to_h", "self_attn.o_proj", "mlp.down_proj")


def _pythia(hidden: int, layers: int, heads: int, vocab: int = 50304) -> dict:
    return {
        "model_type": "gpt_neox",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
        "hidden_act": "gelu",
        "max_position_embeddings": 2048,
        "layer_norm_eps": 1e-5,
        "use_parallel_residual": True,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
    }


def _llama3(hidden: int, intermediate: int, layers: int, factor: float, tied: bool) -> dict:
    return {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    }


SHAPES: dict[str, dict] = {
    "pythia-14m": _pythia(128, 6, 4),
    "pythia-31m": _pythia(256, 6, 8),
    "pythia-70m": _pythia(512, 6, 8),
    "pythia-160m": _pythia(768, 12, 12),
    "pythia-410m": _pythia(1024, 24, 16),
    "pythia-1b": _pythia(2048, 16, 8),
    "pythia-1.4b": _pythia(2048, 24, 16),
    "pythia-2.8b": _pythia(2560, 32, 32),
    "pythia-6.9b": _pythia(4096, 32, 32, vocab=50432),
    "pythia-12b": _pythia(5120, 36, 40, vocab=50688),
    "smollm2-135m": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "hidden_act": "silu",
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    },
    "llama-3.2-1b": _llama3(2048, 8192, 16, factor=32.0, tied=True),
    "llama-3.1-8b": _llama3(4096, 14336, 32, factor=8.0, tied=False),
}


def shape_config(name: str) -> PreTrainedConfig:
    """Return a fresh configuration of the published shape `name`. Raises ValueError for an unknown name."""
    if name not in SHAPES:
        raise ValueError(
            f"unknown random shape {PREFIX + name!r}; accepted: {', '.join(PREFIX + key for key in SHAPES)}"
        )
    from transformers import AutoConfig  # slow to import, as all models of transformers are

    fields = dict(SHAPES[name])
    fields["rope_parameters"] = dict(fields["rope_parameters"])
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def shape_sizes(name: str) -> tuple[int, int]:
    """Parameters of a published shape, tied ones once, and numbers cached for one token; nothing is allocated.

    Raises ValueError for an unknown name.
    """
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    config = shape_config(name)
    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    cached = 2 * config.num_hidden_layers * heads * config.hidden_size // config.num_attention_heads
    return sum(parameter.numel() for parameter in model.parameters()), cached


@MODEL_SOURCES.register("random")
def load_random(spec: str, request: LoadRequest) -> LoadedModel:
    """`random:SHAPE`: a published shape with seeded random weights, no tokenizer."""
    name = spec.removeprefix(PREFIX)
    model = empty_model(shape_config(name), request)
    fill_random(model, request.seed)
    return LoadedModel.of(
        model, None, name=spec, source="random", hash=sha256_of_json({"shape": SHAPES[name], "seed": request.seed})
    )


def empty_model(config: PreTrainedConfig, request: LoadRequest) -> PreTrainedModel:
    """A model of a configuration whose weights are allocated and not initialised; `fill_random` draws them."""
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with torch.device(request.device), no_init_weights():
        model = AutoModelForCausalLM.from_config(
            config, dtype=request.dtype, attn_implementation=request.attn_implementation
        )
    model.tie_weights()
    return model


@torch.no_grad()
def fill_random(model: PreTrainedModel, seed: int) -> None:
    """Draw every parameter in place, as Pythia's training started: biases 0, norms 1, the rest normal.

    The deviation is sqrt(2 / (5 d)), and 2 / (layers sqrt(d)) for the matrices that write to the residual stream
    (d = hidden size), so that the stream neither grows with depth nor overflows float16.
    Source: "small_init" and "wang_init" of the published Pythia training settings.
    """
    width, layers = model.config.hidden_size, model.config.num_hidden_layers
    small, residual = sqrt(2 / (5 * width)), 2 / (layers * sqrt(width))
    generator = torch.Generator(device=next(model.parameters()).device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.zero_()
        elif parameter.ndim == 1:
            parameter.fill_(1.0)
        else:
            writes = name.removesuffix(".weight").endswith(RESIDUAL_WRITERS)
            parameter.normal_(0.0, residual if writes else small, generator=generator)
