"""What the cache must know of a model's weights: that they can compute, and the dtype of the entries they make."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from sinkstream.cache.wrappers import is_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # in which plain modules compute
MAKE_ENTRIES = frozenset({"k_proj", "v_proj", "qkv_proj", "query_key_value"})  # projections of every family


def check_weights(model: PreTrainedModel) -> torch.dtype:
    """Check the weights of modules that compute with them as they are; returns the dtype of keys and values.

    Quantised modules, and weights that a hook brings or casts when they are needed, are left to those.

    Raises
    ------
    ValueError
        Naming the parameter, its device or dtype and what is accepted.
    """
    makers: dict[torch.dtype, str] = {}
    for name, parameter in _plain_parameters(model):
        if parameter.is_meta:
            raise ValueError(
                f"{name} lies on meta, so it has no values; accepted: weights that are loaded, on a CPU or GPU"
            )
        if parameter.is_floating_point() and parameter.dtype not in DTYPES:
            raise ValueError(
                f"{name} is {parameter.dtype}, in which {_owner(name)} cannot compute; accepted:"
                f" {', '.join(map(str, DTYPES))}, or a quantised model whose own modules compute"
            )
        if MAKE_ENTRIES & set(name.split(".")) and parameter.dtype in DTYPES:
            makers.setdefault(parameter.dtype, name)
    if len(makers) > 1 and not torch.is_autocast_enabled(model.device.type):
        (first, name), (second, other) = list(makers.items())[:2]
        raise ValueError(
            f"{name} is {first} and {other} is {second}, and the cache holds keys and values of one dtype; accepted:"
            " one dtype for the projections that make them, or a cache that is made under torch.autocast"
        )
    return next(iter(makers)) if len(makers) == 1 else model.dtype


def _plain_parameters(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters of torch's and transformers' own modules that no hook and no forward of an instance comes before."""
    if _is_prepared(module):
        return
    if type(module).forward.__module__.startswith(("torch.nn.modules.", "transformers.models.")):
        for name, parameter in module._parameters.items():
            if parameter is not None and type(parameter.data) is torch.Tensor:
                yield path + name, parameter
    for name, child in module._modules.items():
        if child is not None and not (is_adapter(module) and name != "base_layer"):
            yield from _plain_parameters(child, f"{path}{name}.")


def _is_prepared(module: nn.Module) -> bool:
    """Whether something of others' comes before the forward of a module, such as an offload of accelerate."""
    hooks = module._forward_pre_hooks.values()
    ours = "sinkstream."
    return "forward" in vars(module) or any(not str(getattr(hook, "__module__", "")).startswith(ours) for hook in hooks)


def _owner(name: str) -> str:
    return name.rpartition(".")[0] or "the model"
