"""The memory that an engine needs, computed before anything is allocated, and the memory that is free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from sinkstream.cache import ModelSpec
from sinkstream.engine.prompt_choices import choosing_chunks, most_prunes_within
from sinkstream.engine.prompt_events import FORESEEN_TOKENS
from sinkstream.engine.reading import TILE as READ_TILE
from sinkstream.engine.short_chunks import short_chunk_sizes
from sinkstream.engine.state import REBASE_AT, StreamState
from sinkstream.kernels.observed_chunk import TILE as SCORES_TILE
from sinkstream.measure.memory import free_bytes
from sinkstream.policies import EvictionPolicy, PruneSchedule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CUDA_WORKSPACE = 2 * 32 * 2**20  # cuBLAS takes 32 MiB on recent GPUs, and as much again while a graph is captured


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that an engine needs in addition to the weights of its model.

    Attributes
    ----------
    streams : int
        Rings, scalars, logits and channels of all streams.
    prompt : int
        While a prompt is fed: the activations of one chunk, and those that captured forwards of short chunks keep.
        Where prunes are foreseen also the entries of a chunk; what the policy reads of attention and logits.
    workspace : int
        Of the device's libraries.
    """

    streams: int
    prompt: int
    workspace: int

    @property
    def total(self) -> int:
        """The sum of all parts, in bytes."""
        return self.streams + self.prompt + self.workspace

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        spec: ModelSpec,
        policy: EvictionPolicy,
        streams: int,
        chunk_tokens: int,
        *,
        captures: bool = False,
        max_sink: int | None = None,
        recall_slots: int = 0,
        recall_queries: int = 0,
        reread_tokens: int = 0,
    ) -> MemoryNeed:
        """The need of `streams` streams of a model under a policy, with prompts in chunks of `chunk_tokens`.

        Parameters
        ----------
        captures : bool
            Whether the backend captures CUDA graphs.
        max_sink : int or None
            Most sinks of a stream; default: the policy's.
        recall_slots : int
            The most tokens that are recalled at once; 0: no recall.
        recall_queries : int
            Latest queries that recall reads.
        reread_tokens : int
            The most tokens of a text that is read again, which has a ring of its own.
        """
        vocab = model.get_output_embeddings().weight.shape[0]
        empty = StreamState(
            spec,
            policy,
            positions="cache",
            streams=streams,
            vocab=vocab,
            device=torch.device("meta"),
            rebase_at=REBASE_AT,
            max_sink=max_sink,
            recall_slots=recall_slots,
            recall_queries=recall_queries,
        )
        size, workspace = spec.dtype.itemsize, CUDA_WORKSPACE if model.device.type == "cuda" else 0
        chunk, kept, foresees = chunk_tokens, 0, bool(PruneSchedule(policy).signals())
        choosing, sizes = choosing_chunks(policy, chunk, short_chunk_sizes(chunk) if captures else ())
        if captures:  # sizes are captured in any order: the pool holds up to twice the largest
            forwards = 1 + bool(recall_slots) + bool(reread_tokens)  # counted as if each had its own pool and stream
            largest = min(chunk, FORESEEN_TOKENS) if foresees else max(short_chunk_sizes(chunk)[-1], *sizes, 0)
            kept = 2 * largest * forwards
            workspace *= 1 + forwards
        read = _read_bytes(policy, spec, vocab, empty.geometry.slots)
        cached = (2 if captures else 1) * read  # what a captured forward reads lies in the pool of the graphs
        if foresees:
            chunk = min(chunk, FORESEEN_TOKENS)
            heads = 2 * spec.kv_heads + (spec.query_heads if policy.scorer is not None else 0)
            cached += (2 if captures else 1) * chunk * spec.layers * heads * spec.head_dim * size
        if choosing:  # captured forwards keep their tensors in a pool of their own
            cached += _choosing_bytes(policy, spec, choosing)
            cached += _choosing_bytes(policy, spec, sizes[-1]) if captures else 0
        cached += reread_tokens * 2 * spec.layers * spec.kv_heads * spec.head_dim * size
        width = 3 * model.config.intermediate_size + 6 * model.config.hidden_size
        hidden = (chunk + kept) * width * size
        return cls(empty.bytes, cached + hidden + 2 * vocab * 4, workspace)


def _choosing_bytes(policy: EvictionPolicy, spec: ModelSpec, tokens: int) -> int:
    """Bytes of the temporary tensors of one layer in which pinned tokens are chosen within a chunk."""
    head, entries = spec.kv_heads * spec.head_dim, policy.peak + tokens
    window = entries * head * (3 * spec.dtype.itemsize + 3 * 4)  # once more, and not rotated, twice
    queries = tokens * spec.query_heads * spec.head_dim * spec.dtype.itemsize
    chosen = policy.refresh * (1 + most_prunes_within(policy, tokens))
    return window + queries + 4 * chosen * head * 4


def _read_bytes(policy: EvictionPolicy, spec: ModelSpec, vocab: int, slots: int) -> int:
    """Bytes of the temporary tensors in which the logits or the attention of a chunk are read, float32."""
    logits = 3 * READ_TILE * vocab * 4 if {"risk", "nll", "entropy"} & policy.needs else 0
    scores = 3 * SCORES_TILE * spec.query_heads * slots * 4 if "accumulated" in policy.needs else 0
    return logits + scores


def check_engine(
    model: PreTrainedModel,
    spec: ModelSpec,
    policy: EvictionPolicy,
    streams: int,
    chunk_tokens: int,
    device: torch.device,
    *,
    captures: bool = False,
    max_sink: int | None = None,
    recall_slots: int = 0,
    recall_queries: int = 0,
    reread_tokens: int = 0,
) -> None:
    """Refuse, before allocating, streams that cannot fit. Raises ValueError with what is needed and what is free."""
    free = free_bytes(device)
    least = streams * policy.peak * 2 * spec.layers * spec.kv_heads * spec.head_dim * spec.dtype.itemsize
    if least > free:  # told before an object is made for each stream
        raise ValueError(
            f"{streams} streams of {policy.peak} slots need at least {_gb(least)} of memory on {device} beside the"
            f" model, and {_gb(free)} are free; accepted: fewer streams or a smaller cap"
        )
    need = MemoryNeed.of(
        model,
        spec,
        policy,
        streams,
        chunk_tokens,
        captures=captures,
        max_sink=max_sink,
        recall_slots=recall_slots,
        recall_queries=recall_queries,
        reread_tokens=reread_tokens,
    )
    if need.total > free:
        raise ValueError(
            f"{streams} streams of {policy.peak} slots need {_gb(need.total)} of memory on {device}"
            f" ({_gb(need.streams)} for the streams, {_gb(need.prompt)} while a prompt is fed,"
            f" {_gb(need.workspace)} workspace) beside the model, and {_gb(free)} are free;"
            " accepted: fewer streams, a smaller cap or smaller chunk_tokens"
        )


def check_weights(name: str, needed: int | None, device: torch.device) -> None:
    """Refuse, before loading, a model of a known size that cannot fit. Raises ValueError as `check_engine`."""
    if needed is not None and needed > (free := free_bytes(device)):
        raise ValueError(
            f"the weights of model {name!r} need {_gb(needed)} of memory on {device}, and {_gb(free)} are free;"
            " accepted: a smaller model, a dtype of fewer bytes, or another device"
        )


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
