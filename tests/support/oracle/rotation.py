"""Rotary frequencies of every layer, written out from the papers in float64."""

import math

import torch

F64 = torch.float64
# What a frequency may be off by where float32 takes base ** exponent, relative: half an ulp of the exponent times the
# logarithm of 10,000 is 5.5e-7, the power itself two ulps on some machines, each of two divisions half an ulp.
FLOAT32_POWER = 1e-6


def rope_frequencies(config, kind: str = "full_attention") -> tuple[torch.Tensor, float]:
    """Angle per position of each rotary pair, and the factor on cos and sin, inside the original length.

    Parameters
    ----------
    kind : str
        Layer type, where layer types have rotations of their own.

    Returns
    -------
    frequencies : torch.Tensor
        (rotary_dims / 2,) float64, radians per position.
    factor : float
        1 except for yarn and longrope; it multiplies cos and sin, so it enters once through q and once through k.
    """
    rope = config.rope_parameters
    rope = rope.get(kind, rope)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dims = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    pairs = torch.arange(dims // 2, dtype=F64)
    base, kind = rope["rope_theta"], rope["rope_type"]
    plain = base ** (-2 * pairs / dims)
    if kind in ("default", "dynamic"):
        return plain, 1.0
    if kind == "linear":
        return plain / rope["factor"], 1.0
    if kind not in ("llama3", "yarn", "longrope"):
        raise ValueError(f"rope_type {kind!r} is unknown to the oracle")
    trained = rope["original_max_position_embeddings"]
    if kind == "longrope":
        longer = rope.get("factor") or config.max_position_embeddings / trained
        return plain / torch.tensor(rope["short_factor"], dtype=F64), math.sqrt(1 + math.log(max(longer, 1), trained))
    if kind == "llama3":
        turns = trained * plain / (2 * math.pi)  # rotations of a pair over the trained length
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return plain * (keep + (1 - keep) / rope["factor"]), 1.0
    return _yarn(rope, plain, pairs, dims, base, trained)


def _yarn(rope, plain, pairs, dims, base, trained) -> tuple[torch.Tensor, float]:
    """YaRN (arXiv 2309.00071): fast pairs keep their frequency, slow ones are divided by the factor, a ramp between."""
    if rope.get("mscale") or rope.get("mscale_all_dim"):
        raise ValueError("the oracle does not know yarn's mscale")

    def pair_turning(turns: float) -> float:
        return dims / 2 * math.log(trained / (2 * math.pi * turns), base)

    first, last = pair_turning(rope.get("beta_fast") or 32), pair_turning(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dims - 1)
    slow = ((pairs - first) / (last - first)).clamp(0, 1)
    given = rope.get("attention_factor")
    factor = given if given is not None else 0.1 * math.log(rope["factor"]) + 1
    return plain * (1 - slow + slow / rope["factor"]), factor


def rotation_of_layer(config, layer: int) -> tuple[torch.Tensor | None, float]:
    """`rope_frequencies` of one layer; no frequencies where it does not rotate."""
    turns = getattr(config, "no_rope_layers", None)  # 1 where a layer does
    if turns is not None and not turns[layer]:
        return None, 1.0
    kinds = getattr(config, "layer_types", None)
    return rope_frequencies(config, kinds[layer] if kinds else "full_attention")
