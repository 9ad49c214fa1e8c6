"""Tiny random transformers models, one per supported family, whose attention is sharp and depends on position.

A freshly initialised tiny model attends almost uniformly, so that dropping the wrong token or using the wrong position
hardly changes its output. Here every weight is drawn anew: linear layers keep the scale of their input, queries and
keys get an extra gain, and norms and biases are off their defaults, so that a forgotten one shows.
"""

import torch
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB = 97
MAX_POSITIONS = 1024
THETA = 10000.0

_COMMON = {
    "vocab_size": VOCAB,
    "max_position_embeddings": MAX_POSITIONS,
    "num_hidden_layers": 2,
    "bos_token_id": None,
    "eos_token_id": None,
}
_GQA = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
_NEOX = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}


def _rope(kind: str = "default", **extra) -> dict:
    return {"rope_type": kind, "rope_theta": THETA, **extra}


_LLAMA3 = _rope(
    "llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=MAX_POSITIONS // 4
)
_YARN = _rope("yarn", factor=4.0, original_max_position_embeddings=MAX_POSITIONS // 4)

# name -> (model class, config class, options)
_SPECS = {
    "gpt_neox": (
        GPTNeoXForCausalLM,
        GPTNeoXConfig,
        {**_NEOX, "use_parallel_residual": True, "rope_parameters": _rope(partial_rotary_factor=0.25)},
    ),
    "gpt_neox_sequential": (
        GPTNeoXForCausalLM,
        GPTNeoXConfig,
        {
            **_NEOX,
            "num_hidden_layers": 3,
            "use_parallel_residual": False,
            "rope_parameters": _rope(partial_rotary_factor=1.0),
        },
    ),
    "llama": (LlamaForCausalLM, LlamaConfig, {**_GQA, "num_hidden_layers": 3, "rope_parameters": _rope()}),
    "llama_linear": (LlamaForCausalLM, LlamaConfig, {**_GQA, "rope_parameters": _rope("linear", factor=2.0)}),
    "llama_llama3": (LlamaForCausalLM, LlamaConfig, {**_GQA, "rope_parameters": _LLAMA3}),
    "llama_yarn": (LlamaForCausalLM, LlamaConfig, {**_GQA, "rope_parameters": _YARN}),
    "mistral": (MistralForCausalLM, MistralConfig, {**_GQA, "sliding_window": None, "rope_parameters": _rope()}),
    "qwen2": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {**_GQA, "num_key_value_heads": 1, "use_sliding_window": False, "rope_parameters": _rope()},
    ),
    "qwen3": (
        Qwen3ForCausalLM,
        Qwen3Config,
        {**_GQA, "hidden_size": 48, "head_dim": 24, "tie_word_embeddings": True, "rope_parameters": _rope()},
    ),
}

FAMILIES = list(_SPECS)

# Sharp enough for an error of one position to move the NLL by tenths, mild enough for float32 to stay within 3e-6.
_QK_GAIN = 1.6
_OUTPUT_GAIN = 0.5
_LOGIT_STD = 0.6


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, layers: int | None = None):
    """Return a tiny model of one family in eval mode, the same weights at every call.

    Parameters
    ----------
    name : str
        One of `FAMILIES`.
    dtype : torch.dtype, default=torch.float32
        Weights are always drawn in float32 and then cast, so that two dtypes differ by rounding only.
    seed : int, default=0
        Another seed gives another model.
    layers : int, optional
        Another depth than the family's own (2 or 3).
    """
    if name not in _SPECS:
        raise ValueError(f"family {name!r} is unknown; accepted: {', '.join(FAMILIES)}")
    model_class, config_class, options = _SPECS[name]
    depth = {} if layers is None else {"num_hidden_layers": layers}
    model = model_class(config_class(**{**_COMMON, **options, **depth})).eval()
    generator = torch.Generator().manual_seed(1000 * seed + FAMILIES.index(name))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(_draw(key, parameter.shape, generator, tied=model.config.tie_word_embeddings))
            if key.endswith("attention.query_key_value.weight"):
                heads = model.config.num_attention_heads
                parameter.view(heads, 3, -1, parameter.shape[1])[:, :2].mul_(_QK_GAIN)
    return model.to(dtype)


def _draw(key: str, shape: torch.Size, generator: torch.Generator, tied: bool) -> torch.Tensor:
    """Random values for the parameter called `key`; shape as given, float32."""
    noise = torch.randn(shape, generator=generator)
    if "embed" in key:
        return noise
    if tied and key == "model.norm.weight":  # logits are scaled here, as the embeddings cannot be
        return (1.0 + 0.1 * noise) * (_LOGIT_STD / shape[0] ** 0.5)
    if key.endswith("lm_head.weight"):
        return noise * (_LOGIT_STD / shape[1] ** 0.5)
    if key.endswith("bias"):
        return 0.1 * noise
    if key.endswith(("q_norm.weight", "k_norm.weight")):
        return _QK_GAIN * (1.0 + 0.1 * noise)
    if "norm" in key:
        return 1.0 + 0.1 * noise
    gain = 1.0
    if key.endswith(("q_proj.weight", "k_proj.weight")):
        gain = _QK_GAIN
    elif key.endswith(("o_proj.weight", "dense.weight", "down_proj.weight", "dense_4h_to_h.weight")):
        gain = _OUTPUT_GAIN
    return noise * (gain / shape[1] ** 0.5)


def token_ids(count: int, seed: int = 0, batch: int | None = None) -> torch.Tensor:
    """Random token ids in which some runs repeat; shape (count,), or (batch, count) if `batch` is given, int64."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(VOCAB, (batch or 1, count), generator=generator)
    for start in range(40, count - 12, 52):  # copy 12 tokens from 40 tokens ago, so that old keys matter
        rows[:, start : start + 12] = rows[:, start - 40 : start - 28]
    return rows if batch else rows[0]
