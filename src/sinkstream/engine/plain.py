"""The decode step in plain PyTorch functions, on any device: the reference of every faster rung.

Shapes are static and nothing asks the host, so that the same functions run under one CUDA graph.
"""

from functools import cached_property

import torch
from torch.nn import functional as F

from sinkstream.cache.channels import UNCERTAINTY, token_channels
from sinkstream.engine.packing import LlamaLayer, NeoxLayer, Norm, PackedWeights
from sinkstream.engine.span import StreamSpan
from sinkstream.kernels.layout import FIRST, FRAME_POSITION, LENGTH, PINNED, QUERY, SLOT, TOKEN, WINDOW_POSITION


def norm(x: torch.Tensor, weights: Norm) -> torch.Tensor:
    """LayerNorm or RMSNorm over the last axis, as transformers computes them."""
    if weights.bias is not None:
        return F.layer_norm(x, weights.weight.shape, weights.weight, weights.bias, weights.eps)
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + weights.eps)
    return weights.weight * wide.to(x.dtype)


class Row:
    """The scalars of one step, unpacked once for all layers, each part when it is first asked for.

    Parameters
    ----------
    state : StreamSpan
        `begin_row` has been done.
    rope_factor : float
        What rotated dimensions are multiplied by.
    """

    def __init__(self, state, rope_factor: float):
        self.state, self.rope_factor = state, rope_factor

    @cached_property
    def scalars(self) -> torch.Tensor:
        """All scalars, ``(streams, 8)`` int64."""
        return self.state.scalars.long()

    @cached_property
    def stream(self) -> torch.Tensor:
        """Streams, ``(streams,)`` int64."""
        return torch.arange(self.state.streams, device=self.state.device)

    @cached_property
    def slot(self) -> torch.Tensor:
        """Slots of the new tokens, ``(streams,)`` int64."""
        return self.scalars[:, SLOT]

    @cached_property
    def token(self) -> torch.Tensor:
        """Ids of the new tokens, ``(streams,)`` int64; never `LIKELIEST`."""
        return self.scalars[:, TOKEN]

    @cached_property
    def query_place(self) -> torch.Tensor:
        """Where queries are kept, ``(streams,)`` int64."""
        return self.scalars[:, QUERY].clamp(min=0)

    @cached_property
    def visible(self) -> torch.Tensor:
        """Which slots are attended to, ``(streams, 1, 1, slots)`` bool."""
        g, device = self.state.geometry, self.state.device
        pinned = torch.arange(g.pinned_slots, device=device) < self.scalars[:, PINNED, None]
        age = (torch.arange(g.ring, device=device) - self.scalars[:, FIRST, None]) % g.ring
        return torch.cat([pinned, age < self.scalars[:, LENGTH, None]], 1)[:, None, None]

    @cached_property
    def window_angles(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine of the query against ring keys, ``(streams, 1, rotary_dim / 2)`` float32."""
        return self._angles(WINDOW_POSITION)

    @cached_property
    def frame_angles(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The same against pinned keys."""
        return self._angles(FRAME_POSITION)

    def rotated(self, x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Queries or keys ``(streams, heads, head_dim)`` at one of these positions, in their own dtype."""
        return self.state.spec.rope.rotate(x, *angles).to(x.dtype)

    def _angles(self, column: int) -> tuple[torch.Tensor, torch.Tensor]:
        angles = self.state.spec.rope.angles(self.scalars[:, column])
        return tuple(a[:, None] * self.rope_factor for a in angles)


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
    state.keys[layer][row.stream, :, row.slot] = row.rotated(key, row.window_angles)
    state.values[layer][row.stream, :, row.slot] = value
    weights = attention_weights(state, row, layer, query)
    observe(state, row, layer, query, weights)
    return (weights.to(query.dtype) @ state.values[layer]).view(len(query), -1)


def attention_weights(state, row: Row, layer: int, query: torch.Tensor) -> torch.Tensor:
    """Softmax over all slots, ``(streams, kv_heads, query heads of one, slots)`` float32; the new key is in its slot.

    Parameters
    ----------
    query : Tensor, (streams, query_heads, head_dim)
        Not rotated.
    """
    spec, pinned, keys = state.spec, state.geometry.pinned_slots, state.keys[layer]
    parts = ((row.frame_angles, keys[:, :, :pinned]), (row.window_angles, keys[:, :, pinned:]))
    scores = torch.cat(
        [row.rotated(query, angles).unflatten(1, (spec.kv_heads, -1)) @ part.transpose(2, 3) for angles, part in parts],
        dim=-1,
    )
    return (scores.float() * spec.head_dim**-0.5).masked_fill(~row.visible, float("-inf")).softmax(-1)


def observe(state, row: Row, layer: int, query: torch.Tensor, weights: torch.Tensor) -> None:
    """Keep what the scorer reads of one layer's attention: the query, and the attention that every slot was given.

    Parameters
    ----------
    query, weights
        As in `attention_weights`.
    """
    if "accumulated" in state.channels:
        state.channels["accumulated"][layer].add_(weights.mean(2))
    if state.queries is not None:
        state.queries[layer][row.stream, :, row.query_place] = row.rotated(query, row.window_angles)


def note_token(state, row: Row) -> None:
    """Fill the channels of the token that is appended: its structure, its own NLL and the entropy it was drawn from."""
    channels = state.channels
    log_probs = None
    if UNCERTAINTY & channels.keys():
        first = row.scalars[:, QUERY, None] < 0
        log_probs = state.logits.log_softmax(-1).masked_fill(first, 0.0)[:, None]
    found = token_channels(channels, row.token[:, None], log_probs, state.structure)
    for name, known in found.items():
        channels[name][:, row.stream, :, row.slot] = known[..., None]


def begin_channels(state, row: Row) -> None:
    """Fill the channels of the appended token; its slot starts with no attention, whatever the slot held before."""
    note_token(state, row)
    if "accumulated" in state.channels:
        received = state.channels["accumulated"]  # a number would be copied from the host, which a capture refuses
        received[:, row.stream, :, row.slot] = received.new_zeros(())


def neox_layer(state, row: Row, layer: int, weights: NeoxLayer, x: torch.Tensor) -> torch.Tensor:
    """One GPT-NeoX layer with parallel residual; x ``(streams, hidden)``."""
    first, second = norm(x, weights.attention_norm), norm(x, weights.mlp_norm)
    return x + neox_products(state, row, layer, weights, first, second)


def neox_products(
    state, row: Row, layer: int, weights: NeoxLayer, first: torch.Tensor, second: torch.Tensor
) -> torch.Tensor:
    """What a GPT-NeoX layer adds to the residual stream; `first`, `second`: the inputs of attention and MLP, normed."""
    spec = state.spec
    rows = 3 * spec.query_heads * spec.head_dim
    qkv = F.linear(first, weights.weight_in[:rows], weights.bias_in[:rows])
    up = F.linear(second, weights.weight_in[rows:], weights.bias_in[rows:])
    query, key, value = qkv.view(len(first), spec.query_heads, 3, spec.head_dim).unbind(2)
    attention = attend(state, row, layer, query, key, value)
    return F.linear(torch.cat([attention, F.gelu(up)], 1), weights.weight_out, weights.bias_out)


def llama_layer(state, row: Row, layer: int, weights: LlamaLayer, x: torch.Tensor) -> torch.Tensor:
    """One Llama-like layer; x ``(streams, hidden)``."""
    x = x + llama_attention(state, row, layer, weights, norm(x, weights.attention_norm))
    return x + llama_mlp(weights, norm(x, weights.mlp_norm))


def llama_heads(spec, weights: LlamaLayer, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values ``(streams, heads, head_dim)`` of a product, normed where the family does."""
    heads = (spec.query_heads, spec.kv_heads, spec.kv_heads)
    query, key, value = qkv.view(len(qkv), -1, spec.head_dim).split(heads, 1)
    if weights.q_norm is not None and weights.k_norm is not None:
        query, key = norm(query, weights.q_norm), norm(key, weights.k_norm)
    return query, key, value


def llama_attention(state, row: Row, layer: int, weights: LlamaLayer, x: torch.Tensor) -> torch.Tensor:
    """What attention adds to the residual stream; x: its input, normed."""
    heads = llama_heads(state.spec, weights, F.linear(x, weights.weight_qkv, weights.bias_qkv))
    return F.linear(attend(state, row, layer, *heads), weights.weight_o, weights.bias_o)


def llama_mlp(weights: LlamaLayer, x: torch.Tensor) -> torch.Tensor:
    """What the MLP adds to the residual stream; x: its input, normed."""
    gate, up = F.linear(x, weights.weight_gate_up, weights.bias_gate_up).chunk(2, -1)
    return F.linear(F.silu(gate) * up, weights.weight_down, weights.bias_down)


def decode(state: StreamSpan, weights: PackedWeights) -> None:
    """One step of the streams of a span: append what ``tokens`` says; leave the next-token logits in ``logits``."""
    state.begin_row()
    row = Row(state, weights.rope_factor)
    begin_channels(state, row)
    x = F.embedding(row.token, weights.embedding)
    for i, layer in enumerate(weights.layers):
        x = (neox_layer if isinstance(layer, NeoxLayer) else llama_layer)(state, row, i, layer, x)
    state.logits.copy_(F.linear(norm(x, weights.final_norm), weights.head))
    state.end_row()
