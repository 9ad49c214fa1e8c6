"""Safetensors files, written in pieces: no second copy of the tensors in host memory, checksums on the way.

The `safetensors` package reads the files. It does not write them: it copies every tensor, a CUDA tensor twice, which
takes longer than the disk.
"""

import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import BinaryIO

import numpy as np
import torch

PIECE = 1 << 24  # bytes
ALIGNMENT = 8  # of the first tensor, in bytes
LARGEST_CHECKSUM = (1 << 32) - 1
DTYPES = {  # names in the format
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
}


def checksum(tensor: torch.Tensor) -> int:
    """CRC-32 of the bytes of a CPU tensor in row-major order."""
    return zlib.crc32(_as_bytes(tensor).numpy().data)


def write_tensors(
    file: BinaryIO, tensors: Mapping[str, torch.Tensor], metadata: Callable[[Mapping[str, int]], dict[str, str]]
) -> None:
    """Write a safetensors file.

    Parameters
    ----------
    file : binary file
        Empty and seekable. The header, which holds the checksums, is written last.
    tensors : mapping of str to Tensor
        On any device, of the dtypes in `DTYPES`; none without elements.
    metadata : callable
        Of the `checksum` of every tensor, by name; returns the metadata of the file. Its length may depend on the
        length of a checksum's decimal number only.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))  # every tensor is aligned

    def header(checksums: Mapping[str, int]) -> bytes:
        entries: dict[str, object] = {"__metadata__": metadata(checksums)}
        end = 0
        for name in names:
            tensor = tensors[name]
            begin, end = end, end + tensor.numel() * tensor.dtype.itemsize
            entries[name] = {
                "dtype": DTYPES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [begin, end],
            }
        return json.dumps(entries, separators=(",", ":")).encode()

    longest = len(header(dict.fromkeys(names, LARGEST_CHECKSUM)))
    size = -(-longest // ALIGNMENT) * ALIGNMENT
    file.write(bytes(8 + size))
    with ThreadPoolExecutor(1) as beside:
        checksums = {name: _write(file, tensors[name], beside) for name in names}
    file.seek(0)
    file.write(size.to_bytes(8, "little") + header(checksums).ljust(size))
    file.seek(0, os.SEEK_END)


def _write(file: BinaryIO, tensor: torch.Tensor, beside: ThreadPoolExecutor) -> int:
    """Write the bytes of a tensor and return their checksum, which a second thread computes during the write."""
    value = 0
    for piece in _pieces(tensor):
        running = beside.submit(zlib.crc32, piece.data, value)
        file.write(piece.data)
        value = running.result()
    return value


def _pieces(tensor: torch.Tensor) -> Iterator[np.ndarray]:
    """The bytes of a tensor, `PIECE` at a time; each is valid until the next one is asked for."""
    parts = _as_bytes(tensor).split(PIECE)
    if tensor.device.type != "cuda":
        yield from (part.cpu().numpy() for part in parts)
        return
    buffers = [torch.empty(min(PIECE, len(parts[0])), dtype=torch.uint8, pin_memory=True) for _ in parts[:2]]
    copied = [torch.cuda.Event() for _ in buffers]

    def start(number: int) -> torch.Tensor:
        target = buffers[number % 2][: len(parts[number])]
        target.copy_(parts[number], non_blocking=True)
        copied[number % 2].record()
        return target

    with torch.cuda.device(tensor.device):
        coming = start(0)
        for number in range(len(parts)):
            piece = coming
            copied[number % 2].synchronize()
            if number + 1 < len(parts):
                coming = start(number + 1)
            yield piece.numpy()


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)
