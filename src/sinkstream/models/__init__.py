"""Where models come from: one `load_model` for published checkpoints, GGUF files, random shapes and a built-in one."""

from sinkstream.models.known import KnownModel, known_model
from sinkstream.models.load import check_seed, load_model, source_name
from sinkstream.models.loaded import MODEL_SOURCES, LoadedModel
from sinkstream.models.placement import check_dtype, resolve_device, resolve_dtype
from sinkstream.models.shapes import SHAPES, shape_config, shape_sizes
from sinkstream.models.size import weight_bytes

__all__ = [
    "MODEL_SOURCES",
    "SHAPES",
    "KnownModel",
    "LoadedModel",
    "check_dtype",
    "check_seed",
    "known_model",
    "load_model",
    "resolve_device",
    "resolve_dtype",
    "shape_config",
    "shape_sizes",
    "source_name",
    "weight_bytes",
]
