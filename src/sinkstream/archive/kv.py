"""KV archive: unrotated keys and values in host memory under a budget of bytes, then in a file."""

import copy
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

import torch

from sinkstream.archive.base import ARCHIVES, Archive
from sinkstream.archive.block_file import BlockFile

BLOCK = 64  # tokens that move together


class _Transfers:
    """Copies between the device and the host that no step waits for.

    Blocks leave on a side stream, into page-locked buffers that are used again; a thread copies them on, since locking
    pages for every block would stop the device. What is read comes on another side stream.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._leaving, self._coming = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._free: list[torch.Tensor] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="archive")

    def leave(self, source: torch.Tensor) -> "Future[torch.Tensor]":
        """Copy a block to the host, once the present stream has written it."""
        with torch.inference_mode(False):
            buffer = self._free.pop() if self._free else torch.empty_like(source, device="cpu", pin_memory=True)
        self._leaving.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._leaving):
            buffer.copy_(source, non_blocking=True)
            source.record_stream(self._leaving)
            done = torch.cuda.Event()
            done.record(self._leaving)
        return self._thread.submit(self._keep, buffer, done)

    def _keep(self, buffer: torch.Tensor, done: torch.cuda.Event) -> torch.Tensor:
        done.synchronize()
        kept = torch.empty(buffer.shape, dtype=buffer.dtype).copy_(buffer)
        self._free.append(buffer)
        return kept

    def come(self, part: torch.Tensor) -> torch.Tensor:
        """Copy a part of a block to the device; the present stream waits for it, and it for nothing."""
        with torch.cuda.stream(self._coming):
            moved = part.to(self.device)
        present = torch.cuda.current_stream(self.device)
        present.wait_stream(self._coming)
        moved.record_stream(present)
        return moved


class _Block:
    """Keys and values of `BLOCK` tokens, ``(2, layers, kv_heads, BLOCK, head_dim)``, on the host."""

    __slots__ = ("_coming", "_tensor")

    def __init__(self, source: torch.Tensor, transfers: _Transfers | None):
        self._coming = None if transfers is None else transfers.leave(source)
        self._tensor = source.detach().clone() if transfers is None else None

    @property
    def tensor(self) -> torch.Tensor:
        """What was copied; waits until it has arrived."""
        if self._coming is not None:
            self._tensor, self._coming = self._coming.result(), None
        assert self._tensor is not None, "a block holds something"
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
        self._transfers: _Transfers | None = None  # once something comes from a GPU

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
        if block.is_cuda and self._transfers is None:
            self._transfers = _Transfers(block.device)
        self._blocks.append(_Block(block.contiguous(), self._transfers if block.is_cuda else None))
        while self._blocks and len(self._blocks) * self._block_bytes > self.budget_bytes:
            if self.file is None or self.file.append(self._blocks[0].tensor):  # the file may lose its oldest for it
                self._lose(BLOCK)
            else:
                self._in_file += 1
            del self._blocks[0]

    def blocks(self) -> list[torch.Tensor]:
        """As `Archive.blocks`: ``(2, layers, kv_heads, at most BLOCK, head_dim)`` each; all but the last are full."""
        in_file = [] if self.file is None else [self.file.read(number, copy=False) for number in range(self._in_file)]
        held = in_file + [block.tensor for block in self._blocks]
        return held + ([torch.cat(self._latest, 3)] if self._latest else [])

    def refill(self, ids: Sequence[int], blocks: Sequence[torch.Tensor], device: torch.device) -> None:
        """As `Archive.refill`. Raises WriteError if the file cannot be written."""
        self.ids.extend(ids)
        self.end += len(ids)
        for block in blocks:
            if block.shape[3] == BLOCK:
                self._keep(block)
            else:
                self._latest = [block.to(device, copy=True)]
        if self.lost:
            raise self._too_large(len(ids), self.budget_bytes)

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
        if inside[-1] - inside[0] == len(inside) - 1:  # as a rule, and no index must be copied
            part = block[:, :, :, inside[0] : inside[-1] + 1]
        else:
            part = block[:, :, :, torch.tensor(inside, device=block.device)]
        return part.to(device) if self._transfers is None or part.is_cuda else self._transfers.come(part)

    def fork(self, file: str | None = None) -> Self:
        """As `Archive.fork`; blocks in memory are shared."""
        other = copy.copy(self)
        if self.file is not None:
            assert file is not None, "a fork has a file of its own"
            other.file = self.file.copy(file)
        other.ids = self.ids[:]
        other._blocks, other._latest = list(self._blocks), list(self._latest)
        return other

    def close(self) -> None:
        """Delete the file."""
        if self.file is not None:
            self.file.close()
