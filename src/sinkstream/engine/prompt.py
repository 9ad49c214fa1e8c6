"""Prompts at the speed of a plain forward: chunks of tokens through the packed weights, straight into the static ring.

Where every prune is known beforehand, what each token of a chunk sees is known too (`Band`), so a chunk is one forward
however many prunes fall into it. Its keys and values stay beside the ring until the chunk's own queries of that layer
have seen the ring as it was; then those that stay are written to their slots.
"""

from functools import partial

import numpy as np
import torch
from torch.nn import functional as F

from sinkstream.engine.geometry import Counters
from sinkstream.engine.packing import PackedWeights
from sinkstream.engine.plain import layer_forward, norm
from sinkstream.engine.refresh import rebase_stream, window_slots
from sinkstream.engine.state import StreamState
from sinkstream.kernels.attention_prefill import Band, Columns, attention_prefill

CHUNK_TOKENS = 2048


class PromptForward:
    """Feeds prompts to the streams of one state, under a policy whose plan is known.

    Parameters
    ----------
    weights : PackedWeights
    state : StreamState
    chunk_tokens : int
        Most tokens of one forward.
    """

    def __init__(self, weights: PackedWeights, state: StreamState, chunk_tokens: int = CHUNK_TOKENS):
        assert state.policy.plan_known, "what a token sees must be known before the forward"
        self.weights, self.state, self.chunk_tokens = weights, state, chunk_tokens
        self.inv_freq = state.spec.rope.inv_freq.to(state.device)

    @torch.no_grad()
    def __call__(self, ids: torch.Tensor, stream: int) -> None:
        """Append token ids ``(tokens,)`` to a stream; the logits after the last are in ``state.logits`` afterwards."""
        for chunk in ids.split(self.chunk_tokens):
            last = self._forward(chunk, stream)
        self.state.logits[stream] = F.linear(norm(last, self.weights.final_norm), self.weights.head)[0]

    def _forward(self, ids: torch.Tensor, stream: int) -> torch.Tensor:
        """One chunk; returns the hidden state of its last token, ``(1, hidden)``."""
        state, counters = self.state, self.state.counters[stream]
        if counters.seen - counters.base > state.rebase_at:
            rebase_stream(state, stream)
        chunk = Chunk(state, stream, len(ids), self.inv_freq, self.weights.rope_factor)
        x = F.embedding(ids, self.weights.embedding)
        for i, layer in enumerate(self.weights.layers):
            x = layer_forward(state.spec, layer, x, partial(chunk.attend, i))
        chunk.count()
        return x[-1:]


class Chunk:
    """Tokens that a stream appends in one forward: what each sees, where each lies, and the attention of a layer.

    Parameters
    ----------
    state : StreamState
    stream, tokens : int
    inv_freq : Tensor, (rotary_dim / 2,), float64, on the device
    rope_factor : float
        What rotated dimensions are multiplied by.
    """

    def __init__(self, state: StreamState, stream: int, tokens: int, inv_freq: torch.Tensor, rope_factor: float):
        self.state, self.stream, self.tokens = state, stream, tokens
        self.counters, g = state.counters[stream], state.geometry
        self.before = Counters(**vars(self.counters))
        self.schedule = state.schedules[stream].copy()
        self.steps = self.schedule.advance(tokens)
        seen, base = self.before.seen, self.before.base
        oldest = self.before.first_window + self.steps.drop.cumsum()
        at = np.arange(seen - base, seen - base + tokens)
        turn = None if g.original else at - (self.steps.visible - 1)
        self.band = Band(oldest - seen, turn, inv_freq, seen)
        angle = torch.arange(seen - base, seen - base + tokens, device=state.device).double()[:, None] * inv_freq
        self.cos, self.sin = ((part * rope_factor).float()[:, None] for part in (angle.cos(), angle.sin()))
        self.pinned = min(g.sink, seen + tokens)
        self.sinks = slice(min(seen, g.sink), self.pinned)  # of the chunk's tokens, those that are sinks, by slot
        kept = min(max(int(oldest[-1]), seen), seen + tokens)  # the first of the chunk's tokens that stay in the window
        self.kept = slice(kept - seen, tokens)
        self.slots = window_slots(state, stream, kept, seen + tokens - kept)

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attention of one layer; writes what stays of the chunk to its slots.

        Parameters
        ----------
        query : Tensor, (tokens, query_heads, head_dim)
        key, value : Tensor, (tokens, kv_heads, head_dim)
            Not rotated.

        Returns
        -------
        Tensor, (tokens, query_heads * head_dim)
        """
        state, g, rope, one = self.state, self.state.geometry, self.state.spec.rope, self.stream
        query = rope.rotate(query, self.cos, self.sin).to(query.dtype).transpose(0, 1)
        key = rope.rotate(key, self.cos, self.sin).to(key.dtype).transpose(0, 1)
        value = value.transpose(0, 1)
        keys, values = state.keys[layer][one], state.values[layer][one]
        if self.sinks.stop > self.sinks.start:
            own = slice(0, self.sinks.stop - self.sinks.start)
            keys[:, self.sinks], values[:, self.sinks] = key[:, own], value[:, own]
        columns = Columns(
            keys[None, :, : self.pinned],
            values[None, :, : self.pinned],
            keys[None, :, g.pinned_slots :],
            values[None, :, g.pinned_slots :],
            (self.before.first_window - g.sink) % g.ring,
            self.before.window,
            key[None],
            value[None],
        )
        out = attention_prefill(query[None], columns, self.band, scaling=state.spec.head_dim**-0.5)
        keys.index_copy_(1, self.slots, key[:, self.kept])
        values.index_copy_(1, self.slots, value[:, self.kept])
        return out.view(self.tokens, -1)

    def count(self) -> None:
        """Count the tokens, once all layers have appended them."""
        self.state.schedules[self.stream] = self.schedule
        drop = int(self.steps.drop.sum())
        if drop:
            self.counters.first_window += drop
            self.counters.pruned = True
        self.counters.seen += self.tokens
        self.counters.events += int(self.steps.event.sum())
