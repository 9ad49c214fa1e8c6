"""KV archive: unrotated keys and values in host memory under a budget of bytes, then in a file."""

import copy
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import groupby
from threading import Lock
from typing import NamedTuple, Self

import numpy as np
import torch

from sinkstream.archive.base import ARCHIVES, Archive, Fetched
from sinkstream.archive.block_file import BlockFile

BLOCK = 64  # tokens that move together
STAGED = 4  # blocks that the page-locked buffer for what comes holds from the beginning


def block_shape(layers: int, kv_heads: int, head_dim: int) -> tuple[int, ...]:
    """Of keys and values of `BLOCK` tokens; token by token, so that tokens in a row are one piece of memory."""
    return BLOCK, 2, layers, kv_heads, head_dim


class _Transfers:
    """Copies between the device and the host that no step waits for.

    Blocks leave on a side stream, into page-locked buffers that are used again; a thread copies them on, since locking
    pages for every block would stop the device. What is read comes on another side stream. Pages are locked, and memory
    of the device is reserved, before the first block leaves, which is in the prompt as a rule. The host copies without
    the threads of PyTorch: a team of them waits for its last one, which a busy host may let wait for long.

    Parameters
    ----------
    block : Tensor
        The first block, on the device.
    """

    def __init__(self, block: torch.Tensor):
        self.device = block.device
        self._leaving, self._coming = torch.cuda.Stream(self.device), torch.cuda.Stream(self.device)
        with torch.inference_mode(False):
            self._free = [_page_locked(block) for _ in range(2)]
            self._staging = _page_locked(block.expand(STAGED, *block.shape)).flatten(0, 1)  # what comes
            with torch.cuda.stream(self._coming):
                torch.empty_like(self._staging, device=self.device)  # given back at once, and kept for what comes
        self._one_at_a_time = Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="archive")
        self._fetching = ThreadPoolExecutor(1, thread_name_prefix="archive-fetch")
        self._fetching.submit(self._coming.synchronize).result()  # so that no frame waits for the thread's beginning

    def leave(self, source: torch.Tensor) -> "Future[torch.Tensor]":
        """Copy a block to the host, once the present stream has written it."""
        with torch.inference_mode(False):
            buffer = self._free.pop() if self._free else _page_locked(source)
        self._leaving.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._leaving):
            buffer.copy_(source, non_blocking=True)
            source.record_stream(self._leaving)
            done = torch.cuda.Event()
            done.record(self._leaving)
        return self._thread.submit(self._keep, buffer, done)

    def _keep(self, buffer: torch.Tensor, done: torch.cuda.Event) -> torch.Tensor:
        done.synchronize()
        kept = torch.empty(buffer.shape, dtype=buffer.dtype)
        _copy_bytes(kept, buffer)
        self._free.append(buffer)
        return kept

    def come(self, parts: list["_Part"], *, later: bool) -> Fetched:
        """Copy tokens of the host to the device; gives what lets the present stream wait for their keys and values.

        Parameters
        ----------
        later : bool
            Whether a thread does it meanwhile. Otherwise it is done when it is waited for.
        """
        copied = self._fetching.submit(self._copy, parts).result if later else partial(self._copy, parts)

        def arrived() -> tuple[torch.Tensor, torch.Tensor]:
            keys, values, done = copied()
            present = torch.cuda.current_stream(self.device)
            present.wait_event(done)
            for tensor in (keys, values):
                tensor.record_stream(present)
            return keys, values

        return arrived

    @torch.no_grad()
    def _copy(self, parts: list["_Part"]) -> tuple[torch.Tensor, torch.Tensor, torch.cuda.Event]:
        tensors = [part.tensor for part in parts]
        tokens = sum(map(len, tensors))
        with self._one_at_a_time:
            if len(self._staging) < tokens:
                with torch.inference_mode(False):
                    size = -(-tokens // BLOCK) * BLOCK
                    self._staging = torch.empty(size, *tensors[0].shape[1:], dtype=tensors[0].dtype, pin_memory=True)
            self._coming.synchronize()  # nothing is copied out of the buffer any more
            staged, first = self._staging[:tokens], 0
            for tensor in tensors:
                _copy_bytes(staged[first : first + len(tensor)], tensor)
                first += len(tensor)
            with torch.cuda.stream(self._coming):
                moved = staged.to(self.device, non_blocking=True)
                (keys, values), done = _split(moved), torch.cuda.Event()
                done.record(self._coming)
        return keys, values, done


def _page_locked(like: torch.Tensor) -> torch.Tensor:
    """An empty tensor of the host from which the device copies by itself."""
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)


def _copy_bytes(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy between contiguous tensors of the host that are alike, by one thread, which does not hold Python's lock."""
    one, other = (tensor.view(torch.uint8).view(-1).numpy() for tensor in (target, source))
    np.copyto(one, other)


class _Block:
    """Keys and values of `BLOCK` tokens, as `block_shape`, on the host."""

    __slots__ = ("_coming", "_tensor")

    def __init__(self, source: torch.Tensor, transfers: _Transfers | None):
        self._tensor = source.detach().clone() if transfers is None else None
        self._coming: Future[torch.Tensor] | None = None
        if transfers is not None:
            self._coming = transfers.leave(source)
            self._coming.add_done_callback(self._arrived)

    def _arrived(self, coming: "Future[torch.Tensor]") -> None:
        """Keep the tensor alone: a future is many small objects, which the garbage collector would walk for ever."""
        if coming.exception() is None:  # else whoever asks for the tensor is told
            self._tensor, self._coming = coming.result(), None

    @property
    def tensor(self) -> torch.Tensor:
        """What was copied; waits until it has arrived."""
        coming = self._coming  # another thread may ask at the same time
        if coming is not None:
            self._tensor = coming.result()
            self._coming = None
        assert self._tensor is not None, "a block holds something"
        return self._tensor


class _Part(NamedTuple):
    """Tokens of one block, by their places in it."""

    block: "_Block | torch.Tensor"
    inside: list[int]

    @property
    def on_device(self) -> bool:
        """Whether they have not left the device: the latest tokens of the archive."""
        return isinstance(self.block, torch.Tensor) and self.block.is_cuda

    @property
    def tensor(self) -> torch.Tensor:
        """Keys and values, ``(tokens, 2, layers, kv_heads, head_dim)``, contiguous: as a rule a view."""
        block = self.block.tensor if isinstance(self.block, _Block) else self.block
        first, last = self.inside[0], self.inside[-1]
        if last - first == len(self.inside) - 1:  # as a rule, and no index must be copied
            return block[first : last + 1]
        return block[torch.tensor(self.inside, device=block.device)]


def _token_bytes(tensor: torch.Tensor) -> int:
    """Of keys and values ``(tokens, …)``."""
    return tensor.numel() * tensor.element_size() // len(tensor)


def _split(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys, float32, and values of ``(tokens, 2, layers, kv_heads, head_dim)``, as `Archive.read` gives them."""
    keys, values = tensor.permute(1, 2, 3, 0, 4)[:, :, None]
    return keys.float(), values


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
        self._open: torch.Tensor | None = None  # a block that is not full, on the device
        self._waiting = 0  # tokens in it
        self._token_bytes = 0  # once something has come
        self._transfers: _Transfers | None = None  # once something comes from a GPU

    @property
    def _block_bytes(self) -> int:
        return self._token_bytes * BLOCK

    @property
    def bytes(self) -> int:
        """Of blocks on the host and of tokens that wait for their block on the device."""
        return len(self._blocks) * self._block_bytes + self._waiting * self._token_bytes

    @property
    def file_bytes(self) -> int:
        """Of the blocks in the file."""
        return self._in_file * self._block_bytes

    def fetch_bytes(self, tokens: int) -> int:
        """As `Archive.fetch_bytes`."""
        return tokens * self._token_bytes

    def first_after(self, tokens: int) -> int:
        """As `Archive.first_after`."""
        blocks = self._in_file + len(self._blocks) + (self._waiting + tokens) // BLOCK
        held = self.budget_bytes // self._block_bytes + (0 if self.file is None else self.file.slots)
        return self.first + max(0, blocks - held) * BLOCK

    def append(self, ids: Sequence[int], keys: torch.Tensor, values: torch.Tensor) -> None:
        """As `Archive.append`. Raises WriteError if the file cannot be written."""
        self.ids.extend(ids)
        self.end += len(ids)
        self._fill(keys[:, 0], values[:, 0])

    def _fill(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write tokens ``(layers, kv_heads, tokens, head_dim)`` to the open block, and keep it when it is full."""
        layers, heads, count, dim = keys.shape
        done = 0
        while done < count:
            if self._open is None:
                with torch.inference_mode(False):
                    self._open = values.new_empty(block_shape(layers, heads, dim))
                self._token_bytes = _token_bytes(self._open)
            size = min(BLOCK - self._waiting, count - done)
            place, part = slice(self._waiting, self._waiting + size), slice(done, done + size)
            for which, entries in enumerate((keys, values)):
                self._open[place, which] = entries[:, :, part].movedim(2, 0)
            self._waiting += size
            done += size
            if self._waiting == BLOCK:
                full, self._open, self._waiting = self._open, None, 0
                self._keep(full)

    def _keep(self, block: torch.Tensor) -> None:
        if block.is_cuda and self._transfers is None:
            self._transfers = _Transfers(block)
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
        held += [] if self._open is None else [self._open[: self._waiting]]
        return [block.movedim(0, 3) for block in held]

    def refill(self, ids: Sequence[int], blocks: Sequence[torch.Tensor], device: torch.device) -> None:
        """As `Archive.refill`. Raises WriteError if the file cannot be written."""
        self.ids.extend(ids)
        self.end += len(ids)
        for block in blocks:
            self._token_bytes = _token_bytes(block.movedim(3, 0))
            if block.shape[3] == BLOCK:
                self._keep(block.movedim(3, 0))
            else:
                self._fill(*block.to(device))
        if self.lost:
            raise self._too_large(len(ids), self.budget_bytes)

    def read(
        self, indices: Sequence[int], device: torch.device, behind: Sequence[int] = ()
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Archive.read`."""
        return self._come(indices, device, later=False)()

    def fetch(self, indices: Sequence[int], device: torch.device, behind: Sequence[int] = ()) -> Fetched:
        """As `Archive.fetch`; from host memory to a GPU by a thread."""
        return self._come(indices, device, later=True)

    def _come(self, indices: Sequence[int], device: torch.device, *, later: bool) -> Fetched:
        parts, transfers = self._parts(indices), self._transfers
        host = [part for part in parts if not part.on_device]
        latest = [_split(part.tensor.to(device)) for part in (parts if transfers is None else parts[len(host) :])]
        arrived = transfers.come(host, later=later) if transfers is not None and host else None

        def joined() -> tuple[torch.Tensor, torch.Tensor]:
            found = latest if arrived is None else [arrived(), *latest]
            keys, values = zip(*found, strict=True)
            return (keys[0], values[0]) if len(found) == 1 else (torch.cat(keys, 3), torch.cat(values, 3))

        return joined

    def _parts(self, indices: Sequence[int]) -> list[_Part]:
        """The tokens block by block; blocks of the file are read."""
        self._check_held(indices)
        places = [divmod(index - self.first, BLOCK) for index in indices]
        return [
            _Part(self._block(number), [inside for _, inside in run])
            for number, run in groupby(places, key=lambda place: place[0])
        ]

    def _block(self, number: int) -> _Block | torch.Tensor:
        if number < self._in_file:
            assert self.file is not None, "blocks lie in a file"
            return self.file.read(number)
        if number < self._in_file + len(self._blocks):
            return self._blocks[number - self._in_file]
        assert self._open is not None, "the token is held"
        return self._open

    def fork(self, file: str | None = None) -> Self:
        """As `Archive.fork`; blocks in memory are shared."""
        other = copy.copy(self)
        if self.file is not None:
            assert file is not None, "a fork has a file of its own"
            other.file = self.file.copy(file)
        other.ids = self.ids[:]
        other._blocks, other._open = list(self._blocks), None if self._open is None else self._open.clone()
        return other

    def close(self) -> None:
        """Delete the file."""
        if self.file is not None:
            self.file.close()
