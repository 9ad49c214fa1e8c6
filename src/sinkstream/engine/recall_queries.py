"""`RingQueries`: the latest queries of an engine's stream, as choosers that read attention ask for them."""

from collections.abc import Sequence
from typing import Any

import torch

from sinkstream.cache.pinned import unrotated
from sinkstream.cache.query_log import QueryLog
from sinkstream.engine.state import StreamState


class RingQueries(QueryLog):
    """A `QueryLog` that is shown nothing: steps and prompts keep their queries in ``state.queries``.

    Parameters
    ----------
    state : StreamState
        Of one stream, which keeps as many queries.
    heads, keep
        As for `QueryLog`.

    Attributes
    ----------
    first : int
        Index of the first token whose query is read from the state; older ones are held here, not rotated.
    """

    def __init__(self, state: StreamState, heads: Sequence[tuple[int, int]], keep: int):
        super().__init__(heads, keep)
        self._state, self._kv_heads, self.scaling = state, state.spec.kv_heads, state.spec.head_dim**-0.5
        self._older: dict[int, torch.Tensor] = {}
        self.first = 0

    def commit(self, tokens: int) -> None:
        """Nothing is to be kept: the queries are in the state."""

    def read(self, count: int) -> dict[tuple[int, int], torch.Tensor]:
        """As `QueryLog.read`; of all tokens of the stream."""
        self._kept = self._latest()
        return super().read(count)

    def saved(self) -> tuple[dict[str, Any], torch.Tensor]:
        """As `QueryLog.saved`."""
        self._kept = self._latest()
        return super().saved()

    def load(self, counts: dict[str, Any], kept: torch.Tensor) -> None:
        """As `QueryLog.load`; `first` is the caller's to set."""
        super().load(counts, kept)
        self._older = self._kept

    def rewind(self, tokens: int) -> None:
        """Forget the queries of the latest `tokens` tokens; called before the stream takes these back."""
        self._kept = self._latest()
        super().rewind(tokens)
        self._older, self.first = self._kept, self._state.counters[0].seen - tokens

    def hold(self) -> None:
        """Read the kept queries before a rebase turns them: a query is rotated back, and rounded, once."""
        self._older, self.first = self._latest(), self._state.counters[0].seen

    def _latest(self) -> dict[int, torch.Tensor]:
        """Queries ``(query_heads, at most `keep`, head_dim)``, float32, not rotated, by layer."""
        state, counters = self._state, self._state.counters[0]
        assert state.queries is not None, "the state keeps queries"
        first = max(self.first, counters.seen - self.keep)
        places = torch.arange(first, counters.seen, device=state.device) % self.keep
        found = {}
        for layer in self.layers:
            queries = state.queries[layer, 0].index_select(1, places)
            found[layer] = unrotated(state.spec.rope.layer(layer), queries, first - counters.base)
            if layer in self._older:
                found[layer] = torch.cat([self._older[layer], found[layer]], 1)[:, -self.keep :]
        return found
