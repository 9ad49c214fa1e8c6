"""Which tokens a cache has seen: enough of them to tell a conversation that goes on from one that is another.

`generate()` is given the whole conversation and hands on what lies past the length of the cache, whatever the tokens
before it are. So the cache remembers what it saw: the latest ids themselves, all earlier ones as one hash a row.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import pad

REMEMBERED = 8_192  # the latest ids, at least; the oldest half of the buffer is hashed when it is full
MULTIPLIER = 6_364_136_223_846_793_005  # of a polynomial hash modulo 2 ** 64


class SeenTokens:
    """The token ids of a cache's streams, in bounded memory on the device of the cache; nothing here waits for it.

    Parameters
    ----------
    batch : int
    device : torch.device
    """

    def __init__(self, batch: int, device: torch.device):
        self._ids = torch.zeros(batch, 2 * REMEMBERED, dtype=torch.int32, device=device)
        self._hash = torch.zeros(batch, dtype=torch.int64, device=device)
        self._hashed = self._count = 0
        self.complete = True

    @property
    def device(self) -> torch.device:
        """Where the ids are."""
        return self._ids.device

    @property
    def bytes(self) -> int:
        """Memory held, in bytes."""
        return sum(t.numel() * t.element_size() for t in (self._ids, self._hash))

    def saved(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Counts, and the tensors ``seen_ids`` (batch, latest) and ``seen_hash`` (batch,), for the file of a stream."""
        counts = {"hashed": self._hashed, "complete": self.complete}
        return counts, {"seen_ids": self._ids[:, : self._count], "seen_hash": self._hash}

    def load(self, counts: dict[str, Any], ids: torch.Tensor, hashed: torch.Tensor) -> None:
        """Take over what `saved` gave; raises ValueError if it is of another shape."""
        if ids.shape[1] > self._ids.shape[1] or len(ids) != len(self._ids) or hashed.shape != self._hash.shape:
            raise ValueError(f"ids of shape {tuple(ids.shape)}; accepted: {len(self._ids)} rows of {2 * REMEMBERED}")
        self._hashed, self.complete, self._count = int(counts["hashed"]), bool(counts["complete"]), ids.shape[1]
        self._ids[:, : self._count] = ids
        self._hash.copy_(hashed)

    def copy(self) -> "SeenTokens":
        """The same tokens in buffers of their own."""
        other = copy.copy(self)
        other._ids, other._hash = self._ids.clone(), self._hash.clone()
        return other

    def take(self, rows: torch.Tensor) -> "SeenTokens":
        """A copy that consists of these rows, ``(any,)`` int64, of the batch."""
        taken = object.__new__(type(self))
        taken.__dict__ |= self.__dict__
        taken._ids, taken._hash = self._ids[rows], self._hash[rows]
        return taken

    def append(self, ids: torch.Tensor | None) -> None:
        """Remember new tokens ``(batch, new)``; None where the caller gave embeddings: then nothing can be compared."""
        if ids is None:
            self.complete = False
            return
        for part in ids.split(REMEMBERED, dim=1) if ids.shape[1] > REMEMBERED else (ids,):
            if self._count + part.shape[1] > self._ids.shape[1]:
                self._hash_oldest()
            self._ids.narrow(1, self._count, part.shape[1]).copy_(part)
            self._count += part.shape[1]

    def rewind(self, tokens: int) -> None:
        """Forget the latest tokens; where they are known by their hash only, nothing can be compared any more."""
        self.complete = self.complete and tokens <= self._count
        self._count = max(0, self._count - tokens)

    def first_difference(self, ids: torch.Tensor) -> int | None:
        """Index of the first token of ``(batch, tokens)``, at least as many as were seen, that is not the one seen.

        Returns
        -------
        int or None
            None if all agree. A difference among tokens that are known by their hash only is told as the index of the
            last of them.
        """
        ids = ids.to(self._ids.device)
        seen = self._hashed + self._count
        older = (_fold(torch.zeros_like(self._hash), ids[:, : self._hashed]) != self._hash).any()
        different = (ids[:, self._hashed : seen] != self._ids[:, : self._count]).any(0)
        found = torch.cat([older[None], different]).nonzero()[:1, 0].tolist()
        return None if not found else max(0, self._hashed - 1 + found[0])

    def _hash_oldest(self) -> None:
        kept = self._count - REMEMBERED
        leaving = self._count if kept <= 0 else REMEMBERED
        self._hash = _fold(self._hash, self._ids[:, :leaving])
        rest = self._ids[:, leaving : self._count].clone()
        self._ids[:, : rest.shape[1]] = rest
        self._hashed, self._count = self._hashed + leaving, rest.shape[1]


def check_beginning(ids: torch.Tensor, seen: int, known: SeenTokens, of: str = "the conversation") -> None:
    """Raise ValueError unless ids ``(batch, tokens)``, where there are more than `seen`, begin with what was seen."""
    index = known.first_difference(ids) if ids.shape[1] > seen else None
    if index is not None:
        raise ValueError(
            f"{of} differs from what the cache has seen at token {index} of {seen}; the cache cannot"
            " go back, so nothing was computed. Ways out: cache.reset() and pass the conversation again"
            " (also after a chat template has rendered an earlier turn in another way); pass new tokens only, with"
            " generate(**cache.continuation(new_ids), …) or cache.prefill(model, new_ids)"
        )


def unseen(
    ids: torch.Tensor, mask: torch.Tensor, seen: list[int], known: Callable[[int], SeenTokens | None]
) -> tuple[torch.Tensor, torch.Tensor]:
    """What each row of a padded conversation has that was not seen.

    Parameters
    ----------
    ids, mask : Tensor, (batch, tokens)
        0 in the mask where a row has pads, anywhere.
    seen : list of int
        Tokens that were seen of each row; empty before the first.
    known : callable
        ``known(row)`` gives the tokens that were seen of a row, where they are known.

    Returns
    -------
    ids, mask : Tensor, (batch, most new tokens of a row), int64
        New tokens, with pads before them.

    Raises
    ------
    ValueError
        If a row does not begin with what was seen of it, or has nothing new.
    """
    new = []
    for row, (row_ids, row_mask) in enumerate(zip(ids, mask)):
        own, before = row_ids[row_mask != 0], seen[row] if row < len(seen) else 0
        if len(own) <= before:
            raise ValueError(
                f"row {row} of the conversation has {len(own)} tokens, pads left out, and the cache has seen {before}"
                " of them; accepted: all tokens seen and at least one new one. A row that has ended is dropped by"
                " cache.batch_select_indices(indices of the others)"
            )
        row_known = known(row) if before else None
        if row_known is not None:
            check_beginning(own[None], before, row_known, f"row {row} of the conversation")
        new.append(own[before:])
    pads = [max(map(len, new)) - len(row) for row in new]
    filled = [pad(row, (p, 0)) for row, p in zip(new, pads)]
    masks = [pad(torch.ones_like(row), (p, 0)) for row, p in zip(new, pads)]
    return torch.stack(filled), torch.stack(masks)


def _fold(hashed: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Go on with a hash ``(batch,)`` over ids ``(batch, tokens)``, int64 arithmetic modulo 2 ** 64."""
    for part in ids.split(REMEMBERED, dim=1):
        factors = torch.full((part.shape[1] + 1,), MULTIPLIER, dtype=torch.int64, device=ids.device)
        factors[0] = 1
        powers = factors.cumprod(0).flip(0)
        hashed = hashed * powers[0] + ((part.long() + 1) * powers[1:]).sum(1)
    return hashed
