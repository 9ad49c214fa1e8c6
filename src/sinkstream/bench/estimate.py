"""What a benchmark will take, memory and time, as far as it is known before a model is loaded."""

import torch

from sinkstream.measure.memory import free_bytes
from sinkstream.models import shape_sizes, source_name
from sinkstream.models.shapes import PREFIX


def check_fits(model: str, dtype: torch.dtype, device: torch.device, slots: int) -> None:
    """Raise ValueError if a random shape and that many cached tokens cannot fit; nothing is allocated.

    Other models pass: the size of their weights is known when they are loaded, and their caches are checked then.
    """
    if source_name(model) != "random":
        return
    weights, cached = (count * dtype.itemsize for count in shape_sizes(model.removeprefix(PREFIX)))
    free = free_bytes(device)
    if weights + slots * cached > free:
        raise ValueError(
            f"{model} in {str(dtype).removeprefix('torch.')} takes {weights / 1e9:.2f} GB of weights and"
            f" {slots * cached / 1e9:.2f} GB of keys and values, and {free / 1e9:.2f} GB are free on {device};"
            " accepted: a smaller shape, --cap or --streams, fewer policies, or a --dtype of fewer bytes"
        )
