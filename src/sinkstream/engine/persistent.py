"""When one persistent kernel takes the place of all ops of all layers, and what the kernel reads."""

from sinkstream.engine.packing import NEOX, LlamaLayer, NeoxLayer, PackedWeights
from sinkstream.engine.span import StreamSpan
from sinkstream.kernels.config import PersistentConfig, PersistentNeoxConfig
from sinkstream.kernels.persistent_layers import PersistentLayers
from sinkstream.kernels.persistent_llama import LlamaTensors, PersistentLlama
from sinkstream.kernels.persistent_neox import NeoxTensors, PersistentNeox
from sinkstream.kernels.plans import (
    LAYERS,
    PERSISTENT_LLAMA_PLANS,
    PERSISTENT_NEOX_PLANS,
    OpLaunch,
    PersistentKind,
)


def persistent_plan(weights: PackedWeights, state: StreamSpan) -> dict[str, OpLaunch]:
    """The measured plan of the persistent kernel; empty where none was measured, or the kernel does not serve it."""
    plans = PERSISTENT_NEOX_PLANS if weights.family == NEOX else PERSISTENT_LLAMA_PLANS
    launch = plans.get(weights.embedding.shape[1])
    if launch is None or not isinstance(launch.config, PersistentKind):
        return {}
    try:
        pack_layers(weights, state, launch.config)
    except ValueError:
        return {}
    return {LAYERS: launch}


def pack_layers(weights: PackedWeights, state: StreamSpan, config: PersistentKind) -> PersistentLayers:
    """What the persistent kernel of these layers reads of a stream and its model.

    Raises
    ------
    ValueError
        Naming what the kernel does not serve and what is accepted.
    """
    if state.streams != 1:
        raise ValueError(f"{state.streams} streams; accepted by the persistent kernel: one")
    if state.queries is not None or state.scores is not None:
        raise ValueError("a policy that observes queries or attention; accepted by the persistent kernel: others")
    kind = PersistentNeoxConfig if weights.family == NEOX else PersistentConfig
    if not isinstance(config, kind):
        raise ValueError(
            f"{type(config).__name__} for the layers of {weights.family}; accepted by the persistent kernel:"
            f" {kind.__name__}"
        )
    tensors = _neox_tensors if weights.family == NEOX else _llama_tensors
    layers = [tensors(weights, i, state) for i in range(len(weights.layers))]
    return (PersistentNeox if weights.family == NEOX else PersistentLlama)(
        layers, query_heads=state.spec.query_heads, pinned_slots=state.geometry.pinned_slots,
        rotary=2 * len(state.spec.rope.inv_freq), eps=weights.layers[0].attention_norm.eps, config=config,
    )  # fmt: skip


def _neox_tensors(weights: PackedWeights, i: int, state: StreamSpan) -> NeoxTensors:
    layer: NeoxLayer = weights.layers[i]
    first, second = layer.attention_norm, layer.mlp_norm
    if first.bias is None or second.bias is None:
        raise ValueError(f"{weights.family} with norms without a bias; accepted by the persistent kernel: with one")
    return NeoxTensors(
        first.weight, first.bias, second.weight, second.bias, layer.weight_in, layer.bias_in, layer.weight_out,
        layer.bias_out, state.keys[i], state.values[i],
    )  # fmt: skip


def _llama_tensors(weights: PackedWeights, i: int, state: StreamSpan) -> LlamaTensors:
    layer: LlamaLayer = weights.layers[i]
    more = layer.bias_qkv, layer.bias_o, layer.bias_gate_up, layer.bias_down, layer.q_norm
    if any(part is not None for part in more):
        raise ValueError(
            f"{weights.family} with biases or norms of queries and keys; accepted by the persistent kernel: neither"
        )
    return LlamaTensors(
        layer.attention_norm.weight, layer.weight_qkv, layer.weight_o, layer.mlp_norm.weight, layer.weight_gate_up,
        layer.weight_down, state.keys[i], state.values[i],
    )  # fmt: skip
