"""What scorers need from attention: the latest queries, and attention accumulated per cached token.

`cache.attention` shows the observer of the running forward the queries of every layer.
"""

import torch

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
        """Called by the attention function of every layer.

        Parameters
        ----------
        query : Tensor, (batch, query_heads, new, head_dim)
        key : Tensor, (batch, kv_heads, visible, head_dim)
            The visible cache, the new entries included.
        """
        self.scaling = scaling
        if self.keep:
            older = self.queries.get(layer)
            joined = query if older is None else torch.cat([older, query], dim=2)
            self._new_queries[layer] = joined[:, :, -(self.keep + self._spare) :].clone()
        if self.accumulate:
            visible = key.shape[2]
            index = torch.arange(visible, device=key.device)
            self._new_weights[layer] = self._weights(query, key, index, index[visible - query.shape[2] :])

    def rebase(self, delta: int) -> None:
        """Move the kept queries with a rebase of the window."""
        cos, sin = self.ring.rope.angles(torch.tensor(delta, device=self.ring.keys.device))
        self.queries = {i: self.ring.rope.unrotate(q, cos, sin).to(q.dtype) for i, q in self.queries.items()}

    def candidate_attention(self, leaving: int) -> torch.Tensor:
        """Attention that the kept queries give to the candidates, at their present cache positions.

        Queries whose tokens have left the window are passed over: they have no position any more.

        Returns
        -------
        Tensor, (layers, batch, kv_heads, candidates), float32
        """
        ring = self.ring
        slots = torch.arange(ring.live, device=ring.keys.device)
        index = torch.where(slots < ring.pinned, -1, ring.first_window + slots - ring.pinned)
        rows = []
        for layer, query in sorted(self.queries.items()):
            query = query[:, :, -(ring.seen - ring.first_window) :]
            asked = ring.seen - query.shape[2] + torch.arange(query.shape[2], device=query.device)
            rows.append(self._weights(query, ring.keys[layer, :, :, ring.start : ring.tail], index, asked))
        return torch.stack(rows)[..., ring.sink : ring.pinned + leaving]

    def _weights(self, query, key, key_index, query_index) -> torch.Tensor:
        """Attention summed over queries, mean over the heads of a group: ``(batch, kv_heads, visible)``, float32."""
        batch, heads, new, dim = query.shape
        groups = heads // key.shape[1]
        grouped = query.float().view(batch, key.shape[1], groups, new, dim)
        logits = torch.einsum("bhgqd,bhkd->bhgqk", grouped, key.float()) * self.scaling
        logits = logits.masked_fill(key_index > query_index[:, None], float("-inf"))
        return logits.softmax(-1).sum(3).mean(2)
