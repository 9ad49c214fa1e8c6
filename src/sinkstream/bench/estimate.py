"""What a benchmark will take, memory and time, as far as it is known before a model is loaded."""

from collections.abc import Sequence

import torch

from sinkstream.bench.rungs import fitted
from sinkstream.bench.settings import BenchConfig, Protocol
from sinkstream.measure.bandwidth import Bandwidth
from sinkstream.measure.memory import free_bytes
from sinkstream.models import shape_sizes, source_name
from sinkstream.models.shapes import PREFIX

WORTH_SAYING_SEC = 60.0


def check_fits(model: str, dtype: torch.dtype, device: torch.device, slots: int) -> None:
    """Raise ValueError if a random shape and that many cached tokens cannot fit; nothing is allocated.

    Other models pass: the size of their weights is known when they are loaded, and their caches are checked then.
    """
    if source_name(model) != "random":
        return
    weights, cached = (count * dtype.itemsize for count in shape_sizes(model.removeprefix(PREFIX)))
    free = free_bytes(device)
    if weights + slots * cached > free:
        raise ValueError(
            f"{model} in {str(dtype).removeprefix('torch.')} takes {weights / 1e9:.2f} GB of weights and"
            f" {slots * cached / 1e9:.2f} GB of keys and values, and {free / 1e9:.2f} GB are free on {device};"
            " accepted: a smaller shape, --cap or --streams, fewer policies, or a --dtype of fewer bytes"
        )


def long_run(
    model: str, weight_bytes: int | None, ceiling: Bandwidth, protocol: Protocol, configs: Sequence[BenchConfig]
) -> str | None:
    """How long the tokens of all configurations take at least, in words.

    None if that is not worth saying, or the bytes of the weights are not known before they are loaded.
    Every token of a configuration reads all weights once, at the speed of a copy at best.
    """
    if weight_bytes is None:
        return None
    token_sec = ceiling.milliseconds(weight_bytes) / 1e3
    seconds, tokens = 0.0, 0
    for config in configs:
        its = fitted(protocol, config)
        steady = its.tokens * token_sec
        seconds += its.warmup * token_sec + (steady if its.seconds is None else min(steady, its.seconds))
        tokens += its.warmup + its.tokens
    if seconds < WORTH_SAYING_SEC:
        return None
    return (
        f"{model}: each of {tokens:,} tokens reads {weight_bytes / 1e9:.1f} GB of weights, {token_sec:.2f} s at the"
        f" speed of a copy: at least {seconds / 60:,.0f} min, prompts not counted. Sooner: fewer --tokens (and"
        " --warmup), --seconds, a smaller --shape or --model"
    )
