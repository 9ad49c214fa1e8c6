"""Published checkpoints: a local directory in the Hugging Face layout, or a hub id that is first brought to one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from sinkstream.models.hashing import sha256_of_files
from sinkstream.models.loaded import MODEL_SOURCES, LoadedModel, LoadRequest

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
HUB_TEXT_PATTERNS = ("*.json", "*.txt", "*.model", "*.jinja")
HUB_WEIGHT_PATTERNS = ("model*.safetensors", "pytorch_model*.bin")
LOAD_ERRORS = (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError, SafetensorError)


@MODEL_SOURCES.register("directory")
def load_directory(spec: str, request: LoadRequest) -> LoadedModel:
    """A local directory with config.json, weights and (if it has one) a tokenizer."""
    path = Path(spec).expanduser()
    if not path.exists():
        raise ValueError(f"model {spec!r} does not exist")
    if not path.is_dir():
        raise ValueError(f"model {spec!r} is a file; accepted are a directory with config.json, or a .gguf file")
    return load_checkpoint(path, request, label=spec, name=path.resolve().name, source="directory")


@MODEL_SOURCES.register("hub")
def load_hub(spec: str, request: LoadRequest) -> LoadedModel:
    """A model id of the Hugging Face hub, fetched once into its cache."""
    try:
        path = Path(snapshot_download(spec, allow_patterns=[*HUB_TEXT_PATTERNS, HUB_WEIGHT_PATTERNS[0]]))
        if not any((path / file).exists() for file in WEIGHT_FILES[:2]):
            path = Path(snapshot_download(spec, allow_patterns=[*HUB_TEXT_PATTERNS, HUB_WEIGHT_PATTERNS[1]]))
    except (OSError, ValueError, HTTPError) as error:
        raise ValueError(
            f"model {spec!r} is neither here nor to be had from the hub ({first_line(error)}); accepted: 'builtin', "
            "'random:SHAPE' (as in random:pythia-2.8b), a directory with config.json, a .gguf file, "
            "or a hub id while the hub can be reached"
        ) from error
    return load_checkpoint(path, request, label=spec, name=spec, source="hub")


def load_checkpoint(path: Path, request: LoadRequest, *, label: str, name: str, source: str) -> LoadedModel:
    """Load the directory `path`; errors call it `label`. Raises ValueError if anything in it is missing or broken."""
    config_file(path, label)
    files = weight_files(path, label)
    model, tokenizer = read_checkpoint(path, request, label)
    return LoadedModel.of(model, tokenizer, name=name, source=source, hash=sha256_of_files(files))


def read_checkpoint(
    path: Path, request: LoadRequest, label: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Read model and tokenizer of a directory; a weight that its files lack is an error, never a random fill."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with hidden_progress():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=request.dtype,
                attn_implementation=request.attn_implementation,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True) if has_tokenizer(path) else None
    except LOAD_ERRORS as error:
        raise ValueError(f"model {label!r} cannot be loaded: {first_line(error)}") from error
    model, info = loaded
    refuse_missing(info, label)
    return model.to(request.device), tokenizer


def refuse_missing(info: dict, label: str) -> None:
    """Raise ValueError if transformers' loading info names weights that the files lack (it fills them at random)."""
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"model {label!r} is incomplete: it lacks {len(missing)} weights, first {missing[0]!r}")


def has_tokenizer(path: Path) -> bool:
    """Whether a directory holds the files of a tokenizer."""
    return any((path / file).is_file() for file in TOKENIZER_FILES)


def config_file(path: Path, label: str) -> Path:
    """The configuration of a directory. Raises ValueError if it lacks one."""
    if not (path / "config.json").is_file():
        raise ValueError(f"model {label!r} has no config.json, so it is not a model directory")
    return path / "config.json"


def weight_files(path: Path, label: str) -> list[Path]:
    """Return the weight files of a directory, in the order of their names. Raises ValueError if one is missing."""
    found = next((path / file for file in WEIGHT_FILES if (path / file).is_file()), None)
    if found is None:
        raise ValueError(f"model {label!r} has no weights; looked for {', '.join(WEIGHT_FILES)}")
    if found.suffix != ".json":
        return [found]
    try:
        names = sorted(set(json.loads(found.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"model {label!r} has a broken {found.name}: {first_line(error)}") from error
    if absent := [name for name in names if not (path / name).is_file()]:
        raise ValueError(f"model {label!r} is incomplete: {found.name} names {absent[0]!r}, which is not there")
    return [path / name for name in names]


@contextmanager
def hidden_progress() -> Iterator[None]:
    """Hide transformers' progress bars for a moment: loads from disk take a second or two."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """First line of an error's message, or its class name if it has none."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
