"""What scorers read of attention: the latest queries, and attention accumulated per cached token.

`cache.attention` shows the observer of the running forward the queries of every layer.
"""

import torch

from sinkstream.cache.pinned import Queries, attention_received, turned_back
from sinkstream.cache.ring import SoftRing


class AttentionObserver:
    """Collects queries and accumulated attention during the forwards of one cache.

    What a forward shows is kept apart until `commit`, so that one that raises half-way leaves no trace.

    Parameters
    ----------
    ring : SoftRing
    queries : int
        Latest queries to keep (0: none).
    accumulate : bool
        Whether to add every query's attention into the ring's ``accumulated`` channel.
    """

    def __init__(self, ring: SoftRing, queries: int, accumulate: bool):
        self.ring, self.keep, self.accumulate = ring, queries, accumulate
        self.queries: dict[int, torch.Tensor] = {}
        self.scaling = 1.0
        self.begin(0)

    @property
    def bytes(self) -> int:
        """Memory held by the kept queries, in bytes; accumulated attention counts in the ring."""
        return sum(q.numel() * q.element_size() for q in self.queries.values())

    def begin(self, tokens: int, spare: int = 0) -> None:
        """Forget an unfinished forward and zero the accumulated attention of the entries about to be written.

        Parameters
        ----------
        spare : int
            How many of the tokens `commit` may let go again.
        """
        self._spare = spare
        self._new_queries: dict[int, torch.Tensor] = {}
        self._new_weights: dict[int, torch.Tensor] = {}
        if self.accumulate:
            self.ring.channels["accumulated"][..., self.ring.tail : self.ring.tail + tokens] = 0

    def commit(self, let_go: int = 0) -> None:
        """Take over what the forward showed, its last `let_go` tokens left out; before the ring counts the others.

        Raises
        ------
        ValueError
            If the attention of a layer was not seen.
        """
        if len(self._new_queries or self._new_weights) != self.ring.keys.shape[0]:
            raise ValueError(
                "this policy watches the attention, but the model's attn_implementation was changed after the cache was"
                " made; make the cache again"
            )
        assert let_go == 0 or not self.accumulate, "accumulated attention cannot be taken back"
        for layer, queries in self._new_queries.items():
            self.queries[layer] = queries[:, :, : queries.shape[2] - let_go][:, :, -self.keep :].clone()
        for layer, weights in self._new_weights.items():
            visible = slice(self.ring.start, self.ring.start + weights.shape[-1])
            self.ring.channels["accumulated"][layer, :, :, visible] += weights
        self.begin(0)

    @torch.no_grad()
    def see(self, layer: int, query: torch.Tensor, key: torch.Tensor, scaling: float) -> None:
        """Called by the attention function of every layer that streams under the policy.

        Parameters
        ----------
        layer : int
            Its row in the ring.
        query : Tensor, (batch, query_heads, new, head_dim)
        key : Tensor, (batch, kv_heads, visible, head_dim)
            The visible cache, the new entries included.
        """
        self.see_queries(layer, query, scaling)
        if self.accumulate:
            index = torch.arange(key.shape[2], device=key.device)
            hidden = index > index[key.shape[2] - query.shape[2] :, None]
            self.add(layer, attention_received(query, key, hidden, scaling))

    def see_queries(self, layer: int, query: torch.Tensor, scaling: float) -> None:
        """As `see`, where what the queries give is computed elsewhere and told to `add`."""
        self.scaling = scaling
        if self.keep:
            older = self.queries.get(layer)
            joined = query if older is None else torch.cat([older, query], dim=2)
            self._new_queries[layer] = joined[:, :, -(self.keep + self._spare) :].clone()

    def add(self, layer: int, weights: torch.Tensor) -> None:
        """Attention ``(batch, kv_heads, visible)`` that the entries of a layer receive in the forward."""
        self._new_weights[layer] = weights

    def rebase(self, delta: int) -> None:
        """Move the kept queries with a rebase of the window."""
        rope = self.ring.rope
        self.queries = {i: turned_back(rope.layer(i), q, delta).to(q.dtype) for i, q in self.queries.items()}

    def latest(self) -> Queries:
        """The kept queries."""
        return Queries(self.keep, self.scaling, lambda layer, count: self.queries[layer].narrow(2, -count, count))
