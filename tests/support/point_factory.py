"""Point records of matrices whose NLL is that of one text, moved by planted differences."""

from pathlib import Path

import numpy as np
from record_factory import make_arrays, make_record

from sinkstream.bench.record import BenchRecord
from sinkstream.matrix.record import PointRecord
from sinkstream.records.blocks import Blocks

TOKENS = 2560


def point(
    name: str,
    policy: str = "strict",
    *,
    shift: float = 0.0,
    tpot: float = 1.0,
    cap: int = 512,
    text: str = "pg19",
    model: str = "SmolLM2-135M",
    label: str | None = None,
    sample_every: int = 1,
    status: str = "complete",
    repeats: tuple[float, ...] = (),
    options: dict | None = None,
    accounting: str = "peak",
    every: int = 4,
    commit: str | None = None,
    strict: str | None = None,
) -> dict:
    """A point record whose NLL is that of the text, moved by `shift` nats per token.

    `every`: of the sampled tokens, for pairs with a sampled baseline; `strict`: name of the linked strict point.
    """
    arrays = make_arrays(TOKENS, seed=len(name) + cap, shift=shift, noise=0.02)
    run = make_record(name, policy, arrays=arrays, model=model, text=text, cap=cap, device="cuda")
    kept = np.where(np.arange(TOKENS) % sample_every == 0, arrays["nll"], np.nan)
    blocks = Blocks.of(arrays["index"], kept, arrays["kv_length"])
    some = np.where(np.arange(TOKENS) % every == 0, arrays["nll"], np.nan)
    sampled = Blocks.of(arrays["index"], some, arrays["kv_length"])
    options = options or ({"slack": 16} if policy == "slack" else {})
    environment = run["environment"]
    if commit is not None:
        environment = environment | {"git": environment["git"] | {"commit": commit}}
    times, latency = repeats or (tpot,), {"p50": tpot, "p90": tpot, "p99": tpot, "max": tpot}
    one = {"record": "b", "created": "", "latency_ms": {}, "chunks": {}, "setup": {}}
    quality = {
        **{"backend": "hf", "evaluate": "blocks", "record": f"run-{name}", "created": "", "sample_every": sample_every},
        **{
            "summary": run["summary"],
            "blocks": blocks.record(),
            "sampled": {"every": every, "blocks": sampled.record()},
        },
    }
    speed = {
        **{"backend": "fused", "feed": "greedy", "text": "random", "warmup_tokens": 64, "steady_tokens": 600},
        **{"tpot_ms": tpot, "tpot_ms_range": [min(times), max(times)], "latency_ms": latency, "floor_ms": 0.5},
        **{"over_floor": 2.0, "peak_mb": 1.0, "memory_kind": "cuda_allocated"},
        "repeats": [one | {"tpot_ms": t} for t in times],
    }
    failed = status == "failed"
    return {
        **{key: run[key] for key in ("created", "command", "arguments")},
        "environment": environment,
        "data": run["data"] | {"key": text},
        **{"id": f"point-{name}", "name": name, "experiment": "test", "status": status},
        "status_reason": "quality: the logits that predict token 7 are not finite" if failed else None,
        "model": run["model"] | {"attn_implementation": "sdpa", "key": model},
        "policy": {"name": policy, "label": label or policy, "options": options},
        "protocol": {
            **{"dtype": "float16", "device": "cuda", "tf32": False, "seed": 0, "cap": cap},
            **{"cap_accounting": accounting, "prefill_tokens": cap},
        },
        "configuration": {"quality": {}, "speed": {}, "policy": {"options": options}},
        "baselines": {"recompute": None, "strict": strict and f"point-{strict}", "full": None},
        "quality": None if failed else quality,
        "speed": None if failed else speed,
        "spike": None,
        "seconds": {"quality": 1.0, "speed": 1.0},
    }


def write(folder: Path, *records: dict) -> Path:
    for record in records:
        (BenchRecord if "rung" in record else PointRecord).write(record, folder)
    return folder


def small_matrix(cap: int = 512, **more) -> list[dict]:
    """Recompute sampled, strict 0.1 % worse, lazy 1 %, slack 0.4 % and faster than lazy, refresh 2 %."""
    c = {"cap": cap, **more}
    r64 = {"compress_every": 64}
    return [
        point(f"recompute-{cap}", "recompute", sample_every=4, tpot=9.0, **c),
        point(f"strict-{cap}", "strict", shift=0.001, tpot=1.0, **c),
        point(f"lazy-{cap}", "lazy", shift=0.01, tpot=1.0, label="lazy R=64", options=r64, **c),
        point(f"slack-{cap}", "slack", shift=0.004, tpot=1.01, label="slack slack=16", **c),
        point(f"refresh-{cap}", "refresh-window-attention", shift=0.02, tpot=1.5, label="refresh", options=r64, **c),
    ]
