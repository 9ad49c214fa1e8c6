"""Packed weights: the rows that one kernel reads, in one contiguous tensor.

Packing goes layer by layer. The module's parameters become views of the packed storage, so that the transformers
forward (which prefills) and the decode step share one copy, and at most one layer is ever held twice. A packed model
computes what it computed before; to write it to disk, save it first or copy its state dict.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from sinkstream.cache import ModelSpec
from sinkstream.cache.wrappers import is_adapter, plain
from sinkstream.engine.modules import ACTIVATIONS, NEOX, check_modules, parts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_packed: WeakKeyDictionary = WeakKeyDictionary()


@dataclass(frozen=True)
class Norm:
    """A LayerNorm (with bias) or an RMSNorm (without): weight and bias ``(width,)``."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    eps: float


@dataclass(frozen=True)
class NeoxLayer:
    """A GPT-NeoX layer with parallel residual: two products.

    Attributes
    ----------
    attention_norm, mlp_norm : Norm
        For the first ``3 * heads * head_dim`` rows of `weight_in`, and for the others.
    weight_in : Tensor, (3 * heads * head_dim + intermediate, hidden)
        Queries, keys and values (per head q, k, v), then the up-projection.
    bias_in : Tensor, (rows of weight_in,)
    weight_out : Tensor, (hidden, heads * head_dim + intermediate)
        Attention output and down-projection side by side.
    bias_out : Tensor, (hidden,)
        Sum of both biases.
    """

    attention_norm: Norm
    mlp_norm: Norm
    weight_in: torch.Tensor
    bias_in: torch.Tensor
    weight_out: torch.Tensor
    bias_out: torch.Tensor


@dataclass(frozen=True)
class LlamaLayer:
    """A Llama-like layer: four products.

    Attributes
    ----------
    weight_qkv : Tensor, ((query_heads + 2 * kv_heads) * head_dim, hidden)
        All queries, all keys, all values.
    weight_o : Tensor, (hidden, query_heads * head_dim)
    weight_gate_up : Tensor, (2 * intermediate, hidden)
        All gate rows, then all up rows.
    weight_down : Tensor, (hidden, intermediate)
    bias_qkv, bias_o, bias_gate_up, bias_down : Tensor or None
    q_norm, k_norm : Norm or None
        Over head_dim, before the rotation (Qwen3).
    """

    attention_norm: Norm
    mlp_norm: Norm
    weight_qkv: torch.Tensor
    weight_o: torch.Tensor
    weight_gate_up: torch.Tensor
    weight_down: torch.Tensor
    bias_qkv: torch.Tensor | None
    bias_o: torch.Tensor | None
    bias_gate_up: torch.Tensor | None
    bias_down: torch.Tensor | None
    q_norm: Norm | None
    k_norm: Norm | None


@dataclass(frozen=True)
class PackedWeights:
    """All weights that a decode step reads.

    Attributes
    ----------
    family : str
        ``config.model_type``.
    layers : tuple of NeoxLayer or LlamaLayer
    embedding : Tensor, (vocab, hidden)
    final_norm : Norm
    head : Tensor, (vocab, hidden)
        The same tensor as `embedding` where these are tied.
    rope_factor : float
        What rotated dimensions of queries and keys are multiplied by (yarn; 1 otherwise).
    step_bytes : int
        Bytes of weights that one step reads, the input embedding left out.
    """

    family: str
    layers: tuple
    embedding: torch.Tensor
    final_norm: Norm
    head: torch.Tensor
    rope_factor: float

    @property
    def step_bytes(self) -> int:
        held = [t for part in (*self.layers, self.final_norm) for t in _tensors(part)]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*held, self.head)}
        return sum(storages.values())


@torch.no_grad()
def pack(model: PreTrainedModel) -> PackedWeights:
    """Pack the weights of a causal language model in place, or find them packed already.

    Raises
    ------
    ValueError
        If the engine does not serve this model; nothing has been touched then.
    """
    check_packable(model)
    known = _packed.get(model)
    if known is not None and known[1] == _addresses(model):
        return known[0]
    decoder: Any = model.get_decoder()
    embedding, head = plain(model.get_input_embeddings()), plain(model.get_output_embeddings())
    neox = model.config.model_type == NEOX
    with torch.inference_mode(False), torch.no_grad():  # the first alone would switch gradients on again
        layers = tuple((_pack_neox if neox else _pack_llama)(layer) for layer in decoder.layers)
    packed = PackedWeights(
        family=model.config.model_type,
        layers=layers,
        embedding=embedding.weight.detach(),
        final_norm=_norm(decoder.final_layer_norm if neox else decoder.norm),
        head=head.weight.detach(),
        rope_factor=float(getattr(decoder.rotary_emb, "attention_scaling", 1.0)),
    )
    _packed[model] = packed, _addresses(model)
    return packed


def check_packable(model: PreTrainedModel) -> None:
    """Refuse, by name, what the decode step does not serve. Raises ValueError."""
    config, name = model.config, model.config.model_type
    if name not in ACTIVATIONS:
        raise ValueError(f"model type {name!r} is not served by the engine; accepted: {', '.join(ACTIVATIONS)}")
    if name == NEOX and not config.use_parallel_residual:
        raise ValueError(
            "gpt_neox with use_parallel_residual=False (sequential residual) is not served by the engine;"
            " accepted: use_parallel_residual=True, or the StreamingCache with this model (backend hf)"
        )
    if config.hidden_act != ACTIVATIONS[name]:
        raise ValueError(
            f"{name} with hidden_act={config.hidden_act!r} is not served by the engine; accepted: {ACTIVATIONS[name]}"
        )
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no language-model head; give the causal language model")
    check_modules(model)
    if plain(head).bias is not None:
        raise ValueError(f"{type(model).__name__} has a head with a bias; accepted: a head without bias")
    weights = _parameters(model)
    devices = {p.device for p in weights}
    if len(devices) > 1 or any(d.type == "meta" for d in devices):
        raise ValueError(
            f"a model spread over {', '.join(sorted(map(str, devices)))} is not served by the engine;"
            " accepted: all weights on one device"
        )
    dtypes = {p.dtype for p in weights}
    if len(dtypes) > 1 or dtypes - {torch.float16, torch.bfloat16, torch.float32}:
        raise ValueError(
            f"weights of dtype {', '.join(sorted(str(d).removeprefix('torch.') for d in dtypes))} are not served by the"
            " engine; accepted: all of one dtype, float16, bfloat16 or float32"
        )


def check_layers(spec: ModelSpec) -> None:
    """Refuse, by name, attention that the decode step does not serve. Raises ValueError."""
    instead = "or the StreamingCache with this model (backend hf)"
    if spec.sliding is not None:
        raise ValueError(
            f"{spec.family} with {len(spec.sliding.layers)} sliding layers is not served by the engine;"
            f" accepted: full attention in every layer, {instead}"
        )
    if spec.original_length is not None:
        raise ValueError(
            f"{spec.family} with rotary frequencies that are constant inside {spec.original_length} positions only is"
            f" not served by the engine; accepted: other rotary types, {instead}"
        )


def _pack_neox(layer: Any) -> NeoxLayer:
    attention, mlp = layer.attention, layer.mlp
    weight_in, bias_in = _stack_rows(attention.query_key_value, mlp.dense_h_to_4h)
    if bias_in is None:
        bias_in = weight_in.new_zeros(len(weight_in))
    weight_out = _stack_columns(attention.dense, mlp.dense_4h_to_h)
    bias_out = _bias_out(layer)
    return NeoxLayer(
        attention_norm=_norm(layer.input_layernorm),
        mlp_norm=_norm(layer.post_attention_layernorm),
        weight_in=weight_in,
        bias_in=bias_in,
        weight_out=weight_out,
        bias_out=bias_out,
    )


def _bias_out(layer: Any) -> torch.Tensor:
    """Sum of the biases of the attention output and the down-projection of a GPT-NeoX layer, ``(hidden,)``."""
    outputs = [plain(layer.attention.dense), plain(layer.mlp.dense_4h_to_h)]
    biases = [m.bias.float() for m in outputs if m.bias is not None]
    return torch.stack(biases).sum(0).to(outputs[0].weight.dtype)


def sum_biases(model: PreTrainedModel, weights: PackedWeights) -> None:
    """Compute again, in place, what packing has computed of the weights: the summed biases of GPT-NeoX layers."""
    decoder: Any = model.get_decoder()
    for layer, packed in zip(decoder.layers, weights.layers):
        if isinstance(packed, NeoxLayer):
            packed.bias_out.copy_(_bias_out(layer))


def _pack_llama(layer: Any) -> LlamaLayer:
    attention, mlp = layer.self_attn, layer.mlp
    weight_qkv, bias_qkv = _stack_rows(attention.q_proj, attention.k_proj, attention.v_proj)
    weight_gate_up, bias_gate_up = _stack_rows(mlp.gate_proj, mlp.up_proj)
    q_norm, k_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    return LlamaLayer(
        attention_norm=_norm(layer.input_layernorm),
        mlp_norm=_norm(layer.post_attention_layernorm),
        weight_qkv=weight_qkv,
        weight_o=plain(attention.o_proj).weight.detach(),
        weight_gate_up=weight_gate_up,
        weight_down=plain(mlp.down_proj).weight.detach(),
        bias_qkv=bias_qkv,
        bias_o=_detached(plain(attention.o_proj).bias),
        bias_gate_up=bias_gate_up,
        bias_down=_detached(plain(mlp.down_proj).bias),
        q_norm=_norm(q_norm) if q_norm is not None else None,
        k_norm=_norm(k_norm) if k_norm is not None else None,
    )


def _stack_rows(*modules: nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One weight whose rows are those of the modules in turn, and their bias if any has one (0 where one has none)."""
    modules = tuple(map(plain, modules))
    first = modules[0].weight
    sizes = [m.weight.shape[0] for m in modules]
    weight = first.new_empty((sum(sizes), first.shape[1]))
    has_bias = any(m.bias is not None for m in modules)
    bias = first.new_zeros(sum(sizes)) if has_bias else None
    for i, module in enumerate(modules):
        rows = slice(sum(sizes[:i]), sum(sizes[: i + 1]))
        _move(module.weight, weight[rows])
        if module.bias is not None and bias is not None:
            _move(module.bias, bias[rows])
    return weight, bias


def _stack_columns(*modules: nn.Linear) -> torch.Tensor:
    """One weight whose columns are those of the modules in turn."""
    modules = tuple(map(plain, modules))
    first = modules[0].weight
    sizes = [m.weight.shape[1] for m in modules]
    weight = first.new_empty((first.shape[0], sum(sizes)))
    for i, module in enumerate(modules):
        _move(module.weight, weight[:, sum(sizes[:i]) : sum(sizes[: i + 1])])
    return weight


def _move(parameter: torch.Tensor, place: torch.Tensor) -> None:
    """Copy a parameter to its place and make it a view of it; its own storage is freed."""
    place.copy_(parameter)
    parameter.data = place


def _norm(module: Any) -> Norm:
    module = plain(module)
    eps = module.eps if isinstance(module, nn.LayerNorm) else module.variance_epsilon
    return Norm(module.weight.detach(), _detached(getattr(module, "bias", None)), eps)


def _detached(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.detach()


def _tensors(part) -> list[torch.Tensor]:
    values = vars(part).values()
    return [t for v in values for t in (_tensors(v) if isinstance(v, Norm) else [v]) if isinstance(t, torch.Tensor)]


def _addresses(model: PreTrainedModel) -> tuple:
    """Where every parameter lies; it changes if the model is moved or its weights are replaced."""
    return tuple((p.data_ptr(), p.dtype, p.device) for p in _parameters(model))


def _parameters(model: PreTrainedModel) -> list[nn.Parameter]:
    """Every parameter that a decode step reads; those of merged or disabled adapters are left out."""
    held = [part.module for part in parts(model) if not is_adapter(part.module)]
    return [p for module in held for p in module._parameters.values() if p is not None]
