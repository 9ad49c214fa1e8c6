"""Attention that a chunk of a prompt gives to every slot, added up for the choice of pinned tokens.

Plain PyTorch, a tile of queries at a time; nothing that is launched depends on the host, so that a CUDA graph can hold
it.
"""

import torch

from sinkstream.kernels.attention_prefill import turned
from sinkstream.kernels.band import SCALARS, TOKENS, Band

TILE = 128  # queries of one tile


def accumulate_chunk(
    queries: torch.Tensor, keys: torch.Tensor, totals: torch.Tensor, band: Band, *, pinned_slots: int, scaling: float
) -> None:
    """Add the attention of the queries of a chunk to the totals of the slots; those of new tokens begin with it.

    Parameters
    ----------
    queries : Tensor, (tokens, query_heads, head_dim)
        Rotated for the window; padding, if any, comes last.
    keys : Tensor, (rows, kv_heads, slots, head_dim)
        The chunk's own are among them, and no token that a query sees has left.
    totals : Tensor, (rows, kv_heads, slots), float32
        Row `band.row` is written in place: attention received, mean over the query heads of a kv head.
    band : Band
        Of these tokens.
    pinned_slots : int
        Slots in front of the ring.
    scaling : float
        Of the scores.
    """
    row, (kv_heads, slots, dim) = band.device_row, keys.shape[1:]
    held = keys.index_select(0, row)[0].float()
    owner, tokens = band.owners(pinned_slots, slots - pinned_slots), band.table[TOKENS]
    pinned = torch.arange(slots, device=keys.device) < pinned_slots
    given = torch.zeros(kv_heads, slots, device=keys.device)
    for begin in range(0, band.rows, TILE):
        part = slice(begin, min(begin + TILE, band.rows))
        token = torch.arange(part.start, part.stop, device=keys.device)
        first, counts = band.table[SCALARS + part.start : SCALARS + part.stop], token < tokens
        scaled = queries[part].transpose(0, 1).float() * scaling
        window = torch.where(counts[:, None], scaled, 0.0)  # padding may be no number
        frame = window if band.rotation is None else turned(window, band.rotation[part])
        scores = window.reshape(kv_heads, -1, dim) @ held.mT
        scores[..., :pinned_slots] = frame.reshape(kv_heads, -1, dim) @ held[:, :pinned_slots].mT
        unseen = (owner > token[:, None]) | ~(pinned | (owner >= first[:, None]))
        weights = scores.view(kv_heads, -1, len(token), slots).masked_fill_(unseen, float("-inf")).softmax(-1)
        share = counts.float().repeat(weights.shape[1]) / weights.shape[1]
        given += share @ weights.flatten(1, 2)
    new = (owner >= 0) & (owner < tokens)
    before = totals.index_select(0, row)[0]
    totals.index_copy_(0, row, (before.masked_fill(new, 0.0) + given)[None])
