"""`StreamBuffers`: the tensors that streams keep between two steps, allocated once: their addresses never change."""

import torch

from sinkstream.cache import ModelSpec
from sinkstream.cache.channels import kept_channels
from sinkstream.engine.geometry import Geometry
from sinkstream.kernels.decide import COLUMNS
from sinkstream.kernels.layout import FIELDS
from sinkstream.policies import EvictionPolicy, PruneSchedule

PLAN_TOKENS = 256


class StreamBuffers:
    """Static ring buffers, scalars and tables of several independent streams.

    Parameters
    ----------
    spec : ModelSpec
    policy : EvictionPolicy
        Of a stream unless it is told another number of sinks.
    positions : {"cache", "original"}
    streams : int
    vocab : int
        Width of the logits.
    device : torch.device
    max_sink : int or None
        Most sinks of a stream; default: the policy's.
    recall_slots : int
        The most tokens that are recalled at once; 0: no recall.
    recall_queries : int
        Latest queries that recall reads.

    Attributes
    ----------
    keys, values : Tensor, (layers, streams, kv_heads, slots, head_dim), dtype of the model
    pinned_keys : Tensor, (layers, streams, kv_heads, pinned_slots, head_dim), float32
        Unrotated copies, from which pinned keys are rotated anew. Those of the sinks are filled at the first rebase.
    pinned_positions : Tensor, (layers or 1, streams, kv_heads or 1, refresh), int64
        Token index of every refreshed token.
    channels : dict of Tensor, (layers or 1, streams, kv_heads or 1, slots), float32
        Quantities that the scorer reads: structure, nll, entropy, accumulated.
    queries : Tensor or None, (layers, streams, query_heads, kept, head_dim), dtype of the model
        Latest queries, at their window positions; the query of token t in place ``t % kept``.
    scores : Tensor or None, (layers, streams, query_heads, slots), float32
    score_sums : Tensor or None, (layers, streams, query_heads), float32
        Scores of one step, as the kernels keep them where attention is accumulated, see `sinkstream.kernels.Observed`.
    logits : Tensor, (streams, vocab), float32
        Those of streams that sit steps out mean nothing until `StreamState.wake` or `settle`.
    tokens : Tensor, (streams,), int64
        Token ids that the next step appends; a negative one means the likeliest of the stream's logits.
    plan : Tensor, (256, streams, 8), int32
        Scalars of the coming steps, and the token ids of those that have begun.
    cursor : Tensor, (streams,), int64
        Row of the plan that the latest step read; -1 before the first. The same for all streams.
    scalars : Tensor, (streams, 8), int32
        See `layout`.
    risks : Tensor, (256, streams, signals), float32
        What adaptive triggers read in the logits of the steps of the plan.
    decisions_table : Tensor, (streams, 22), float64
        Where the device decides about prunes: what it knows of each stream, see `sinkstream.kernels.decide`.
    """

    keys: torch.Tensor
    values: torch.Tensor
    pinned_keys: torch.Tensor
    pinned_positions: torch.Tensor
    queries: torch.Tensor | None
    scores: torch.Tensor | None
    score_sums: torch.Tensor | None
    logits: torch.Tensor
    tokens: torch.Tensor
    plan: torch.Tensor
    cursor: torch.Tensor
    scalars: torch.Tensor
    risks: torch.Tensor
    decisions_table: torch.Tensor

    def __init__(
        self,
        spec: ModelSpec,
        policy: EvictionPolicy,
        *,
        positions: str,
        streams: int,
        vocab: int,
        device: torch.device,
        max_sink: int | None = None,
        recall_slots: int = 0,
        recall_queries: int = 0,
    ):
        self.spec, self.policy, self.streams, self.device = spec, policy, streams, device
        self.recall_queries = recall_queries
        self.geometry = Geometry.of(policy, positions, max_sink, recall_slots)
        self.signals = sorted(PruneSchedule(policy).signals())
        with torch.inference_mode(False):
            for name, (shape, dtype) in self._shapes(vocab).items():
                setattr(self, name, torch.zeros(shape, dtype=dtype, device=device))
            self.channels = {
                name: torch.zeros(shape, dtype=torch.float32, device=device)
                for name, shape in self._channel_shapes().items()
            }
        if not self.observed_queries:
            self.queries = None
        if "accumulated" not in self.channels:
            self.scores = self.score_sums = None

    @property
    def observed_queries(self) -> int:
        """How many of the latest queries are kept."""
        return self.policy.scorer.observed_queries if self.policy.scorer else self.recall_queries

    @property
    def bytes(self) -> int:
        """Memory held by the buffers, in bytes."""
        return sum(t.numel() * t.element_size() for t in self._buffers().values())

    def copy_in(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy a small tensor of the host to the device without waiting for it."""
        target.copy_(source.pin_memory() if self.device.type == "cuda" else source, non_blocking=True)

    def stream_buffers(self, stream: int) -> dict[str, torch.Tensor]:
        """Views of everything that belongs to one stream, by name; they keep their stream axis, of size 1."""
        parts = {
            name: getattr(self, name)[:, stream : stream + 1]
            for name in ("keys", "values", "pinned_keys", "pinned_positions")
        }
        if self.queries is not None:
            parts["queries"] = self.queries[:, stream : stream + 1]
        parts |= {f"channel_{name}": c[:, stream : stream + 1] for name, c in self.channels.items()}
        return parts | {"logits": self.logits[stream : stream + 1]}

    def _shapes(self, vocab: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        spec, g, streams = self.spec, self.geometry, self.streams
        cached = (spec.layers, streams, spec.kv_heads, g.slots, spec.head_dim)
        pinned = (spec.layers, streams, spec.kv_heads, g.bare.pinned_slots, spec.head_dim)
        layers, heads = self._choosers()
        accumulates = "accumulated" in self.policy.needs
        return {
            "keys": (cached, spec.dtype),
            "values": (cached, spec.dtype),
            "pinned_keys": (pinned, torch.float32),
            "pinned_positions": ((layers, streams, heads, g.refresh), torch.int64),
            "queries": (
                (spec.layers, streams, spec.query_heads, self.observed_queries, spec.head_dim),
                spec.dtype,
            ),
            "scores": ((spec.layers, streams, spec.query_heads, g.slots * accumulates), torch.float32),
            "score_sums": ((spec.layers, streams, spec.query_heads * accumulates), torch.float32),
            "plan": ((PLAN_TOKENS, streams, FIELDS), torch.int32),
            "risks": ((PLAN_TOKENS, streams, len(self.signals)), torch.float32),
            "decisions_table": ((streams, COLUMNS), torch.float64),
            "cursor": ((streams,), torch.int64),
            "scalars": ((streams, FIELDS), torch.int32),
            "tokens": ((streams,), torch.int64),
            "logits": ((streams, vocab), torch.float32),
        }

    def _channel_shapes(self) -> dict[str, tuple[int, ...]]:
        wide, slots = (self.spec.layers, self.spec.kv_heads), self.geometry.slots
        sizes = {c.name: wide if c.per_head else (1, 1) for c in kept_channels(self.policy)}
        return {name: (layers, self.streams, heads, slots) for name, (layers, heads) in sizes.items()}

    def _choosers(self) -> tuple[int, int]:
        """Layers and kv heads that choose their pinned tokens for themselves."""
        per_head = self.policy.scorer is not None and self.policy.scorer.per_head
        return (self.spec.layers, self.spec.kv_heads) if per_head else (1, 1)

    def _buffers(self) -> dict[str, torch.Tensor]:
        names = ["keys", "values", "pinned_keys", "pinned_positions", "queries", "plan", "risks", "cursor"]
        names += ["decisions_table", "scores", "score_sums", "scalars", "tokens", "logits"]
        held = {n: getattr(self, n) for n in names}
        held |= {f"channel_{n}": c for n, c in self.channels.items()}
        return {n: t for n, t in held.items() if t is not None}
