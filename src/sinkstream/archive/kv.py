"""KV archive: unrotated keys and values in host memory under a budget of bytes, then in a file."""

import copy
from collections.abc import Sequence
from typing import Self

import torch

from sinkstream.archive.base import ARCHIVES, Archive
from sinkstream.archive.block_file import BlockFile

BLOCK = 64  # tokens that move together


class _Block:
    """Keys and values of `BLOCK` tokens, ``(2, layers, kv_heads, BLOCK, head_dim)``, on the host."""

    __slots__ = ("_ready", "_tensor")

    def __init__(self, source: torch.Tensor):
        self._ready = None
        if source.device.type == "cuda":  # no step waits: a side stream copies what the step's stream has written
            side = torch.cuda.Stream(source.device)
            side.wait_stream(torch.cuda.current_stream(source.device))
            self._tensor = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
            with torch.cuda.stream(side):
                self._tensor.copy_(source, non_blocking=True)
                source.record_stream(side)
                self._ready = torch.cuda.Event()
                self._ready.record(side)
        else:
            self._tensor = source.detach().clone()

    @property
    def tensor(self) -> torch.Tensor:
        """What was copied; waits until it has arrived."""
        if self._ready is not None:
            self._ready.synchronize()
            self._ready = None
        return self._tensor


@ARCHIVES.register("kv")
class KVArchive(Archive):
    """Unrotated keys and values on the host, oldest out first; exact, and large.

    Keys are held in the dtype of the model. Blocks are not written to again, so forks share them.

    Parameters
    ----------
    first : int
        Index of the first token that can leave.
    budget_bytes : int
        Of host memory; what does not fit goes to the file, or is lost.
    file : BlockFile or None
    """

    def __init__(self, first: int, *, budget_bytes: int, file: BlockFile | None = None):
        super().__init__(first)
        self.budget_bytes, self.file = budget_bytes, file
        self._blocks: list[_Block] = []
        self._in_file = 0  # blocks of the file; they are older than those in memory
        self._latest: list[torch.Tensor] = []  # (2, layers, kv_heads, tokens, head_dim) each, on the device
        self._block_bytes = 0

    @property
    def bytes(self) -> int:
        """Of blocks on the host and of tokens that wait for their block on the device."""
        waiting = sum(t.numel() * t.element_size() for t in self._latest)
        return len(self._blocks) * self._block_bytes + waiting

    @property
    def file_bytes(self) -> int:
        """Of the blocks in the file."""
        return self._in_file * self._block_bytes

    def room(self) -> int:
        """As `Archive.room`; of host memory alone, once a block has been kept."""
        blocks = self.budget_bytes // self._block_bytes - len(self._blocks) if self._block_bytes else 0
        return max(0, blocks * BLOCK - sum(t.shape[3] for t in self._latest))

    def append(self, ids: Sequence[int], keys: torch.Tensor, values: torch.Tensor) -> None:
        """As `Archive.append`. Raises WriteError if the file cannot be written."""
        self.ids.extend(ids)
        self.end += len(ids)
        self._latest.append(torch.stack([keys[:, 0].to(values.dtype), values[:, 0]]))
        waiting = sum(t.shape[3] for t in self._latest)
        if waiting < BLOCK:
            return
        joined = torch.cat(self._latest, 3)
        for first in range(0, waiting - BLOCK + 1, BLOCK):
            self._keep(joined[:, :, :, first : first + BLOCK])
        rest = waiting % BLOCK
        self._latest = [joined[:, :, :, waiting - rest :].clone()] if rest else []

    def _keep(self, block: torch.Tensor) -> None:
        self._block_bytes = block.numel() * block.element_size()
        self._blocks.append(_Block(block.contiguous()))
        while self._blocks and len(self._blocks) * self._block_bytes > self.budget_bytes:
            if self.file is None or self.file.append(self._blocks[0].tensor):  # the file may lose its oldest for it
                self._lose(BLOCK)
            else:
                self._in_file += 1
            del self._blocks[0]

    def read(self, indices: Sequence[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Archive.read`."""
        self._check_held(indices)
        parts, run = [], list[int]()
        for index in [*indices, -1]:  # tokens of one block are read at once
            if run and (index < 0 or self._number(index) != self._number(run[0])):
                parts.append(self._read_of(self._number(run[0]), run, device))
                run = []
            run.append(index)
        joined = torch.cat(parts, 3)
        return joined[0][:, None].float(), joined[1][:, None]

    def _number(self, index: int) -> int:
        return (index - self.first) // BLOCK

    def _read_of(self, number: int, indices: list[int], device: torch.device) -> torch.Tensor:
        inside = [index - self.first - number * BLOCK for index in indices]
        if number < self._in_file:
            assert self.file is not None, "blocks lie in a file"
            block = self.file.read(number)
        elif number < self._in_file + len(self._blocks):
            block = self._blocks[number - self._in_file].tensor
        else:
            block = torch.cat(self._latest, 3)
        if device.type == "cuda":  # a whole block is copied without waiting, a part of one is not
            block = block.to(device, non_blocking=True)
        if inside[-1] - inside[0] == len(inside) - 1:
            return block[:, :, :, inside[0] : inside[-1] + 1].to(device)
        return block[:, :, :, torch.tensor(inside, device=block.device)].to(device)

    def fork(self) -> Self:
        """As `Archive.fork`; blocks are shared. Raises ValueError if some may lie in a file."""
        if self.file is not None:
            raise ValueError("a stream whose archive has a file cannot be forked; accepted: an archive without a file")
        other = copy.copy(self)
        other.ids = self.ids[:]
        other._blocks, other._latest = list(self._blocks), list(self._latest)
        return other

    def close(self) -> None:
        """Delete the file."""
        if self.file is not None:
            self.file.close()
