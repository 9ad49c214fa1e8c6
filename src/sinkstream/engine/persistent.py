"""When one persistent kernel takes the place of all ops of all layers, and what the kernel reads."""

from sinkstream.engine.packing import LlamaLayer, PackedWeights
from sinkstream.engine.span import StreamSpan
from sinkstream.kernels.config import PersistentConfig
from sinkstream.kernels.persistent_layers import LayerTensors, PersistentLayers
from sinkstream.kernels.plans import LAYERS, PERSISTENT_PLANS, OpLaunch


def persistent_plan(weights: PackedWeights, state: StreamSpan) -> dict[str, OpLaunch]:
    """The measured plan of the persistent kernel; empty where none was measured, or the kernel does not serve it."""
    config = PERSISTENT_PLANS.get(weights.embedding.shape[1])
    if config is None:
        return {}
    try:
        pack_layers(weights, state, config)
    except ValueError:
        return {}
    return {LAYERS: OpLaunch(config)}


def pack_layers(weights: PackedWeights, state: StreamSpan, config: PersistentConfig) -> PersistentLayers:
    """What the persistent kernel reads of a stream and its model.

    Raises
    ------
    ValueError
        Naming what the kernel does not serve and what is accepted.
    """
    if state.streams != 1:
        raise ValueError(f"{state.streams} streams; accepted by the persistent kernel: one")
    if state.queries is not None or state.scores is not None:
        raise ValueError("a policy that observes queries or attention; accepted by the persistent kernel: others")
    layers, spec = [], state.spec
    for i, layer in enumerate(weights.layers):
        if not isinstance(layer, LlamaLayer):
            raise ValueError(f"{weights.family}; accepted by the persistent kernel: Llama-like models")
        more = layer.bias_qkv, layer.bias_o, layer.bias_gate_up, layer.bias_down, layer.q_norm
        if any(part is not None for part in more):
            raise ValueError(
                f"{weights.family} with biases or norms of queries and keys; accepted by the persistent kernel: neither"
            )
        parts = (
            layer.attention_norm.weight, layer.weight_qkv, layer.weight_o, layer.mlp_norm.weight, layer.weight_gate_up,
            layer.weight_down, state.keys[i], state.values[i],
        )  # fmt: skip
        layers.append(LayerTensors(*parts))
    return PersistentLayers(
        layers, query_heads=spec.query_heads, pinned_slots=state.geometry.pinned_slots,
        eps=weights.layers[0].attention_norm.eps, config=config,
    )  # fmt: skip
