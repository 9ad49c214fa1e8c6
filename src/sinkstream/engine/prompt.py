"""Prompts at the speed of a plain forward: chunks of tokens through the packed weights, straight into the static ring.

Where every prune is known beforehand, what each token of a chunk sees is known too (`Band`), so a chunk is one forward
however many prunes fall into it. Its keys and values stay beside the ring until the chunk's own queries of that layer
have seen the ring as it was; then those that stay are written to their slots. Short chunks, the last of a prompt or a
chat turn, go through the same forward at fixed addresses (`ShortChunks`). Under policies that look, `prompt_events`
says what a chunk may be.
"""

from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from sinkstream.engine.packing import LlamaLayer, NeoxLayer, Norm, PackedWeights
from sinkstream.engine.reading import TokenReader, norm_of
from sinkstream.engine.refresh import rebase_stream
from sinkstream.engine.short_chunks import ShortChunks
from sinkstream.engine.span import Block, StreamSpan
from sinkstream.engine.state import StreamState
from sinkstream.kernels.activation import activation
from sinkstream.kernels.attention_prefill import attention_prefill
from sinkstream.kernels.band import POSITION, TOKENS, Band, Columns, SetColumns
from sinkstream.kernels.chunk_angles import angles_from
from sinkstream.kernels.kept_queries import keep_queries
from sinkstream.kernels.observed_chunk import accumulate_chunk
from sinkstream.kernels.rotate_qkv import rotate_qkv
from sinkstream.kernels.store_window import store_window
from sinkstream.policies import PruneSchedule, Steps

CHUNK_TOKENS = 2048
FAR = 2**30  # tokens of a stream from which on the tables of bands, which are int32, hold a smaller number


class PromptForward:
    """Feeds prompts to the streams of one state, in chunks of which every prune is known.

    Parameters
    ----------
    weights : PackedWeights
    state : StreamState
    chunk_tokens : int
        Most tokens of one forward.
    short_sizes : sequence of int
        Sizes that short chunks are padded to, for one forward at fixed addresses; none: no chunk is padded.
    capture : bool
        Whether the forwards of short chunks are captured in CUDA graphs, where kernels compute them.
    framed : bool
        Whether recalled tokens stand in the frame of the streams.
    predicts : bool
        Whether the forward of a short chunk computes the logits after the last token.
    """

    def __init__(
        self,
        weights: PackedWeights,
        state: StreamState,
        chunk_tokens: int = CHUNK_TOKENS,
        short_sizes: tuple[int, ...] = (),
        *,
        capture: bool = True,
        framed: bool = False,
        predicts: bool = True,
    ):
        self.weights, self.state, self.spec, self.chunk_tokens = weights, state, state.spec, chunk_tokens
        self.span = state.span(Block(0, state.streams, framed))
        self.short = ShortChunks(state, partial(self._append, logits=predicts), short_sizes, capture=capture)
        self.reader = TokenReader(weights, state)

    @torch.no_grad()
    def __call__(self, ids: torch.Tensor, stream: int) -> None:
        """Append token ids ``(tokens,)`` to a stream; the logits after the last are in ``state.logits`` afterwards."""
        with torch.cuda.device_of(ids):  # Triton launches on the current device
            for first in range(0, len(ids), self.chunk_tokens):
                part = ids[first : first + self.chunk_tokens]
                self.append(part, stream, first + len(part) == len(ids))

    def append(self, ids: torch.Tensor, stream: int, last: bool) -> None:
        """One chunk, of at most `chunk_tokens`; the logits are computed if it is the last one.

        Under a scorer a prune may fall on its first token only, and what stays pinned has been chosen.
        """
        self.rebase(stream)
        schedule = self.state.schedules[stream].copy()
        steps = schedule.advance(len(ids))
        size = self.short.size(len(ids))
        if size is None:
            coming = Coming(self.state, stream, steps)
            self._append(ids, coming.band, logits=last)
        else:
            coming = Coming(self.state, stream, steps, self.short.table(size))
            self.short(ids, coming.band)
        coming.count(schedule)

    def rebase(self, stream: int) -> None:
        """Rebase the positions of a stream, if it is time."""
        counters = self.state.counters[stream]
        if counters.seen - counters.base > self.state.rebase_at:
            rebase_stream(self.state, stream)

    def _append(self, ids: torch.Tensor, band: Band, *, logits: bool = True) -> None:
        """Append token ids ``(tokens,)``, with padding, as a band says."""
        if band.fixed:
            band.rotate()
        x = self.layers(ids, Chunk(self.span, band, self.weights.rope_factor))
        if self.reader.names:
            self.reader.note(self.reader.read(ids, x, band), band)
        if logits or self.reader.draws:
            self.predict(x, band)

    def layers(self, ids: torch.Tensor, chunk: "Chunk") -> torch.Tensor:
        """What the layers make of token ids ``(tokens,)``: ``(tokens, hidden)``."""
        x = F.embedding(ids, self.weights.embedding)
        for i, layer in enumerate(self.weights.layers):
            x = (self._neox if isinstance(layer, NeoxLayer) else self._llama)(chunk, i, layer, x)
        return x

    def predict(self, x: torch.Tensor, band: Band) -> None:
        """Compute the logits after the last token of a band, from the outputs of the last layer."""
        index = band.table[TOKENS : TOKENS + 1] - 1
        found = F.linear(norm_of(x.index_select(0, index), self.weights.final_norm), self.weights.head)
        self.state.logits.index_copy_(0, band.device_row, found.float())

    def _neox(self, chunk: "Chunk", index: int, layer: NeoxLayer, x: torch.Tensor) -> torch.Tensor:
        """One GPT-NeoX layer with parallel residual; x ``(tokens, hidden)``. Its last product has both inputs."""
        width = self.spec.query_heads * self.spec.head_dim
        both = x.new_empty(len(x), layer.weight_out.shape[1])
        qkv = F.linear(norm_of(x, layer.attention_norm), layer.weight_in[: 3 * width], layer.bias_in[: 3 * width])
        chunk.attend(index, qkv, "per-head", both[:, :width])
        del qkv
        rows = slice(3 * width, None)
        up = F.linear(norm_of(x, layer.mlp_norm), layer.weight_in[rows], layer.bias_in[rows])
        activation(up, "gelu", out=both[:, width:])
        del up  # the widest of them
        return F.linear(both, layer.weight_out, layer.bias_out).add_(x)

    def _llama(self, chunk: "Chunk", index: int, layer: LlamaLayer, x: torch.Tensor) -> torch.Tensor:
        """One Llama-like layer; x ``(tokens, hidden)``."""
        qkv = F.linear(norm_of(x, layer.attention_norm), layer.weight_qkv, layer.bias_qkv)
        context = x.new_empty(len(x), self.spec.query_heads * self.spec.head_dim)
        chunk.attend(index, qkv, "blocks", context, layer.q_norm, layer.k_norm)
        del qkv
        x = _added(x, context, layer.weight_o, layer.bias_o)
        gate_up = F.linear(norm_of(x, layer.mlp_norm), layer.weight_gate_up, layer.bias_gate_up)
        return _added(x, activation(gate_up, "swiglu"), layer.weight_down, layer.bias_down)


def _added(x: torch.Tensor, a: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x + W · a + bias, in place of x; without a bias in one kernel."""
    return x.addmm_(a, weight.T) if bias is None else x.add_(F.linear(a, weight, bias))


def past_of(seen: int, places: int) -> int:
    """Tokens of a stream before a chunk as its band counts them: up to `FAR` all; beyond, fewer at the same place.

    Parameters
    ----------
    seen : int
    places : int
        Queries that are kept, the query of token t in place ``t % places``; 0: none.
    """
    return seen if seen < FAR else FAR + (seen - FAR) % max(1, places)


class Coming:
    """Tokens that a stream is about to append in one forward, as the policy and the ring have it.

    Parameters
    ----------
    state : StreamState
    stream : int
    steps : Steps
        What the policy does at each of them.
    table : Tensor or None
        Where the band is written; as for `Band`.
    chooses : bool
        Whether what stays pinned is chosen in the forward; the band then ends with the sinks.

    Attributes
    ----------
    oldest, turn : array, (tokens,)
        Of each token, as in `Band`; no turn with original positions.
    """

    def __init__(
        self,
        state: StreamState,
        stream: int,
        steps: Steps,
        table: torch.Tensor | None = None,
        *,
        chooses: bool = False,
    ):
        self.state, self.stream, self.steps = state, stream, steps
        self.counters, g = state.counters[stream], state.geometry
        seen, base, first_window = self.counters.seen, self.counters.base, self.counters.first_window
        tokens, dropped = len(steps), steps.drop.cumsum()
        assert chooses or not g.refresh or dropped[0] == dropped[-1], "what stays pinned is chosen before the forward"
        refreshed = g.refresh if not chooses and (self.counters.pruned or dropped[-1]) else 0
        oldest = first_window + np.where(dropped > 0, dropped + self.counters.leaving(0), 0) - seen
        at = np.arange(seen - base, seen - base + tokens)
        self.oldest, self.turn = oldest, None if g.original else at - (steps.visible - 1)
        self.band = Band(
            oldest,
            self.turn,
            state.spec.rope.frequencies(state.device),
            past=past_of(seen, state.observed_queries),
            start=self.counters.ring_index(first_window),
            length=self.counters.window,
            stays=min(max(int(oldest[-1]), 0), tokens),
            slot=self.counters.ring_index(seen),
            row=stream,
            position=seen - base,
            sinks=self.counters.sink + refreshed + self.counters.recalled,
            table=table,
        )

    def count(self, schedule: PruneSchedule) -> None:
        """Count the tokens, once all layers have appended them, and take the schedule after them."""
        self.state.schedules[self.stream] = schedule
        drop = int(self.steps.drop.sum())
        if drop:
            self.counters.first_window += self.counters.leaving(drop)
            self.counters.pruned = True
        self.counters.seen += len(self.steps)
        self.counters.events += int(self.steps.event.sum())


class Chunk:
    """What the layers do with the tokens of one forward: rotation, attention, and the way to their slots.

    Parameters
    ----------
    state : StreamSpan
        All streams.
    band : Band
    rope_factor : float
        What rotated dimensions are multiplied by.
    holds : bool
        Whether nothing is written to the state until `store`.

    Attributes
    ----------
    held : list of tuple of Tensor
        Query, key and value of every layer, where they are held; no query where the policy reads none.
    """

    def __init__(self, state: StreamSpan, band: Band, rope_factor: float, *, holds: bool = False):
        self.state, self.band, self.holds = state, band, holds
        self.held: list[tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]] = []
        self.observes = state.queries is not None or "accumulated" in state.channels
        self.adds = "accumulated" in state.channels and not holds  # what the queries give, right behind attention
        self._sums: torch.Tensor | None = None  # of their softmax, in the layer that is computed
        position = band.table[POSITION : POSITION + 1]
        self.rotation = angles_from(position, band.rows, band.inv_freq, factor=rope_factor)

    def attend(
        self,
        layer: int,
        qkv: torch.Tensor,
        order: str,
        out: torch.Tensor,
        q_norm: Norm | None = None,
        k_norm: Norm | None = None,
    ) -> None:
        """Attention of one layer; writes what stays of the chunk to its slots, or holds it.

        Parameters
        ----------
        qkv : Tensor, (tokens, (query_heads + 2 * kv_heads) * head_dim)
            Not rotated; rotated in place.
        order : str
            As in `rotate_qkv`.
        out : Tensor, (tokens, query_heads * head_dim)
            Rows may be strided.
        """
        state, spec, g = self.state, self.state.spec, self.state.geometry
        norms: dict[str, Any] = {}
        if q_norm is not None and k_norm is not None:
            norms = {"eps": q_norm.eps, "q_norm": q_norm.weight, "k_norm": k_norm.weight}
        query, key, value = rotate_qkv(
            qkv, self.rotation, query_heads=spec.query_heads, kv_heads=spec.kv_heads, order=order, **norms
        )
        keys, values = state.keys[layer], state.values[layer]
        pinned, ring = slice(0, g.pinned_slots), slice(g.pinned_slots, None)
        columns = Columns(
            keys[:, :, pinned],
            values[:, :, pinned],
            keys[:, :, ring],
            values[:, :, ring],
            key.transpose(0, 1)[None],
            value.transpose(0, 1)[None],
            self.pinned_sets(layer, query, key, value),
        )
        if self.adds:
            self._sums = torch.empty(
                spec.kv_heads, query.shape[0] * query.shape[1] // spec.kv_heads, device=state.device
            )
        attention_prefill(
            query.transpose(0, 1)[None],
            columns,
            self.band,
            scaling=spec.head_dim**-0.5,
            out=out.view(1, self.band.rows, spec.query_heads, spec.head_dim),
            sums=self._sums,
        )
        if self.holds:
            self.held.append((query.clone() if self.observes else None, key.clone(), value.clone()))
        else:
            self.store(layer, query, key, value)

    def pinned_sets(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> SetColumns | None:
        """Pinned tokens that change within the chunk; None: all are those of the state. Arguments as in `store`."""
        return None

    def store(self, layer: int, query: torch.Tensor | None, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write what stays of the chunk to its slots, and what the policy reads of its queries.

        Parameters
        ----------
        query, key, value : Tensor, (tokens, query_heads or kv_heads, head_dim)
            Of one layer, rotated.
        """
        state, g = self.state, self.state.geometry
        if query is not None:
            self.keep(layer, query)
        store_window(key, value, state.keys[layer], state.values[layer], self.band, sinks=g.pinned_slots)
        if query is not None:
            self.accumulate(layer, query)

    def keep(self, layer: int, query: torch.Tensor) -> None:
        """Keep the latest queries ``(tokens, query_heads, head_dim)``, where the policy reads them."""
        if self.state.queries is not None:
            keep_queries(self.state.queries[layer], query, self.band)

    def accumulate(self, layer: int, query: torch.Tensor) -> None:
        """Add what the queries ``(tokens, query_heads, head_dim)`` give to every slot, where the policy reads it."""
        state, g = self.state, self.state.geometry
        if "accumulated" in state.channels:
            accumulate_chunk(
                query,
                state.keys[layer],
                state.channels["accumulated"][layer],
                self.band,
                pinned_slots=g.pinned_slots,
                scaling=state.spec.head_dim**-0.5,
                sums=self._sums,
            )
