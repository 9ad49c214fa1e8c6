"""Models inside wrappers: PEFT's, torch.compile's, and those of data parallelism on one device.

A wrapper hands its calls to the model inside, and often `generate()` as well. The hooks and the decode step belong to
that model, however it is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ACCEPTED = "a transformers model, alone or inside PeftModel, torch.compile, DataParallel or DistributedDataParallel"


def inner_model(model: Any) -> PreTrainedModel:
    """The transformers model inside any number of wrappers; a transformers model is returned as it is.

    Raises
    ------
    ValueError
        If no transformers model is found, a wrapper spreads its calls over several devices, or the active PEFT method
        adds virtual tokens of its own (prompt and prefix tuning).
    """
    from transformers import PreTrainedModel

    found = model
    while not isinstance(found, PreTrainedModel):
        if isinstance(found, nn.DataParallel) and len(found.device_ids) > 1:
            raise ValueError(
                f"DataParallel over {len(found.device_ids)} devices copies its model for every call, and a copy has no"
                " cache; accepted: one device, or the model inside (model.module)"
            )
        _check_virtual_tokens(found)
        inside = _inside(found)
        if inside is None:
            raise ValueError(f"model={type(model).__name__} is not accepted; accepted: {ACCEPTED}")
        found = inside
    return found


def is_adapter(module: nn.Module) -> bool:
    """Whether a module wraps a projection or an embedding in an adapter, as the layers of PEFT do."""
    return isinstance(getattr(module, "base_layer", None), nn.Module)


def plain(module: nn.Module) -> Any:
    """The module that holds the weights: `module`, or what adapters have been put around."""
    while is_adapter(module):
        module = module.base_layer  # type: ignore[assignment]
    return module


def _inside(wrapper: Any) -> nn.Module | None:
    """What one wrapper holds; None for what is no known wrapper."""
    if not isinstance(wrapper, nn.Module):
        return None
    inside: Any = wrapper._modules.get("_orig_mod")  # torch.compile
    if inside is None and isinstance(wrapper, nn.DataParallel | nn.parallel.DistributedDataParallel):
        inside = wrapper.module
    if inside is None and callable(getattr(wrapper, "get_base_model", None)):  # PeftModel
        inside = wrapper.get_base_model()
    if inside is None and hasattr(wrapper, "peft_config"):  # LoraModel and its like, the second of PEFT's wrappers
        inside = wrapper._modules.get("model")
    return inside if isinstance(inside, nn.Module) and inside is not wrapper else None


def _check_virtual_tokens(wrapper: Any) -> None:
    if isinstance(wrapper, nn.Module) and "_orig_mod" not in wrapper._modules:
        config = getattr(wrapper, "active_peft_config", None)
        if getattr(config, "is_prompt_learning", False):
            raise ValueError(
                f"{type(wrapper).__name__} with {type(config).__name__} adds virtual tokens to its calls, which a cache"
                " cannot tell from the text; accepted: adapters of weights, as LoRA"
            )


def is_compiled(model: Any) -> bool:
    """Whether calls of a model, or of a wrapper of it, run through torch.compile."""
    from transformers import PreTrainedModel

    while isinstance(model, nn.Module):
        own = vars(model)
        if "_orig_mod" in model._modules or own.get("_compiled_call_impl") is not None:
            return True
        if hasattr(own.get("forward"), "_torchdynamo_orig_callable"):  # model.forward = torch.compile(model.forward)
            return True
        if isinstance(model, PreTrainedModel):
            break
        model = _inside(model)
    return False
