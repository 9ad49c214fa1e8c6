"""The decode step in plain PyTorch functions, on any device: the reference of every faster rung.

Shapes are static and nothing asks the host, so that the same functions run under one CUDA graph.
"""

import torch
from torch.nn import functional as F

from sinkstream.engine.layout import FIRST, FRAME_POSITION, LENGTH, PINNED, QUERY, SLOT, WINDOW_POSITION
from sinkstream.engine.packing import LlamaLayer, NeoxLayer, Norm, PackedWeights
from sinkstream.policies import SIGNALS


def norm(x: torch.Tensor, weights: Norm) -> torch.Tensor:
    """LayerNorm or RMSNorm over the last axis, as transformers computes them."""
    if weights.bias is not None:
        return F.layer_norm(x, weights.weight.shape, weights.weight, weights.bias, weights.eps)
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + weights.eps)
    return weights.weight * wide.to(x.dtype)


class Row:
    """The scalars of one step, unpacked once for all layers.

    Parameters
    ----------
    state : StreamState
    scalars : Tensor, (streams, 8), int64

    Attributes
    ----------
    stream, slot : Tensor, (streams,), int64
    visible : Tensor, (streams, 1, 1, slots), bool
    window_angles, frame_angles : pair of Tensor, (streams, 1, rotary_dim / 2), float32
        Cosine and sine, of the query against ring keys and against pinned keys.
    """

    def __init__(self, state, scalars: torch.Tensor, rope_factor: float):
        g = state.geometry
        self.scalars, self.slot = scalars, scalars[:, SLOT]
        self.stream = torch.arange(state.streams, device=state.device)
        pinned = torch.arange(g.pinned_slots, device=state.device) < scalars[:, PINNED, None]
        age = (torch.arange(g.ring, device=state.device) - scalars[:, FIRST, None]) % g.ring
        window = age < scalars[:, LENGTH, None]
        self.visible = torch.cat([pinned, window], 1)[:, None, None]
        self.window_angles, self.frame_angles = (
            tuple(a[:, None] * rope_factor for a in state.spec.rope.angles(scalars[:, column]))
            for column in (WINDOW_POSITION, FRAME_POSITION)
        )


def attend(state, row: Row, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Write a token's key and value to its slot and attend to everything visible, in both frames.

    Parameters
    ----------
    query : Tensor, (streams, query_heads, head_dim)
    key, value : Tensor, (streams, kv_heads, head_dim)
        Not rotated.

    Returns
    -------
    Tensor, (streams, query_heads * head_dim)
    """
    spec, g, rope, dtype = state.spec, state.geometry, state.spec.rope, query.dtype
    keys, values = state.keys[layer], state.values[layer]
    keys[row.stream, :, row.slot] = rope.rotate(key, *row.window_angles).to(dtype)
    values[row.stream, :, row.slot] = value
    in_window = rope.rotate(query, *row.window_angles).to(dtype)
    in_frame = rope.rotate(query, *row.frame_angles).to(dtype)
    grouped = (len(query), spec.kv_heads, spec.query_heads // spec.kv_heads, spec.head_dim)
    scores = torch.cat(
        [
            in_frame.view(grouped) @ keys[:, :, : g.pinned_slots].transpose(2, 3),
            in_window.view(grouped) @ keys[:, :, g.pinned_slots :].transpose(2, 3),
        ],
        dim=-1,
    )
    scores = (scores.float() * spec.head_dim**-0.5).masked_fill(~row.visible, float("-inf"))
    weights = scores.softmax(-1)
    if "accumulated" in state.channels:
        state.channels["accumulated"][layer].add_(weights.mean(2))
    if state.queries is not None:
        kept = row.scalars[:, QUERY].clamp(min=0)
        state.queries[layer][row.stream, :, kept] = in_window
    return (weights.to(dtype) @ values).view(len(query), -1)


def note_token(state, row: Row) -> None:
    """Fill the channels of the token that is appended: its structure, its own NLL and the entropy it was drawn from."""
    channels, tokens = state.channels, state.tokens
    found = {}
    if "accumulated" in channels:
        found["accumulated"] = torch.zeros_like(state.logits[:, 0])
    if "structure" in channels:
        found["structure"] = state.structure[tokens]
    if {"nll", "entropy"} & channels.keys():
        log_probs = state.logits.log_softmax(-1)
        first = row.scalars[:, QUERY] < 0
        found["nll"] = (-log_probs.gather(1, tokens[:, None])[:, 0]).masked_fill(first, 0.0)
        found["entropy"] = SIGNALS["entropy"](log_probs).masked_fill(first, 0.0)
    for name in channels.keys() & found.keys():
        channels[name][:, row.stream, :, row.slot] = found[name][:, None, None]


def neox_layer(state, row: Row, layer: int, weights: NeoxLayer, x: torch.Tensor) -> torch.Tensor:
    """One GPT-NeoX layer with parallel residual; x ``(streams, hidden)``."""
    spec = state.spec
    rows = 3 * spec.query_heads * spec.head_dim
    qkv = F.linear(norm(x, weights.attention_norm), weights.weight_in[:rows], weights.bias_in[:rows])
    up = F.linear(norm(x, weights.mlp_norm), weights.weight_in[rows:], weights.bias_in[rows:])
    query, key, value = qkv.view(len(x), spec.query_heads, 3, spec.head_dim).unbind(2)
    attention = attend(state, row, layer, query, key, value)
    return x + F.linear(torch.cat([attention, F.gelu(up)], 1), weights.weight_out, weights.bias_out)


def llama_layer(state, row: Row, layer: int, weights: LlamaLayer, x: torch.Tensor) -> torch.Tensor:
    """One Llama-like layer; x ``(streams, hidden)``."""
    spec = state.spec
    qkv = F.linear(norm(x, weights.attention_norm), weights.weight_qkv, weights.bias_qkv)
    heads = (spec.query_heads, spec.kv_heads, spec.kv_heads)
    query, key, value = qkv.view(len(x), -1, spec.head_dim).split(heads, 1)
    if weights.q_norm is not None:
        query, key = norm(query, weights.q_norm), norm(key, weights.k_norm)
    x = x + F.linear(attend(state, row, layer, query, key, value), weights.weight_o, weights.bias_o)
    gate, up = F.linear(norm(x, weights.mlp_norm), weights.weight_gate_up, weights.bias_gate_up).chunk(2, -1)
    return x + F.linear(F.silu(gate) * up, weights.weight_down, weights.bias_down)


def decode(state, weights: PackedWeights) -> None:
    """One step of all streams: append ``state.tokens`` and leave the next-token logits in ``state.logits``."""
    row = Row(state, state.begin_row(), weights.rope_factor)
    note_token(state, row)
    x = F.embedding(state.tokens, weights.embedding)
    for i, layer in enumerate(weights.layers):
        x = (neox_layer if isinstance(layer, NeoxLayer) else llama_layer)(state, row, i, layer, x)
    state.logits.copy_(F.linear(norm(x, weights.final_norm), weights.head))
    state.end_row()
