"""How large a model will be in memory, where that can be told without loading it."""

from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from sinkstream.models.checkpoint import weight_files
from sinkstream.models.load import source_name
from sinkstream.models.shapes import PREFIX, shape_config

FLOATS = ("F16", "BF16", "F32", "F64")


def weight_bytes(spec: str, dtype: torch.dtype) -> int | None:
    """Bytes of a model's weights in memory; None for a source whose size is not known before it is loaded.

    Known are "random:SHAPE" and directories of safetensors files, whose headers are read. Raises ValueError for an
    unknown shape or a directory that lacks weights.

    Parameters
    ----------
    spec : str
        As for `load_model`.
    dtype : torch.dtype
        Of the weights in memory.
    """
    source = source_name(spec)
    if source == "random":
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(shape_config(spec.removeprefix(PREFIX)), dtype=dtype)
        return sum(p.nbytes for p in model.parameters())
    path = Path(spec).expanduser()
    if source != "directory" or not path.is_dir():
        return None
    files = weight_files(path, spec)
    if any(f.suffix != ".safetensors" for f in files):
        return None
    return dtype.itemsize * sum(map(_floats, files))


def _floats(path: Path) -> int:
    """How many floating-point numbers a safetensors file holds; 0 for a broken one, which loading refuses."""
    try:
        with safe_open(str(path), "pt") as file:
            slices = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118  (not a mapping)
            return sum(prod(s.get_shape()) for s in slices if s.get_dtype() in FLOATS)
    except SafetensorError:
        return 0
