"""Synthetic point records of a matrix, and a folder of them for the page."""

from pathlib import Path
from typing import Any

from record_factory import GPU, make_arrays, make_record

from sinkstream.matrix.record import PointRecord
from sinkstream.measure.memory import OWN
from sinkstream.records.blocks import Blocks

#: Policy, its label and options -> loss against recompute in nats, milliseconds a token, MB.
PLAN: list[tuple[str, str, dict[str, Any], float, float, float]] = [
    ("recompute", "recompute", {}, 0.0, 27.7, 7200.0),
    ("strict", "strict", {"sink": 4, "window": 508}, 0.004, 2.143, 6010.0),
    ("lazy", "lazy R=32", {"sink": 4, "window": 477, "compress_every": 32}, 0.006, 2.140, 6008.0),
    ("lazy", "lazy R=64", {"sink": 4, "window": 445, "compress_every": 64}, 0.009, 2.141, 6007.0),
    ("lazy", "lazy R=256", {"sink": 4, "window": 253, "compress_every": 256}, 0.030, 2.138, 6003.0),
    ("max-drop", "max-drop R=64 max_drop=8", {"compress_every": 64, "max_drop": 8}, 0.008, 2.144, 6008.0),
    ("refresh-window-attention", "refresh-window-attention R=64 B=64", {"refresh": 64}, -0.006, 3.21, 6055.0),
    ("adaptive-entropy", "adaptive-entropy", {"adaptive": "entropy"}, 0.012, 2.290, 6020.0),
    ("window-only", "window-only", {"sink": 0}, 0.55, 2.139, 6009.0),
]


def make_point(
    at: int, *, text: str = "pg19", model: str = "SmolLM2-135M", cap: int = 512, tokens: int = 1280, **more: Any
) -> dict[str, Any]:
    """Row `at` of `PLAN` as `PointRecord.write` takes it."""
    name, label, options, loss, tpot, memory = PLAN[at]
    arrays = make_arrays(tokens, seed=at + 7, shift=loss)
    own = make_record(f"point-{model}-{text}-{cap}-{at}", name, arrays=arrays, model=model, text=text, cap=cap)
    info = own["environment"] | {"gpu": dict(GPU)}
    blocks = Blocks.of(*(arrays[key] for key in ("index", "nll", "kv_length")))
    assert blocks is not None
    latency = {"p50": tpot, "p90": tpot * 1.004, "p99": tpot * 1.02, "max": tpot * 1.4}
    setup = {"prepare_sec": 0.4, "capture_sec": 0.6, "prefill_sec": 0.05}
    kept = ("id", "status", "status_reason", "created", "command", "arguments", "model", "data")
    return {
        **{key: own[key] for key in kept},
        "model": own["model"] | {"attn_implementation": "sdpa"},
        "environment": info,
        "name": own["id"],
        "experiment": "test",
        "policy": {"name": name, "label": label, "options": options},
        "protocol": {
            **{"dtype": "float16", "device": "cuda", "tf32": False, "seed": 0, "cap": cap, "cap_accounting": "peak"},
            "prefill_tokens": cap,
        },
        "configuration": {"quality": {}, "speed": {}, "policy": {"name": name, "options": {}}},
        "baselines": {"recompute": None, "strict": None, "full": None},
        "quality": {
            **{"backend": "hf", "evaluate": "blocks", "record": "run", "created": own["created"], "sample_every": 1},
            **{"summary": own["summary"], "blocks": blocks.record(), "sampled": None},
        },
        "speed": {
            **{"backend": "fused", "feed": "greedy", "text": "random", "warmup_tokens": 64, "steady_tokens": 600},
            **{"tpot_ms": tpot, "tpot_ms_range": [tpot, tpot], "latency_ms": latency, "floor_ms": 1.97},
            **{"over_floor": tpot / 1.97, "peak_mb": memory, "memory_kind": OWN},
            "repeats": [{"record": "b", "tpot_ms": tpot, "setup": setup}],
        },
        "spike": None,
        "seconds": {"quality": 1.0, "speed": 2.0},
        **more,
    }


def write_points(folder: Path) -> Path:
    """PG19 and WikiText, all rows of `PLAN`."""
    for text in ("pg19_dragons_blood", "wikitext103_test_4k"):
        for at in range(len(PLAN)):
            PointRecord.write(make_point(at, text=text), folder)
    return folder
