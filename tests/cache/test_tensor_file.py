"""Safetensors files written in pieces: the safetensors package reads what went in, the header holds the checksums."""

import io
import json
import zlib

import pytest
import torch
from safetensors.torch import load

from sinkstream.cache import tensor_file
from sinkstream.cache.tensor_file import DTYPES, checksum, write_tensors


def written(tensors) -> bytes:
    file = io.BytesIO()
    write_tensors(file, tensors, lambda checksums: {"sums": json.dumps(checksums)})
    return file.getvalue()


def metadata(data: bytes) -> dict[str, str]:
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]


@pytest.mark.parametrize("piece", [8, 64, 1 << 24])
def test_the_package_reads_what_was_written(piece, monkeypatch):
    monkeypatch.setattr(tensor_file, "PIECE", piece)
    torch.manual_seed(0)
    tensors = {str(dtype): (100 * torch.randn(3, 5, 2)).to(dtype) for dtype in DTYPES}
    tensors |= {"one": torch.tensor([7]), "columns": torch.randn(6, 4).t(), "part": torch.randn(2, 9, 3)[:, 2:5]}
    data = written(tensors)
    found = load(data)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], t) and found[name].dtype == t.dtype for name, t in tensors.items())
    wanted = {name: zlib.crc32(t.contiguous().view(torch.uint8).numpy().tobytes()) for name, t in tensors.items()}
    assert json.loads(metadata(data)["sums"]) == wanted == {name: checksum(t) for name, t in tensors.items()}


def test_another_bit_is_another_checksum():
    tensor = torch.arange(100.0)
    other = tensor.clone()
    other.view(torch.int32)[57] ^= 1
    assert checksum(tensor) != checksum(other)


def test_no_tensors_are_a_file():
    assert load(written({})) == {} and metadata(written({})) == {"sums": "{}"}
