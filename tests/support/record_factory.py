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
        "data": {"name": text, "sha256": f"hash of {text}", "source": "file", "tokens": 20_000},
        "policy": {"name": policy, "options": options or {}},
        "protocol": {
            **{"backend": "hf", "dtype": "float32", "device": "cpu", "tf32": False, "seed": 0, "cap": 256},
            **{"prefill_tokens": 10, "decode_tokens": len(arrays["index"]), "warmup_tokens": 64},
            **{"sample_every": 1, "repeats": 1},
            **protocol,
        },
        "summary": summarise(arrays, 0.5, 0.6, total_seconds, None),
    }


def make_bench_record(
    name: str,
    rung: str = "graph",
    policy: str = "strict",
    *,
    tpot_ms: float = 2.2,
    floor_ms: float = 2.0,
    chunk_seconds: list[float] | None = None,
    chunk_tokens: int = 50,
    chunks: int = 12,
    model: str = "random:pythia-2.8b",
    created: str = "2026-01-01T00:00:00+00:00",
    session: str = "session",
    turn: str | None = None,
    kv_bytes: float = 6.7e8,
    p99_over_p50: float = 1.01,
    blocks: list[dict[str, Any]] | None = None,
    status: str = "complete",
    **protocol: Any,
) -> dict[str, Any]:
    """A speed record that passes every check, by default of a GPU; further keywords go to `protocol`."""
    seconds = [chunk_tokens * tpot_ms / 1e3] * chunks if chunk_seconds is None else chunk_seconds
    tokens = chunk_tokens * len(seconds)
    tpot = 1e3 * sum(seconds) / tokens
    info = environment("cpu")
    info |= {"git": {"commit": "0" * 40, "dirty": False, "reason": None}, "gpu": dict(GPU)}
    latency = {"tokens": tokens, "mean": tpot, "p50": tpot, "p90": tpot, "p99": tpot * p99_over_p50, "max": 2 * tpot}
    ceiling = {"kind": "device-to-device copy", "copy_gbs": 3000.0, "read_gbs": 3100.0, "copy_bytes": 1 << 31}
    size = floor_ms * ceiling["copy_gbs"] * 1e6
    return {
        "id": name,
        "status": status,
        "status_reason": None if status == "complete" else "interrupted",
        "created": created,
        "session": session,
        "command": ["sinkstream", "bench"],
        "arguments": {},
        "environment": info,
        "model": make_record("x", model=model)["model"],
        "rung": {"name": rung, "summary": rung, "attention": "sdpa"},
        "policy": {"name": policy.split()[0], "label": policy, "options": {}},
        "protocol": {
            **{"dtype": "float16", "device": "cuda", "tf32": False, "seed": 0, "cap": 2052, "streams": 1},
            **{"prefill_tokens": 2052, "warmup_tokens": 64, "tokens": tokens, "chunk_tokens": chunk_tokens},
            **{"in_turn": 1 if turn is None else 2, "turn": turn or name, "feed": "greedy", "text": "random"},
            **{"text_sha256": "0" * 64, "tpot": "", "latency": "", "floor": ""},
            **protocol,
        },
        "ceiling": ceiling,
        "floor": {
            **{"weight_bytes": size - kv_bytes, "kv_token_bytes": kv_bytes / 2052, "visible_mean": 2052.0},
            **{"kv_bytes": kv_bytes, "bytes": size, "ms": floor_ms},
        },
        "setup": {"load_sec": 1.0, "prepare_sec": 2.0, "capture_sec": 0.5, "prefill_sec": 0.3, "warmup_sec": 0.1},
        "steady": {
            **{
                "tokens": tokens,
                "wall_sec": sum(seconds),
                "tpot_ms": tpot,
                "tokens_per_sec": protocol.get("streams", 1) * 1e3 / tpot,
            },
            **{"gbs": size / tpot / 1e6, "over_floor": tpot / floor_ms, "share_of_floor": floor_ms / tpot},
        },
        "latency_ms": {"all": latency, "event": latency, "other": latency},
        "chunks": {"tokens": [chunk_tokens] * len(seconds), "seconds": seconds},
        "blocks": blocks or [],
        "memory": {"peak_mb": 8000.0, "kind": "cuda_allocated"},
        "profile": None,
    }


def make_prompt_record(
    name: str,
    *,
    model: str = "random:pythia-2.8b",
    policy: str = "strict",
    forward_ms: float = 100.0,
    engine_ms: float = 110.0,
    over_step: float = 2.0,
    lengths: tuple[int, ...] = (2048, 8192, 32768),
    **protocol: Any,
) -> dict[str, Any]:
    """A prompt record that passes every check, of a GPU; further keywords go to `protocol`."""
    speed = make_bench_record(name, policy=policy, model=model)
    kept = ("id", "status", "status_reason", "created", "session", "command", "arguments", "environment", "model")
    times = {"forward_ms": forward_ms, "engine_ms": engine_ms, "dynamic_ms": 120.0, "drop_in_ms": 150.0}
    return {
        **{key: speed[key] for key in (*kept, "policy")},
        "protocol": {
            **{"dtype": "float16", "device": "cuda", "tf32": False, "seed": 0, "cap": 2052, "backend": "fused"},
            **{"lengths": list(lengths), "append_tokens": 50, "repeats": 5, "text": "random", "text_sha256": "0" * 64},
            **{"forward": "", "generate": "", "floor": ""},
            **protocol,
        },
        "ceiling": {"tflops": 600.0, "size": 8192, "dtype": "float16"},
        "prompts": [{"tokens": tokens, "flops": 10**13, "floor_ms": 60.0, **times} for tokens in lengths],
        "append": {"tokens": 50, "ms": 2 * over_step, "step_ms": 2.0, "over_step": over_step},
        "memory": {"held_mb": 6000.0, "peak_mb": 6200.0},
    }


def make_draw_record(
    name: str,
    *,
    model: str = "random:pythia-2.8b",
    policy: str = "strict",
    over_greedy: float = 1.01,
    **protocol: Any,
) -> dict[str, Any]:
    """A sampling record that passes every check, of a GPU; further keywords go to `protocol`."""
    speed = make_bench_record(name, policy=policy, model=model)
    kept = ("id", "status", "status_reason", "created", "session", "command", "arguments", "environment", "model")
    draws = [("greedy", {}, 1.0), ("top-p 0.95", {"temperature": 1.0, "top_p": 0.95}, over_greedy)]
    return {
        **{key: speed[key] for key in (*kept, "policy")},
        "protocol": {
            **{"dtype": "float16", "device": "cuda", "tf32": False, "seed": 0, "cap": 2052, "backend": "fused"},
            **{"tokens": 600, "warmup": 64, "repeats": 5, "text": "random", "text_sha256": "0" * 64},
            **protocol,
        },
        "draws": [
            {"name": n, "options": options, "ms": 2 * over, "over_greedy": over, "repeats_ms": [2 * over] * 5}
            for n, options, over in draws
        ],
    }


def make_generate_record(
    name: str,
    *,
    model: str = "random:pythia-2.8b",
    policy: str = "strict",
    over: float = 1.01,
    **protocol: Any,
) -> dict[str, Any]:
    """A record of tokens of generate() that passes every check, of a GPU; further keywords go to `protocol`."""
    record = make_draw_record(name, model=model, policy=policy)
    del record["draws"], record["protocol"]["backend"], record["protocol"]["repeats"]
    more = {**dict.fromkeys(("dynamic", "streaming", "median", "mean", "over"), "…"), "prompt_tokens": {}, "turns": 2}
    token = {"dynamic_median_ms": 10.0, "dynamic_mean_ms": 11.0}
    token |= {"streaming_median_ms": 10 * over, "streaming_mean_ms": 11 * over}
    return {
        **record,
        "protocol": {**record["protocol"], **more, **protocol},
        "turns": [token, token | {"streaming_median_ms": 10.5 * over}],
        "token": {**token, "median_over": over, "mean_over": over},
    }


def make_serve_record(
    name: str, part: str, *, model: str = "random:pythia-2.8b", device: str = "cuda", **figures: Any
) -> dict[str, Any]:
    """A record of a server that passes every check; further keywords replace figures of the part."""
    speed = make_bench_record(name, policy="strict", model=model)
    kept = ("id", "status", "status_reason", "created", "session", "command", "arguments", "environment", "model")
    ratio = {"turns": 100, "first": 2.0, "last": 2.0, "ratio": 1.0}
    place = {"pinned": 4, "kept": 500, "cap": 512, "evicted": 9000, "evicted_turns": 900}
    memory = {"early": 600.0, "last": 601.0, "max": 602.0}
    known: dict[str, dict[str, Any]] = {
        "turns": {
            **{"turns": 1000, "reply_tokens": 8, "sent_tokens": 12, "length_errors": 0, "errors": 0},
            **{"tpot_ms": ratio, "ttft_ms": {"turn": 10, "turns": 10, "early": 5.0, "late": 5.0, "ratio": 1.0}},
            **{"rss_mb": memory, "gpu_mb": None, "context": place, "series": {}},
        },
        "overhead": {"tokens": 64, "rounds": 3, "engine_ms": [2.0] * 3, "server_ms": [2.1] * 3, "over_engine": 0.05},
        "sessions": {"tokens": 64, "rows": []},
        "soak": {
            **{"seconds": 600.0, "users": 32, "requests": 1200, "by_status": {"200": 1200}, "unexpected_5xx": 0},
            **{"disconnects": 90, "refused_as_expected": 80, "wrongly_answered": 0, "compared": 900, "differing": 0},
            **{"leaked_sessions": 0, "leaked_files": 0, "generator": "locust", "rss_mb": memory},
        },
        "recall": {
            **{"talks": 6, "turns": 48, "rows": [], "unrelated": {"small talk": {"asked": 20, "recalled": 5}}},
            "facts": {
                form: {"asked": 40, "found": 30, "right": {"recall": 10, "none": 0, "whole": 2}}
                for form in ("named", "paraphrased")
            },
        },
        "restart": {
            **{"sessions": 8, "spilled": 8, "continued": 8, "next_tokens": 256, "same": 8, "turns_lost": 0},
        },
    }
    return {
        **{key: speed[key] for key in kept},
        "protocol": {
            **{"dtype": "float16", "device": device, "tf32": False, "seed": 0, "cap": 512},
            **{"evict": "turns", "backend": "fused", "client": ""},
        },
        "part": part,
        "figures": known[part] | figures,
    }
