"""The rivals: project, environment, worker, and the configurations that are run."""

from dataclasses import dataclass, field
from typing import Any

#: Environment -> what pip installs there. torch comes from the pinned releases of constraints.txt.
ENVIRONMENTS = {
    "kvpress": ["kvpress==0.5.5", "transformers==5.2.0"],
    "transformers": ["transformers==5.24.0"],
    "llamacpp": ["cyllama==0.2.18", "numpy"],
    "llamacpp-server": ["xllamacpp==2026.10.11549"],
}
WITH_TORCH = ("kvpress", "transformers")


@dataclass(frozen=True)
class Rival:
    """One configuration of a rival."""

    project: str  # package that a record names, also the key of its version
    environment: str
    worker: str
    method: str | None
    label: str
    positions: str  # where a kept token stands after an eviction
    options: dict[str, Any] = field(default_factory=dict)
    call: str = "forward"  # or "generate": whose loop decodes
    quantised: bool = False  # computes in the GGUF file's own format


def _press(method: str, name: str, interval: int, said: str = "", *, blocks: bool = True, **options: Any) -> Rival:
    """A `DecodingPress`; with `blocks`, most of the text is scored in blocks (see kvpress_worker.py)."""
    given = {"interval": interval, "blocks": blocks, **options}
    shown = ", ".join(f"{option.replace('_', ' ')} {value}" for option, value in options.items())
    label = f"kvpress {name}{f' ({shown})' if shown else ''}, every {interval}{said}"
    return Rival("kvpress", "kvpress", "kvpress_worker.py", method, label, "original", given)


def _generate(method: str, label: str) -> Rival:
    return Rival(
        "transformers",
        "transformers",
        "transformers_worker.py",
        method,
        f"transformers generate(), {label}",
        "nothing is evicted",
        {},
        call="generate",
    )


def _shift(label: str, keep: int, discard: int | None) -> Rival:
    options = {"keep": keep, "discard": discard, "blocks": False}
    label = f"llama.cpp context shift, keep {keep}, {label}"
    return Rival(
        "cyllama", "llamacpp", "llamacpp_worker.py", "context shift", label, "in the cache", options, quantised=True
    )


OWN_ROTATION = ", each query at its own position"
RIVALS = {
    "kvpress-snapkv-32": _press("SnapKVPress", "SnapKV", 64, blocks=False, window_size=32),
    "kvpress-snapkv-32-own": _press("SnapKVPress", "SnapKV", 64, OWN_ROTATION, window_size=32),
    "kvpress-snapkv-64-own": _press("SnapKVPress", "SnapKV", 128, OWN_ROTATION, window_size=64),
    "kvpress-snapkv-default": _press("SnapKVPress", "SnapKV", 64),
    "kvpress-tova": _press("TOVAPress", "TOVA", 64),
    "kvpress-tova-16": _press("TOVAPress", "TOVA", 16),
    "kvpress-knorm": _press("KnormPress", "KNorm", 64),
    "kvpress-streaming-llm": _press("StreamingLLMPress", "StreamingLLM", 64, n_sink=4),
    "generate-dynamic": _generate("dynamic", "dynamic cache"),
    "generate-static": _generate("static", "static cache, compiled"),
    "generate-offloaded": _generate("offloaded", "offloaded cache"),
    "llamacpp-half": _shift("half at once", 4, None),
    "llamacpp-64": _shift("64 at once", 4, 64),
    "llamacpp-1": _shift("1 at once", 4, 1),
    "llamacpp-no-sinks": _shift("half at once", 0, None),
}
