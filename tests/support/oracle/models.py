"""Tiny random transformers models of every supported family, whose attention is sharp and depends on position.

A freshly initialised tiny model attends almost uniformly, so that dropping the wrong token or using the wrong position
hardly changes its output. Here every weight is drawn anew: linear layers keep the scale of their input, queries and
keys get an extra gain, and norms and biases are off their defaults, so that a forgotten one shows.
"""

import torch
import transformers

VOCAB = 97
MAX_POSITIONS = 1024
THETA = 10000.0
WINDOW = 21  # of sliding layers: neither the window of a policy nor a multiple of anything

_COMMON = {
    "vocab_size": VOCAB,
    "max_position_embeddings": MAX_POSITIONS,
    "num_hidden_layers": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_GQA = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
_NEOX = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
_FALCON = {"hidden_size": 64, "ffn_hidden_size": 96, "num_attention_heads": 4, "tie_word_embeddings": False}
_GEMMA = {**_GQA, "head_dim": 16, "query_pre_attn_scalar": 12, "tie_word_embeddings": False}
_MOE = {**_GQA, "num_experts_per_tok": 2}
_QWEN_MOE = {**_MOE, "num_experts": 4, "moe_intermediate_size": 48, "norm_topk_prob": True}


def _rope(kind: str = "default", **extra) -> dict:
    return {"rope_type": kind, "rope_theta": THETA, **extra}


def _hybrid(*slides: int, **more) -> dict:
    kinds = ["sliding_attention" if slide else "full_attention" for slide in slides]
    return {"num_hidden_layers": len(kinds), "layer_types": kinds, "sliding_window": WINDOW, **more}


def _by_kind(full: dict, sliding: dict) -> dict:
    return {"full_attention": full, "sliding_attention": sliding}


_LLAMA3 = _rope(
    "llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=MAX_POSITIONS // 4
)
_YARN = _rope("yarn", factor=4.0, original_max_position_embeddings=MAX_POSITIONS // 4)
_LONGROPE = _rope(
    "longrope",
    short_factor=[1.0, 1.1, 1.3, 1.2, 1.5, 1.7],
    long_factor=[2.0] * 6,
    original_max_position_embeddings=MAX_POSITIONS // 2,
    partial_rotary_factor=0.75,
)

# name -> (what classes of transformers are called before "Config" and "ForCausalLM", options)
_SPECS = {
    "gpt_neox": (
        "GPTNeoX",
        {**_NEOX, "use_parallel_residual": True, "rope_parameters": _rope(partial_rotary_factor=0.25)},
    ),
    "gpt_neox_sequential": (
        "GPTNeoX",
        {
            **_NEOX,
            "num_hidden_layers": 3,
            "use_parallel_residual": False,
            "rope_parameters": _rope(partial_rotary_factor=1.0),
        },
    ),
    "llama": ("Llama", {**_GQA, "num_hidden_layers": 3, "rope_parameters": _rope()}),
    "llama_linear": ("Llama", {**_GQA, "rope_parameters": _rope("linear", factor=2.0)}),
    "llama_llama3": ("Llama", {**_GQA, "rope_parameters": _LLAMA3}),
    "llama_yarn": ("Llama", {**_GQA, "rope_parameters": _YARN}),
    "mistral": ("Mistral", {**_GQA, "sliding_window": None, "rope_parameters": _rope()}),
    "qwen2": (
        "Qwen2",
        {**_GQA, "num_key_value_heads": 1, "use_sliding_window": False, "rope_parameters": _rope()},
    ),
    "qwen3": (
        "Qwen3",
        {**_GQA, "hidden_size": 48, "head_dim": 24, "tie_word_embeddings": True, "rope_parameters": _rope()},
    ),
}
ENGINE = list(_SPECS)  # of families that the engine serves as well
_SPECS |= {
    "llama_dynamic": ("Llama", {**_GQA, "rope_parameters": _rope("dynamic", factor=2.0)}),
    "phi3": ("Phi3", {**_GQA, "rope_parameters": _rope()}),
    "phi3_longrope": (
        "Phi3",
        {**_GQA, "original_max_position_embeddings": MAX_POSITIONS // 2, "rope_parameters": _LONGROPE},
    ),
    "olmo2": ("Olmo2", {**_GQA, "rope_parameters": _rope()}),
    "granite": (
        "Granite",
        {
            **_GQA,
            "embedding_multiplier": 1.5,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.7,
            "logits_scaling": 1.3,
            "rope_parameters": _rope(),
        },
    ),
    "stablelm": ("StableLm", {**_GQA, "use_qkv_bias": True, "rope_parameters": _rope(partial_rotary_factor=0.5)}),
    "stablelm_parallel": (
        "StableLm",
        {
            **_GQA,
            "use_parallel_residual": True,
            "qk_layernorm": True,
            "rope_parameters": _rope(partial_rotary_factor=0.5),
        },
    ),
    "falcon": ("Falcon", {**_FALCON, "rope_parameters": _rope()}),
    "falcon_sequential": (
        "Falcon",
        {**_FALCON, "multi_query": False, "parallel_attn": False, "bias": True, "rope_parameters": _rope()},
    ),
    "falcon_grouped": (
        "Falcon",
        {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "rope_parameters": _rope()},
    ),
    "smollm3": (
        "SmolLM3",
        {
            **_GQA,
            "num_hidden_layers": 3,
            "no_rope_layers": [1, 0, 1],
            "tie_word_embeddings": False,
            "rope_parameters": _rope(),
        },
    ),
    "mixtral": ("Mixtral", {**_MOE, "num_local_experts": 4, "sliding_window": None, "rope_parameters": _rope()}),
    "qwen2_moe": (
        "Qwen2Moe",
        {**_QWEN_MOE, "norm_topk_prob": False, "shared_expert_intermediate_size": 40, "rope_parameters": _rope()},
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {**_QWEN_MOE, "hidden_size": 48, "head_dim": 24, "mlp_only_layers": [0], "rope_parameters": _rope()},
    ),
}
_SPECS |= {
    "qwen2_sliding": ("Qwen2", {**_GQA, **_hybrid(0, 1, use_sliding_window=True), "rope_parameters": _rope()}),
    "qwen3_sliding": (
        "Qwen3",
        {**_GQA, "head_dim": 24, **_hybrid(1, 0, 1, use_sliding_window=True), "rope_parameters": _rope()},
    ),
    "smollm3_sliding": (
        "SmolLM3",
        {
            **_GQA,
            **_hybrid(0, 1, 1, 0, use_sliding_window=True),
            "no_rope_layers": [1, 0, 1, 0],
            "tie_word_embeddings": False,
            "rope_parameters": _rope(),
        },
    ),
    "olmo3": ("Olmo3", {**_GQA, **_hybrid(1, 1, 0), "rope_parameters": _by_kind(_YARN, _rope())}),
    "gemma2": (
        "Gemma2",
        {
            **_GEMMA,
            **_hybrid(1, 0),
            "attn_logit_softcapping": 6.0,
            "final_logit_softcapping": 3.0,
            "attn_implementation": "eager",
            "rope_parameters": _rope(),
        },
    ),
    "gemma3": (
        "Gemma3",
        {
            **_GEMMA,
            **_hybrid(1, 0),
            "rope_parameters": _by_kind(_rope("linear", factor=2.0) | {"rope_theta": 1e6}, _rope()),
        },
    ),
    "gpt_oss": (
        "GptOss",
        {
            **_MOE,
            **_hybrid(1, 0),
            "head_dim": 16,
            "num_local_experts": 4,
            "rope_parameters": _YARN | {"truncate": False},
        },
    ),
}

# The seed of a model is its place in this table: new ones go to the end.
_SPECS |= {
    "gemma": ("Gemma", {**_GQA, "head_dim": 16, "tie_word_embeddings": False, "rope_parameters": _rope()}),
}
FAMILIES = list(_SPECS)
HYBRID = [name for name in FAMILIES if "layer_types" in _SPECS[name][1]]
UNIFORM = [name for name in FAMILIES if name not in HYBRID]  # all layers attend to everything

# Sharp enough for an error of one position to move the NLL by tenths, mild enough for float32 to stay within 3e-6.
_QK_GAIN = 1.6
_OUTPUT_GAIN = 0.5
_LOGIT_STD = 0.6
_POST_NORMED = ("Olmo2", "Olmo3", "Gemma2", "Gemma3")  # what attention and MLP add is normed


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, layers: int | None = None, **config_options):
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
        Another depth than the family's own (2 or 3); not for hybrid models.
    **config_options
        Other values than the family's own.
    """
    if name not in _SPECS:
        raise ValueError(f"family {name!r} is unknown; accepted: {', '.join(FAMILIES)}")
    prefix, options = _SPECS[name]
    depth = {} if layers is None else {"num_hidden_layers": layers}
    config_class = getattr(transformers, ("Gemma3Text" if prefix == "Gemma3" else prefix) + "Config")
    config = config_class(**{**_COMMON, **options, **depth, **config_options})
    model = getattr(transformers, prefix + "ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(1000 * seed + FAMILIES.index(name))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(_draw(key, parameter.shape, generator, tied=model.config.tie_word_embeddings))
            if "attention.query_key_value.weight" in key or key.endswith("qkv_proj.weight"):
                _fused_queries_and_keys(parameter, config).mul_(_QK_GAIN)
            if prefix in _POST_NORMED and "post_" in key:
                parameter.mul_(_OUTPUT_GAIN)
            if prefix.startswith("Gemma"):
                _around_one(key, parameter)
    return model.to(dtype)


def _fused_queries_and_keys(weight: torch.Tensor, config) -> torch.Tensor:
    """The rows of queries and keys of a fused projection, in whatever order the family has them: a view."""
    heads, kind = config.num_attention_heads, config.model_type
    dim = config.hidden_size // heads
    if kind == "phi3":
        return weight[: -config.num_key_value_heads * dim]
    if kind == "falcon" and config.new_decoder_architecture:
        return weight.view(config.num_kv_heads, -1, dim, weight.shape[1])[:, :-1]
    if kind == "falcon" and config.multi_query:
        return weight[:-dim]
    return weight.view(heads, 3, dim, weight.shape[1])[:, :2]


def _around_one(key: str, parameter: torch.Tensor) -> None:
    """Gemma adds 1 to the weights of its norms, and scales its embedding by the root of the width."""
    if "norm" in key:
        parameter.sub_(1.0)
    if "embed" in key:
        parameter.div_(parameter.shape[1] ** 0.5)


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
    if key.endswith("sinks"):
        return 1.0 + noise
    if key.endswith(("q_norm.weight", "k_norm.weight")) or "q_layernorm" in key or "k_layernorm" in key:
        return _QK_GAIN * (1.0 + 0.1 * noise)
    if "norm" in key or "ln_" in key:
        return 1.0 + 0.1 * noise
    if "experts" in key:
        return noise * (_OUTPUT_GAIN if "down" in key else 1.0) / min(shape[1:]) ** 0.5
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
