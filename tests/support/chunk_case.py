"""A chunk of tokens on a stream that has begun, with what attention over it must give: cases of the prefill kernel."""

import math

import numpy as np
import torch
from ops_cases import DEVICE, draw
from ring_case import NAN, rotate

from sinkstream.kernels.attention_prefill import attention_prefill
from sinkstream.kernels.band import SCALARS, Band, Columns


class ChunkCase:
    """Queries of a chunk, keys of pinned tokens, of a ring and of the chunk, all drawn before they are rotated.

    Parameters
    ----------
    first : list of int
        Oldest window token that each query sees, counted from the chunk's first token.
    past, sink : int
        Tokens of the stream before the chunk; its first `sink` tokens are pinned.
    length, ring, start : int
        Entries of the ring, its slots, and the slot of the oldest entry. Other slots hold NaN.
    window_at : int
        Position that the first token of the chunk is rotated to in the window's frame.
    """

    def __init__(
        self, dtype, *, query_heads, kv_heads, head_dim, rotary, first, past, sink=4, length=0, ring=1, start=0,
        window_at=100, batch=1,
    ):  # fmt: skip
        self.first, self.past, self.sink, self.scaling = first, past, sink, head_dim**-0.5
        self.length, self.ring, self.start, self.window_at = length, ring, start, window_at
        self.inv_freq = 1e4 ** (-torch.arange(rotary // 2, device=DEVICE).double() / (rotary // 2))
        tokens, self.dtype = len(first), dtype
        self.query = draw(batch, query_heads, tokens, head_dim, scale=2.0)
        self.pinned = min(sink, past + tokens)
        shapes = {"pinned": self.pinned, "past": length, "own": tokens}
        self.keys = {n: draw(batch, kv_heads, count, head_dim) for n, count in shapes.items()}
        self.values = {n: draw(batch, kv_heads, count, head_dim) for n, count in shapes.items()}
        if past < self.pinned:  # the chunk brings sinks: its own first tokens
            assert window_at == past, "nothing has been rebased before the first prune"
            for part in (self.keys, self.values):
                part["own"][:, :, : self.pinned - past] = part["pinned"][:, :, past:]

    def visible(self, t: int) -> list[tuple[str, int]]:
        """What query t sees, in the order of the cache: (part, index)."""
        pinned = [("pinned", i) for i in range(self.pinned) if i <= self.past + t]
        window = [("past", self.length + i) if i < 0 else ("own", i) for i in range(self.first[t], t + 1)]
        return pinned + window

    def on_host(self) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Query, keys and values in float64 on the host, whose many small operations a device would take long for."""
        keys, values = ({n: part.cpu().double() for n, part in parts.items()} for parts in (self.keys, self.values))
        return self.query.cpu().double(), keys, values

    def scores(self, t: int, query: torch.Tensor, parts: dict[str, torch.Tensor]) -> torch.Tensor:
        """Those of query t at positions in the cache, (batch, query_heads, visible), float64."""
        inv_freq = self.inv_freq.cpu()
        keys = [rotate(parts[n][:, :, i], at, inv_freq) for at, (n, i) in enumerate(self.visible(t))]
        query = rotate(query[:, :, t], len(keys) - 1, inv_freq)
        groups = query.shape[1] // keys[0].shape[1]
        return (torch.stack(keys, 2).repeat_interleave(groups, 1) * query[:, :, None]).sum(-1) * self.scaling

    def expected(self) -> torch.Tensor:
        """Attention at positions in the cache, (batch, tokens, query_heads, head_dim), float64."""
        groups, (query, keys, values), out = self.query.shape[1] // self.keys["own"].shape[1], self.on_host(), []
        for t in range(len(self.first)):
            seen = torch.stack([values[n][:, :, i] for n, i in self.visible(t)], 2).repeat_interleave(groups, 1)
            out.append((self.scores(t, query, keys).softmax(-1)[..., None] * seen).sum(2))
        return torch.stack(out, 1).to(DEVICE)

    def expected_sums(self) -> torch.Tensor:
        """Logarithm, base 2, of the sum of every query's softmax in the first row, (query_heads, tokens), float64."""
        query, keys, _ = self.on_host()
        sums = [self.scores(t, query, keys)[0].logsumexp(-1) for t in range(len(self.first))]
        return torch.stack(sums, 1).to(DEVICE) / math.log(2)

    def columns(self) -> Columns:
        """Keys rotated in their frames, in the dtype of the case; the ring has NaN where nothing lies."""
        rotated = {n: self.keys[n].double() for n in self.keys}
        rotated["pinned"] = self._at(rotated["pinned"], 0)
        rotated["own"] = self._at(rotated["own"], self.window_at)
        rotated["past"] = self._at(rotated["past"], self.window_at - self.length)
        held = {}
        for name, part in (("keys", rotated), ("values", self.values)):
            slots = (self.start + torch.arange(self.length, device=DEVICE)) % self.ring
            ring = torch.full((*part["past"].shape[:2], self.ring, part["past"].shape[3]), NAN, device=DEVICE)
            ring = ring.to(self.dtype)
            ring[:, :, slots] = part["past"].to(self.dtype)
            pinned = part["pinned"].to(self.dtype).clone()
            pinned[:, :, self.past :] = NAN  # not written yet
            held |= {f"pinned_{name}": pinned, f"past_{name}": ring}
            held[name] = part["own"].to(self.dtype)
        return Columns(**held)

    def _at(self, keys: torch.Tensor, first: int) -> torch.Tensor:
        return (
            torch.stack([rotate(k, first + i, self.inv_freq) for i, k in enumerate(keys.unbind(2))], 2)
            if keys.shape[2]
            else keys
        )

    def turns(self) -> np.ndarray:
        """By how many positions each query is turned back to its place in the cache."""
        frame = np.array([len(self.visible(t)) - 1 for t in range(len(self.first))])
        return self.window_at + np.arange(len(self.first)) - frame

    def band(self, first: int = 0, turn: int = 0) -> Band:
        """The band of the case; `first` and `turn` put it off by so many, for a control."""
        return Band(
            np.array(self.first) + first,
            self.turns() + turn,
            self.inv_freq,
            past=self.past,
            start=self.start,
            length=self.length,
        )

    def run(self, implementation: str, band: Band | None = None, config=None) -> torch.Tensor:
        """The op on the case."""
        query = self._at(self.query.double(), self.window_at).to(self.dtype)
        return attention_prefill(
            query, self.columns(), band or self.band(), scaling=self.scaling, config=config,
            implementation=implementation,
        )  # fmt: skip

    def run_padded(self, implementation: str, *, padding: int, row: int, config=None, sums=None) -> torch.Tensor:
        """The op on the case padded with NaN at fixed addresses, in a row of several; 7 where nothing is written."""
        query, columns = self._at(self.query.double(), self.window_at).to(self.dtype), self.columns()

        def padded(part: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.pad(part, (0, 0, 0, padding), value=NAN)

        def among_others(part: torch.Tensor) -> torch.Tensor:
            others = torch.full((row, *part.shape[1:]), NAN, dtype=part.dtype, device=DEVICE)
            return torch.cat([others, part, others])

        columns = Columns(
            among_others(columns.pinned_keys), among_others(columns.pinned_values), among_others(columns.past_keys),
            among_others(columns.past_values), padded(columns.keys), padded(columns.values),
        )  # fmt: skip
        rows = len(self.first) + padding
        band = Band(
            np.array(self.first), self.turns(), self.inv_freq, past=self.past, start=self.start, length=self.length,
            row=row, table=torch.zeros(SCALARS + 2 * rows, dtype=torch.int32, device=DEVICE),
        )  # fmt: skip
        band.rotate()
        query = padded(query)
        out = torch.full((len(query), rows, query.shape[1], query.shape[3]), 7, dtype=self.dtype, device=DEVICE)
        return attention_prefill(
            query, columns, band, scaling=self.scaling, out=out, config=config, sums=sums,
            implementation=implementation,
        )  # fmt: skip
