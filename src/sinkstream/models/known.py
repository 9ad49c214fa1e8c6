"""What is known of a model before its weights are loaded: its name and the positions that it was trained on."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import try_to_load_from_cache

from sinkstream.models.checkpoint import LOAD_ERRORS, config_file
from sinkstream.models.gguf_file import builtin_file, is_complete, place_of_copy
from sinkstream.models.hashing import sha256_of_files
from sinkstream.models.load import source_name
from sinkstream.models.loaded import trained_positions
from sinkstream.models.shapes import PREFIX, shape_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class KnownModel:
    """What a configuration says; the fields are those of `LoadedModel`."""

    name: str
    source: str
    trained_positions: int | None


def known_model(spec: str) -> KnownModel | None:
    """What the configuration of a model says; nothing is fetched.

    None for a hub id that is not in the hub's cache, and for a configuration that cannot be read: loading says why.
    Raises ValueError, as loading does, for an unknown shape, a directory without a configuration, and a built-in model
    whose package is missing.

    Parameters
    ----------
    spec : str
        As for `load_model`.
    """
    source, path = source_name(spec), Path(spec).expanduser()
    try:
        if source == "random":
            name, config = spec, shape_config(spec.removeprefix(PREFIX))
        elif source == "directory":
            name, config = path.resolve().name, _directory_config(path, spec)
        elif source == "hub":
            found = try_to_load_from_cache(spec, "config.json")
            if not isinstance(found, str):
                return None
            name, config = spec, _directory_config(Path(found).parent, spec)
        else:
            path = builtin_file() if source == "builtin" else path
            name, config = path.stem, _gguf_config(path)
    except _Unreadable:
        return None
    return KnownModel(name, source, trained_positions(config))


class _Unreadable(Exception):
    """A configuration is broken, or of a kind that is not known."""


def _directory_config(path: Path, label: str) -> PreTrainedConfig:
    return _read(config_file(path, label).parent)


def _gguf_config(path: Path) -> PreTrainedConfig:
    """Of the converted copy where there is one: the file itself takes seconds."""
    if not path.is_file():
        raise _Unreadable
    copy = place_of_copy(sha256_of_files([path]))
    return _read(copy) if is_complete(copy) else _read(path.parent, gguf_file=path.name)


def _read(folder: Path, **more: str) -> PreTrainedConfig:
    from transformers import AutoConfig  # slow to import

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **more)
    except (*LOAD_ERRORS, IndexError, ArithmeticError, struct.error) as error:
        raise _Unreadable from error
