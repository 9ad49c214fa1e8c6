"""Files of streams that are changed by hand."""

import json

from safetensors import safe_open
from safetensors.torch import load_file, save_file


def rewrite(path, *, header=None, tensors=None) -> None:
    """Write a file anew with a changed header or changed tensors."""
    with safe_open(path, "pt") as file:
        found = json.loads(file.metadata()["sinkstream"])
    held = load_file(path)
    if header:
        header(found)
    if tensors:
        tensors(held)
    save_file(held, path, metadata={"sinkstream": json.dumps(found)})
