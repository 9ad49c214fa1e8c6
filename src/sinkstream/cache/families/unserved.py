"""Model types that the cache does not serve, each with its reason; the refusal prints the reason."""

_ALIBI = "ALiBi instead of rotary positions"
_LATENT = "multi-head latent attention"
_LEARNED = "learned absolute positions"
_STATE = "a recurrent state instead of a KV cache"
_MIXED = "recurrent layers beside attention layers"
_INTERLEAVED = "rotary pairs of neighbours (2i, 2i + 1); the cache rotates pairs (i, i + rotary_dim / 2)"
_UNTESTED = "not compared with a reference model yet"

UNSERVED = {
    "apertus": _UNTESTED,
    "arcee": _UNTESTED,
    "bamba": _MIXED,
    "bloom": _ALIBI,
    "codegen": _INTERLEAVED,
    "cohere": _INTERLEAVED,
    "cohere2": _INTERLEAVED,
    "dbrx": _UNTESTED,
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "diffllama": "differential attention: two softmaxes over the same keys",
    "ernie4_5": _INTERLEAVED,
    "exaone4": _UNTESTED,
    "falcon_h1": _MIXED,
    "falcon_mamba": _STATE,
    "gemma3": "images among the tokens; accepted: its text model, gemma3_text",
    "gemma3n": "layers that share the keys and values of other layers",
    "glm": _INTERLEAVED,
    "glm4": _INTERLEAVED,
    "gpt2": _LEARNED,
    "gpt_bigcode": _LEARNED,
    "gpt_neo": _LEARNED,
    "gptj": _INTERLEAVED,
    "granitemoe": _UNTESTED,
    "helium": _INTERLEAVED,
    "jamba": _MIXED,
    "llama4": "images among the tokens, and chunked attention layers",
    "llama4_text": "chunked attention layers, and a temperature that depends on the position",
    "mamba": _STATE,
    "mamba2": _STATE,
    "mistral3": "images among the tokens; accepted: its text model, mistral",
    "mpt": _ALIBI,
    "nemotron": _UNTESTED,
    "olmo": _UNTESTED,
    "olmoe": _UNTESTED,
    "opt": _LEARNED,
    "phi": _UNTESTED,
    "phimoe": _UNTESTED,
    "qwen2_vl": "images among the tokens, and positions of three axes",
    "qwen3_next": _MIXED,
    "recurrent_gemma": _MIXED,
    "rwkv": _STATE,
    "starcoder2": _UNTESTED,
    "xglm": "sinusoidal absolute positions",
}
