"""Chunks of a prompt that cross prunes at which pinned tokens are chosen, straight into the static ring.

`cache.choices` defines candidates and choice. Launching the kernels of a short chunk one by one takes longer than the
kernels themselves, so short chunks are padded and captured, as in `short_chunks`. The kernels read which prunes a chunk
crosses, and where, from a second table beside that of the band.
"""

from dataclasses import dataclass

import numpy as np
import torch

from sinkstream.cache.choices import (
    Chosen,
    choose,
    choosing_tokens,
    computed_fast,
    groups_of,
    groups_on_device,
    most_prunes,
    positions_of,
    set_of_tokens,
)
from sinkstream.engine.prompt import Chunk, Coming, PromptForward
from sinkstream.engine.short_chunks import ShortChunks
from sinkstream.engine.span import StreamSpan
from sinkstream.engine.state import StreamState
from sinkstream.kernels.band import LENGTH, POSITION, Band, SetColumns
from sinkstream.kernels.chunk_angles import angles_from
from sinkstream.kernels.chunk_entries import PinnedSlots, read_entries
from sinkstream.kernels.kept_queries import join_queries
from sinkstream.kernels.pinned_sets import FIELDS, Group, Groups, GroupSizes, Layer, group_rows
from sinkstream.kernels.window_received import store_received
from sinkstream.policies import EvictionPolicy, PruneSchedule, Steps

ALIGNED = 4  # integers; kernels are compiled once for tables that begin at such a multiple
LONGER_SIZES = (768, 1024)  # of such chunks, beside those of others: launching them takes longer than computing them
FEWEST_PRUNES = 2  # of such a chunk that is not captured; with fewer, cut at the prune, its forwards are


def chooses_in_chunk(state: StreamState) -> bool:
    """Whether pinned tokens can be chosen in a chunk: the scorer reads attention alone, at positions in the cache.

    Pinned tokens at their original positions may stand any number of positions before the chunk.
    """
    return choosing_tokens(state.policy, 1) > 0 and not state.geometry.original and computed_fast(state.keys)


def choosing_chunks(
    policy: EvictionPolicy, chunk_tokens: int, short_sizes: tuple[int, ...]
) -> tuple[int, tuple[int, ...]]:
    """Most tokens of such a chunk, and the sizes that one is padded to.

    Parameters
    ----------
    policy : EvictionPolicy
    chunk_tokens : int
        Most tokens of other chunks.
    short_sizes : sequence of int
        Sizes that other chunks are padded to; none: no chunk is padded, and none is captured.
    """
    if not short_sizes:
        return choosing_tokens(policy, chunk_tokens), ()
    tokens = choosing_tokens(policy, min(chunk_tokens, LONGER_SIZES[-1]))
    sizes = *short_sizes, *LONGER_SIZES
    return tokens, sizes[: len([size for size in sizes if size < tokens]) + 1] if tokens else ()


@dataclass(frozen=True)
class ChoiceSizes:
    """Sizes of the tensors of a chunk that chooses: its own, or room for every chunk of at most so many tokens.

    Attributes
    ----------
    tokens : int
    entries : int
        Of the window and the chunk.
    leaving : int
        The oldest entries, which may be chosen.
    groups : GroupSizes
    """

    tokens: int
    entries: int
    leaving: int
    groups: GroupSizes

    @classmethod
    def of(cls, coming: Coming, host: list[Group]) -> "ChoiceSizes":
        """Those of one chunk."""
        length, tokens = coming.band.length, coming.band.tokens
        return cls(tokens, length + tokens, length + int(coming.oldest[-1]), GroupSizes.of(host))

    @classmethod
    def most(cls, policy: EvictionPolicy, tokens: int) -> "ChoiceSizes":
        """Room for chunks of at most so many tokens of a full stream, also of one that begins with its first prune."""
        assert policy.scorer is not None, "which chooses"
        adds, growth = "accumulated" in policy.needs, policy.growth + 1
        queries = min(tokens, growth) if adds else policy.scorer.observed_queries
        prunes = most_prunes_within(policy, tokens)
        rows = tokens if adds else prunes * queries
        leaving = policy.refresh + growth + tokens
        return cls(
            tokens, policy.peak - policy.sink + tokens, leaving, GroupSizes(prunes + adds, queries, growth, rows)
        )

    def hold(self, other: "ChoiceSizes") -> bool:
        """Whether a chunk of other sizes has room here."""
        return (
            self.tokens >= other.tokens
            and self.entries >= other.entries
            and self.leaving >= other.leaving
            and self.groups.hold(other.groups)
        )


def most_prunes_within(policy: EvictionPolicy, tokens: int) -> int:
    """The most prunes that such a chunk of so many tokens of a full stream crosses, one before its first included."""
    schedule = PruneSchedule(policy)
    schedule.advance(policy.peak)
    drops = schedule.advance(policy.peak + tokens).drop > 0
    crossed = int(np.convolve(drops, np.ones(tokens, dtype=np.int64), "valid").max())
    return min(crossed, 1 + most_prunes(policy))


class Choices:
    """What the choices of a chunk read beside its band, in one table on the device.

    Parameters
    ----------
    state : StreamState
    sizes : ChoiceSizes
        Until `write`, the table is that of a chunk without a choice.

    Attributes
    ----------
    which : Tensor, (tokens,), int32
        Which set of pinned tokens each token sees.
    """

    def __init__(self, state: StreamState, sizes: ChoiceSizes):
        self.state, self.sizes, self.host = state, sizes, list[Group]()
        rows = (1 + sizes.groups.groups) * FIELDS
        self._room = -rows % ALIGNED
        with torch.inference_mode(False):
            count = rows + self._room + sizes.tokens
            self.table = torch.zeros(count, dtype=torch.int32, device=state.device)
            places = torch.arange(state.geometry.sink, state.geometry.pinned_slots, device=state.device)
            self._frame = torch.stack(state.spec.rope.angles(places), 1)
        self._rows, self.which = self.table[:rows].view(-1, FIELDS), self.table[rows + self._room :]

    def write(self, host: list[Group], drop: np.ndarray) -> None:
        """Take the groups of the coming chunk; `drop` as in `Steps`."""
        self.host, accumulates = host, "accumulated" in self.state.channels
        which, table = set_of_tokens(drop), np.empty(len(self.table), dtype=np.int32)
        rows = group_rows(host, accumulates, self.sizes.groups.groups).numpy().ravel()
        table[: len(rows)], table[len(rows) :] = rows, which[-1]  # padding, and what lies between, as the last token
        table[len(table) - self.sizes.tokens :][: len(which)] = which
        self.state.copy_in(self.table, torch.from_numpy(table))

    def groups(self) -> Groups:
        """The groups as kernels read them."""
        rope, adds = self.state.spec.rope, "accumulated" in self.state.channels
        return groups_on_device(self.host, self._rows, self.sizes.groups, self._frame, rope, accumulates=adds)


class ChoosingChunk(Chunk):
    """What the layers do with the tokens of one forward in which pinned tokens are chosen.

    Parameters
    ----------
    span : StreamSpan
        All streams of `state`.
    state : StreamState
    band : Band
        That of `Coming` made with ``chooses``. The pinned slots are in use at its first token, and what stays there has
        been chosen.
    choices : Choices
    rope_factor : float
    sources : Tensor, (layers, kv_heads, refresh), int64
        Written: which sources are pinned in the end.
    """

    def __init__(
        self,
        span: StreamSpan,
        state: StreamState,
        band: Band,
        choices: Choices,
        rope_factor: float,
        sources: torch.Tensor,
    ):
        super().__init__(span, band, rope_factor)
        self.adds = False  # the choice knows more: what they give to tokens that leave
        g, sizes = state.geometry, choices.sizes
        self.whole, self.sizes, self.sources = state, sizes, sources
        self.accumulates, self.refreshed = "accumulated" in state.channels, slice(g.sink, g.pinned_slots)
        self.groups, self.which = choices.groups(), choices.which
        position, length = (band.table[field : field + 1] for field in (POSITION, LENGTH))
        self.back = angles_from(position, sizes.entries, band.inv_freq, less=length, back=True)
        self.chosen: Chosen | None = None  # of the layer that is computed

    def pinned_sets(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> SetColumns:
        """Choose the pinned tokens of one layer, which go to the pinned slots in the end; arguments as in `store`."""
        state, g, refreshed = self.whole, self.whole.geometry, self.refreshed
        entries = read_entries(
            state.keys[layer],
            state.values[layer],
            state.pinned_keys[layer, :, :, refreshed],
            key,
            value,
            self.back,
            self.band,
            pinned_slot=g.sink,
            ring_slot=g.pinned_slots,
            leaving=self.sizes.leaving,
            totals=state.channels["accumulated"][layer] if self.accumulates else None,
        )
        queries = query.transpose(0, 1)
        if not self.accumulates:  # queries of earlier tokens may be read; what those gave is known where it is added up
            assert state.queries is not None, "kept where attention is looked at"
            queries = join_queries(state.queries[layer], query, self.band)
        slots = PinnedSlots(
            state.keys[layer, :, :, refreshed],
            state.values[layer, :, :, refreshed],
            state.pinned_keys[layer, :, :, refreshed],
            self.sources[layer],
            self.band,
        )
        scaling = state.spec.head_dim**-0.5
        self.chosen = choose(Layer.of(entries, queries), self.groups, self.which, scaling=scaling, slots=slots)
        return self.chosen.columns

    def store(self, layer: int, query: torch.Tensor | None, key: torch.Tensor, value: torch.Tensor) -> None:
        """As of any chunk; the pinned tokens are in their slots."""
        super().store(layer, query, key, value)
        self.chosen = None  # the sets of one layer are held at a time

    def keep(self, layer: int, query: torch.Tensor) -> None:
        """Keep the latest queries, unless they were kept as the choice read those before."""
        if self.accumulates:
            super().keep(layer, query)

    def accumulate(self, layer: int, query: torch.Tensor) -> None:
        """Attention received by the tokens that stay; sinks, which are no candidates, keep what they have."""
        if not self.accumulates:
            return
        state, chosen = self.whole, self.chosen
        assert chosen is not None, "chosen in this layer, before"
        store_received(
            chosen.layer,
            chosen.found,
            self.band,
            state.channels["accumulated"][layer],
            pinned_slot=self.refreshed.start,
            ring_slot=self.refreshed.stop,
            scaling=state.spec.head_dim**-0.5,
        )


class ChoosingForward:
    """Appends chunks that cross prunes at which pinned tokens are chosen; short ones are padded, and captured.

    Parameters
    ----------
    forward : PromptForward
        Of the streams; whether chunks are padded, and captured, is as there.
    """

    def __init__(self, forward: PromptForward):
        self.forward, self.state = forward, forward.state
        short, state = forward.short, forward.state
        self.tokens, sizes = choosing_chunks(state.policy, forward.chunk_tokens, short.sizes)
        self.short = ShortChunks(
            state,
            self._append_padded,
            sizes,
            capture=short.capture,
            written=self._written,
            kind="that crosses prunes",
        )
        self._padded: dict[int, Choices] = {}
        shape = state.spec.layers, state.spec.kv_heads, state.geometry.refresh
        with torch.inference_mode(False):
            self.sources = torch.zeros(shape, dtype=torch.int64, device=state.device)

    def fewest_prunes(self, tokens: int) -> int:
        """With how many prunes a chunk of so many tokens is worth it."""
        return FEWEST_PRUNES if self.short.size(tokens) is None else 1

    def __call__(self, ids: torch.Tensor, stream: int, schedule: PruneSchedule, steps: Steps) -> None:
        """Append token ids ``(tokens,)`` to a stream; the logits after the last are in ``state.logits`` afterwards.

        Parameters
        ----------
        ids : Tensor, (tokens,), int64
        stream : int
        schedule : PruneSchedule
            That of the stream after them.
        steps : Steps
            What the policy does at each of them.
        """
        forward, state = self.forward, self.state
        forward.rebase(stream)
        size = self.short.size(len(ids))
        coming = Coming(state, stream, steps, None if size is None else self.short.table(size), chooses=True)
        host = self._groups(coming)
        needed = ChoiceSizes.of(coming, host)
        if size is not None and self._choices(size).sizes.hold(needed):
            self._choices(size).write(host, steps.drop)
            self.short(ids, coming.band)
        else:  # turns that leave as a whole may have any length
            if size is not None:
                coming = Coming(state, stream, steps, chooses=True)
            choices = Choices(state, needed)
            choices.write(host, steps.drop)
            self._append(ids, coming.band, choices)
        positions = state.pinned_positions[:, stream]
        first_entry = coming.counters.seen - coming.band.length  # index in the stream of the oldest window token
        positions.copy_(positions_of(self.sources, positions, first_entry))
        coming.count(schedule)

    def _groups(self, coming: Coming) -> list[Group]:
        assert coming.turn is not None, "original positions have no frame of their own"
        accumulates = "accumulated" in self.state.channels
        return groups_of(
            coming.steps.drop,
            coming.oldest,
            coming.turn,
            length=coming.band.length,
            before=0 if accumulates else self.state.observed_queries,
            latest=self.state.observed_queries,
            accumulates=accumulates,
        )

    def _choices(self, size: int) -> Choices:
        """Those of padded chunks of a size, at addresses that never change."""
        if size not in self._padded:
            self._padded[size] = Choices(self.state, ChoiceSizes.most(self.state.policy, size))
        return self._padded[size]

    def _append_padded(self, ids: torch.Tensor, band: Band) -> None:
        band.rotate()
        self._append(ids, band, self._choices(band.rows))

    def _append(self, ids: torch.Tensor, band: Band, choices: Choices) -> None:
        forward = self.forward
        factor = forward.weights.rope_factor
        chunk = ChoosingChunk(forward.span, self.state, band, choices, factor, self.sources)
        forward.predict(forward.layers(ids, chunk), band)

    def _written(self) -> list[torch.Tensor]:
        """What a chunk that stays nowhere writes to stream 0 beside that of any short chunk."""
        state, refreshed = self.state, slice(self.state.geometry.sink, self.state.geometry.pinned_slots)
        return [part[:, 0, :, refreshed] for part in (state.keys, state.values, state.pinned_keys)]
