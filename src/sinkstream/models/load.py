"""The one entry: from what a user types after `--model` to a model that is ready to run."""

import os
import re

import torch

from sinkstream.models import checkpoint, gguf_file, shapes  # noqa: F401  (they register their sources)
from sinkstream.models.loaded import MODEL_SOURCES, LoadedModel, LoadRequest
from sinkstream.models.placement import check_dtype

LARGEST_SEED = 2**63 - 1  # of torch's generators
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def source_name(spec: str) -> str:
    """Return the name, in `MODEL_SOURCES`, of the source that `spec` asks for.

    A file or directory that exists wins over a hub id of the same name. Raises ValueError for an empty spec.
    """
    if not spec:
        raise ValueError("the model is empty; accepted: builtin, random:SHAPE, a directory, a .gguf file, a hub id")
    if spec == "builtin":
        return "builtin"
    if spec.startswith(shapes.PREFIX):
        return "random"
    if spec.lower().endswith(".gguf"):
        return "gguf"
    looks_like_id = HUB_ID.fullmatch(spec) and spec[0] not in "./~"
    return "hub" if looks_like_id and not os.path.exists(spec) else "directory"


def load_model(
    spec: str,
    *,
    dtype: torch.dtype,
    device: str | torch.device,
    attn_implementation: str = "sdpa",
    seed: int = 0,
) -> LoadedModel:
    """Load the model that `spec` names, in eval mode and without gradients.

    Parameters
    ----------
    spec : str
        "builtin" (SmolLM2-135M-Instruct), "random:SHAPE" (see `SHAPES`), a directory in the Hugging Face layout,
        a .gguf file, or a hub id.
    dtype : torch.dtype
        A floating-point dtype of the weights in memory.
    device : str or torch.device
    attn_implementation : str, default="sdpa"
        Handed to transformers.
    seed : int, default=0
        Seed of random weights, 0 to 2^63 - 1; read checkpoints do not depend on it.

    Raises
    ------
    ValueError
        For a model that does not exist, is incomplete or broken, or whose package is missing; for an unknown shape, a
        dtype that is not a floating-point one, a seed out of range.
    """
    check_dtype(dtype)
    check_seed(seed)
    request = LoadRequest(dtype, torch.device(device), attn_implementation, seed)
    return MODEL_SOURCES[source_name(spec)](spec, request)


def check_seed(seed: int) -> None:
    """Raise ValueError unless torch's generators take the seed."""
    if not 0 <= seed <= LARGEST_SEED:
        raise ValueError(f"seed={seed} is not accepted; accepted: 0 to {LARGEST_SEED}")
