"""Synthetic but complete run records for the tests of records and reports."""

from typing import Any

import numpy as np

from sinkstream.measure.environment import environment
from sinkstream.measure.metrics import summarise

GPU = {"name": "Test GPU", "memory_mb": 80_000, "driver": "570.0", "cuda_runtime": "12.8"}


def make_arrays(n_tokens: int = 1280, *, seed: int = 0, shift: float = 0.0, noise: float = 0.05) -> dict[str, Any]:
    """Arrays of a lazy run: a drop of 32 at every 32nd token; all seeds share the text's part of the NLL."""
    text = np.random.default_rng(1234).gamma(4.0, 0.8, n_tokens)
    rng = np.random.default_rng(seed)
    event = np.arange(n_tokens) % 32 == 31
    return {
        "index": np.arange(10, 10 + n_tokens),
        "nll": text + shift + noise * rng.standard_normal(n_tokens),
        "seconds": rng.uniform(0.02, 0.03, n_tokens),
        "kv_length": 225 + np.arange(n_tokens) % 32,
        "event": event,
        "drop_size": np.where(event, 32, 0),
    }


def make_record(
    name: str,
    policy: str = "strict",
    *,
    arrays: dict[str, Any] | None = None,
    model: str = "SmolLM2-135M",
    text: str = "pg19",
    created: str = "2026-01-01T00:00:00+00:00",
    command: tuple[str, ...] = ("sinkstream", "eval"),
    options: dict[str, Any] | None = None,
    total_seconds: float = 40.0,
    **protocol: Any,
) -> dict[str, Any]:
    """A record that passes every check, as `write_record` takes it; further keywords go to `protocol`."""
    arrays = make_arrays() if arrays is None else arrays
    info = environment("cpu")
    info["git"] = {"commit": "0" * 40, "dirty": False, "reason": None}
    if protocol.get("device") == "cuda":
        info["gpu"] = dict(GPU)
    return {
        "id": name,
        "status": "complete",
        "status_reason": None,
        "created": created,
        "command": list(command),
        "arguments": {"cap": 256, "text": text},
        "environment": info,
        "model": {
            **{"name": model, "source": model, "hash": f"hash of {model}", "n_params": 134_515_008},
            **{"family": "llama", "trained_positions": 8192},
        },
        "data": {"name": text, "sha256": f"hash of {text}", "tokens": 20_000},
        "policy": {"name": policy, "options": options or {}},
        "protocol": {
            **{"backend": "hf", "dtype": "float32", "device": "cpu", "tf32": False, "seed": 0, "cap": 256},
            **{"prefill_tokens": 10, "decode_tokens": len(arrays["index"]), "warmup_tokens": 64},
            **{"sample_every": 1, "repeats": 1},
            **protocol,
        },
        "summary": summarise(arrays, 0.5, 0.6, total_seconds, None),
    }
