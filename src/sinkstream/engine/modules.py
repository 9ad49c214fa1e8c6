"""Which modules the decode step stands for, and the refusal of everything that a module does besides its formula.

A decode step reads weights and calls no module, while prompts go through the modules. A module that computes anything
else than its class does from plain weights (an adapter, a quantised projection, a hook, a patched forward) would make
the two disagree without a word. So each is refused by path, class and way out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules import module as torch_modules
from torch.nn.utils.parametrize import is_parametrized

from sinkstream.cache.wrappers import is_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NEOX = "gpt_neox"
LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
ACTIVATIONS = {NEOX: "gelu"} | dict.fromkeys(LLAMA_LIKE, "silu")
PROJECTIONS = frozenset(
    {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
    | {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
)
HARMLESS_HOOKS = ("sinkstream.cache.", "transformers.utils.output_capturing")  # modules that define them
QUANTISERS = (
    "torchao", "bitsandbytes", "auto_gptq", "gptqmodel", "awq", "hqq", "optimum", "compressed_tensors",
    "transformers.integrations", "torch.ao", "eetq", "aqlm", "vptq", "fbgemm_gpu",
)  # fmt: skip
GLOBAL_HOOKS = (torch_modules._global_forward_hooks, torch_modules._global_forward_pre_hooks)
INSTEAD = "or use StreamingCache with this model (backend hf), which calls its modules"


@dataclass(frozen=True)
class Part:
    """One module that the decode step stands for.

    Attributes
    ----------
    path : str
        In the model, as if adapters were not there; "" for the model itself.
    module : nn.Module
    siblings : dict of nn.Module or None
        The children of the parent, where `name` leads to the module; None for the model itself.
    name : str
    """

    path: str
    module: nn.Module
    siblings: dict[str, nn.Module | None] | None
    name: str

    @property
    def what(self) -> str:
        """Path and class, for messages."""
        kind = type(self.module)
        return f"{self.path or 'the model'} ({kind.__name__} of {kind.__module__})"


def parts(model: PreTrainedModel) -> Iterator[Part]:
    """Every module of the decoder and the head, wrappers of adapters before what they wrap; adapters are left out."""
    yield Part("", model, None, "")
    head, decoder = model.get_output_embeddings(), model.get_decoder()
    for name, child in model._modules.items():
        if child is not None and (child is head or child is decoder):
            yield from _below(Part(name, child, model._modules, name))


def _below(part: Part) -> Iterator[Part]:
    yield part
    children = part.module._modules
    if is_adapter(part.module):
        yield from _below(Part(part.path, part.module.base_layer, children, "base_layer"))  # type: ignore[arg-type]
        return
    for name, child in children.items():
        if child is not None:
            yield from _below(Part(f"{part.path}.{name}", child, children, name))


def check_modules(model: PreTrainedModel) -> None:
    """Raise ValueError, with path, class and way out, if a module does anything that the decode step does not."""
    if any(GLOBAL_HOOKS):
        raise ValueError(
            "a global forward hook (torch.nn.modules.module.register_module_forward_hook) is not served by the engine,"
            " whose steps call no module; remove it"
        )
    from transformers.activations import ACT2FN  # slow to import

    activation = type(ACT2FN[model.config.hidden_act])
    for part in parts(model):
        _check_calls(part)
        if is_adapter(part.module):
            _check_adapter(part)
        else:
            _check_formula(part, activation)
            _check_parameters(part)


def _refuse(part: Part, why: str, way_out: str) -> None:
    raise ValueError(
        f"{part.what} {why}; the engine, whose steps read plain weights and call no module, would pass it over:"
        f" {way_out}, {INSTEAD}"
    )


def _check_calls(part: Part) -> None:
    """Refuse hooks and a forward that was set on the instance."""
    module = part.module
    if hasattr(module, "_hf_hook"):
        _refuse(
            part,
            "has a hook of accelerate",
            "load the model on one device, or accelerate.hooks.remove_hook_from_module",
        )
    if "forward" in vars(module):
        _refuse(part, f"has a forward of its own, {_named(module.forward)}", "restore it (del module.forward)")
    for kind, hooks in (("hook", module._forward_hooks), ("pre-hook", module._forward_pre_hooks)):
        for hook in hooks.values():
            if not str(getattr(hook, "__module__", None)).startswith(HARMLESS_HOOKS):
                _refuse(part, f"has a forward {kind}, {_named(hook)}", "remove it (the handle's remove())")


def _named(function: Any) -> str:
    return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__name__)}"


def _check_adapter(part: Part) -> None:
    """Accept an adapter that passes its input to the wrapped module alone: merged, disabled, or not an active one."""
    layer: Any = part.module
    merged, disabled = getattr(layer, "merged_adapters", None), getattr(layer, "disable_adapters", False)
    active = list(getattr(layer, "active_adapters", None) or ["unknown"])
    if merged and disabled:
        _refuse(
            part, "is disabled while it is merged, and unmerges itself when it is called", "unmerge_adapter() first"
        )
    if merged or (disabled is True and merged is not None):
        return
    held = layer._get_available_adapters() if hasattr(layer, "_get_available_adapters") else set(active)
    working = [name for name in active if name in held]
    if working:
        way_out = "call merge_and_unload(), or merge_adapter(), of the PEFT model first"
        _refuse(part, f"has an adapter that is not merged ({', '.join(working)})", way_out)


def _check_formula(part: Part, activation: type) -> None:
    """Refuse a module whose class computes something else than the decode step does in its place."""
    module, kind = part.module, type(part.module)
    forward: Any = kind.forward
    if is_parametrized(module):
        way_out = "torch.nn.utils.parametrize.remove_parametrizations(module, name)"
        _refuse(part, f"has parametrizations of {', '.join(module.parametrizations)}", way_out)  # type: ignore
    leaf = part.path.rpartition(".")[2]
    if leaf in PROJECTIONS or leaf in ("lm_head", "embed_out"):
        right = forward is nn.Linear.forward
    elif isinstance(module, nn.Embedding):
        right = forward is nn.Embedding.forward and module.max_norm is None
    elif leaf in ("act", "act_fn"):
        right = kind is activation
    else:
        right = str(forward.__module__).startswith(("transformers.models.", "torch.nn.modules."))
        if any(p is not None for p in module._parameters.values()):
            right = right and (forward is nn.LayerNorm.forward or is_rms_norm(module))
    if right:
        return
    if kind.__module__.startswith(QUANTISERS):
        _refuse(part, "is quantised", "load the model without quantisation, or dequantise it (model.dequantize())")
    plainly = "put a plain module in its place (a torch.nn.Linear for a projection)"
    if str(forward.__module__) != kind.__module__:
        plainly = f"restore its class's forward, which is {_named(forward)} now"
    _refuse(part, "computes something else than the plain module that the engine knows", plainly)


def _check_parameters(part: Part) -> None:
    for name, parameter in part.module._parameters.items():
        if parameter is None or (type(parameter) is nn.Parameter and type(parameter.data) is torch.Tensor):
            continue
        kind = type(parameter) if type(parameter) is not nn.Parameter else type(parameter.data)
        way_out = "load the model without quantisation, or dequantise it, and do not shard it"
        _refuse(part, f"holds its {name} in a tensor of class {kind.__name__} of {kind.__module__}", way_out)


def is_rms_norm(module: Any) -> bool:
    """Whether a module is an RMS norm of transformers: one weight, no bias, variance_epsilon."""
    return hasattr(module, "variance_epsilon") and module.weight.ndim == 1
