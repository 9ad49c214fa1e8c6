"""What decode attention keeps for the choice of pinned tokens: its queries, and the scores of every slot.

Attention is added up for every slot once a step, from the scores of all layers: the softmax of a layer is known only
when its last program has ended.
"""

import math
from dataclasses import dataclass

import torch

from sinkstream.kernels.layout import FIELDS, QUERY, SLOT
from sinkstream.kernels.runtime import FLOAT_DTYPES, check_tensor, jit, launch, tl, use_triton

TILE = 1024  # slots of one program


@dataclass(frozen=True)
class Observed:
    """What `attention_decode` keeps of its queries and their attention, for the choice of pinned tokens.

    Attributes
    ----------
    queries : Tensor or None, (streams, query_heads, kept, head_dim)
        The query of each stream's token, rotated for the window, is written to the place that the scalars say.
    scores : Tensor or None, (streams, query_heads, slots), float32
        Scores of every slot as logarithms, base 2; minus infinity where a slot is not visible.
    sums : Tensor or None, (streams, query_heads), float32
        Logarithms, base 2, of what the exponentials of the scores sum to. Given if `scores` are.
    """

    queries: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    sums: torch.Tensor | None = None

    @property
    def arguments(self) -> tuple:
        """Arguments of the kernel; one that is None is not even passed to the device."""
        kept = None if self.queries is None else self.queries.shape[2]
        return self.queries, self.scores, self.sums, kept

    @property
    def constants(self) -> dict[str, bool]:
        """Constants of the kernel."""
        return {"QUERIES": self.queries is not None, "SCORES": self.scores is not None}

    def check(self, keys: torch.Tensor, query_heads: int) -> None:
        """Check them for an op on these keys. Raises ValueError."""
        (streams, _, slots, head_dim), device = keys.shape, keys.device
        if self.queries is not None:
            room = (streams, query_heads, None, head_dim)
            check_tensor("queries", self.queries, room, dtypes=FLOAT_DTYPES, device=device)
        if (self.scores is None) != (self.sums is None):
            raise ValueError("scores and sums; accepted: both or neither")
        if self.scores is not None and self.sums is not None:
            check_tensor("keys", keys, tuple(keys.shape), dtypes=FLOAT_DTYPES, device=device)
            heads = (streams, query_heads)
            check_tensor("scores", self.scores, (*heads, slots), dtypes=(torch.float32,), device=device)
            check_tensor("sums", self.sums, heads, dtypes=(torch.float32,), device=device)

    def keep(self, query: torch.Tensor, scores: torch.Tensor, scalars: torch.Tensor) -> None:
        """What the kernel does, in plain PyTorch.

        Parameters
        ----------
        query : Tensor, (streams, query_heads, head_dim)
            Rotated for the window.
        scores : Tensor, (streams, kv_heads, query heads of one, slots)
            Natural logarithms.
        scalars : Tensor, (streams, 8), int32
        """
        if self.queries is not None:
            which = torch.arange(len(query), device=query.device)
            self.queries[which, :, scalars[:, QUERY].clamp(min=0).long()] = query.to(self.queries.dtype)
        if self.scores is not None and self.sums is not None:
            self.scores.copy_(scores.flatten(1, 2) / math.log(2))
            self.sums.copy_(scores.logsumexp(-1).flatten(1) / math.log(2))


NOT_OBSERVED = Observed()


@jit
def _accumulate_kernel(
    score_ptr, sum_ptr, scalar_ptr, total_ptr, slots, kv_heads, streams, G: tl.constexpr, TILE: tl.constexpr,
    FIELDS: tl.constexpr, SLOT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (tile of slots, kv head of one stream of one layer)."""
    which = tl.program_id(1)
    slot = tl.load(scalar_ptr + (which // kv_heads) % streams * FIELDS + SLOT)
    columns = tl.program_id(0) * TILE + tl.arange(0, TILE)
    mask = columns < slots
    place = total_ptr + which.to(tl.int64) * slots + columns
    before = tl.load(place, mask=mask & (columns != slot), other=0.0)
    weight = tl.zeros((TILE,), tl.float32)
    for g in tl.static_range(G):
        query = which.to(tl.int64) * G + g
        score = tl.load(score_ptr + query * slots + columns, mask=mask, other=-float("inf"))
        weight += tl.exp2(score - tl.load(sum_ptr + query))
    tl.store(place, before + weight / G, mask=mask)


def accumulate(
    scores: torch.Tensor,
    sums: torch.Tensor,
    scalars: torch.Tensor,
    totals: torch.Tensor,
    *,
    implementation: str | None = None,
) -> None:
    """Add the attention of one step to the totals of its slots; those of the new token begin with it.

    Parameters
    ----------
    scores : Tensor, (layers, streams, query_heads, slots), float32
        Logarithms, base 2; minus infinity where a slot is not visible. See `Observed`.
    sums : Tensor, (layers, streams, query_heads), float32
        Logarithms, base 2, of what the exponentials of the scores sum to.
    scalars : Tensor, (streams, 8), int32
        Of the step, see `sinkstream.kernels.layout`.
    totals : Tensor, (layers, streams, kv_heads, slots), float32
        Written in place: attention received, mean over the query heads of a kv head.
    implementation : {"auto", "triton", "torch"}, optional

    Raises
    ------
    ValueError
        Naming the argument that the op cannot serve and what is accepted.
    """
    device = scores.device
    check_tensor("scores", scores, (None, None, None, None), dtypes=(torch.float32,), device=device)
    layers, streams, query_heads, slots = scores.shape
    check_tensor("sums", sums, (layers, streams, query_heads), dtypes=(torch.float32,), device=device)
    check_tensor("scalars", scalars, (streams, FIELDS), dtypes=(torch.int32,), device=device)
    check_tensor("totals", totals, (layers, streams, None, slots), dtypes=(torch.float32,), device=device)
    kv_heads = totals.shape[2]
    if query_heads % kv_heads:
        raise ValueError(f"totals of {kv_heads} kv heads; accepted: a divisor of {query_heads}, the query heads")
    if not use_triton(implementation, scores):
        return accumulate_twin(scores, sums, scalars, totals)
    launch(
        _accumulate_kernel, (-(-slots // TILE), layers * streams * kv_heads), scores, sums, scalars, totals, slots,
        kv_heads, streams, G=query_heads // kv_heads, TILE=TILE, FIELDS=FIELDS, SLOT=SLOT, num_warps=4, pdl=False,
    )  # fmt: skip


def accumulate_twin(scores: torch.Tensor, sums: torch.Tensor, scalars: torch.Tensor, totals: torch.Tensor) -> None:
    """The twin of the kernel."""
    weights = torch.exp2(scores - sums[..., None]).unflatten(2, (totals.shape[2], -1)).mean(3)
    new = torch.arange(totals.shape[3], device=totals.device) == scalars[:, SLOT, None]
    totals.copy_(totals.masked_fill(new[:, None], 0.0) + weights)
