"""Prompts and appended turns under refresh by attention, chunks that choose captured and not: one card, both shapes."""

import gc
import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch
from oracle.models import token_ids
from transformers import DynamicCache

from sinkstream.engine import Engine
from sinkstream.models import load_model

SHAPES = {"pythia-2.8b": torch.float16, "llama-3.2-1b": torch.bfloat16}
SCORERS = ("window-attention", "accumulated-attention")
TOKENS, TURN, CAP = 8192, 50, 2052


def median_ms(call, repeats: int = 3) -> float:
    call()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)


def engine_times(e: Engine, ids: torch.Tensor) -> dict:
    torch.cuda.reset_peak_memory_stats()

    def prompt() -> None:
        e.reset(stream=0)
        e.prefill(ids)

    found = {"prompt_ms": median_ms(prompt)}
    logits, pinned = e.state.logits[0].clone(), e.state.pinned_positions.clone()
    turns = []
    for i in range(70):  # every phase of R = 64; the first ones capture
        torch.cuda.synchronize()
        begin = time.perf_counter()
        e.prefill(ids[i : i + TURN])
        torch.cuda.synchronize()
        turns.append(1e3 * (time.perf_counter() - begin))

    def steps() -> None:
        for _ in range(64):
            e.advance(None, [0])

    found |= {
        "append_ms": statistics.median(turns[6:]),
        "append_mean_ms": statistics.mean(sorted(turns[6:])[:-4]),
        "step_ms": median_ms(steps) / 64,
        "captures": e.captures.count,
        "capture_s": e.captures.seconds,
        "peak_mb": torch.cuda.max_memory_allocated() / 2**20,
        "reserved_mb": torch.cuda.memory_reserved() / 2**20,
    }
    return found, logits, pinned


@torch.no_grad()
def main(shapes: list[str]) -> None:
    rows, begun = [], time.perf_counter()
    for shape in shapes:
        model = load_model(f"random:{shape}", dtype=SHAPES[shape], device="cuda").model
        ids = token_ids(TOKENS).cuda()
        weights = sum(p.nbytes for p in {p.data_ptr(): p for p in model.parameters()}.values()) / 2**20

        def forward(model=model, ids=ids) -> None:
            model(ids[None], past_key_values=DynamicCache(config=model.config), use_cache=True, logits_to_keep=1)

        plain = median_ms(forward)
        torch.cuda.empty_cache()
        for scorer in SCORERS:
            seen = {}
            for captured in (False, True):
                e = Engine(model, cap=CAP, compress_every=64, refresh=64, scorer=scorer, backend="fused")
                if not captured:
                    e._append.choosing.short.sizes = ()
                found, *seen[captured] = engine_times(e, ids)
                kv = (e.state.keys.nbytes + e.state.values.nbytes) / 2**20
                rows.append(
                    {"shape": shape, "scorer": scorer, "captured": captured, "forward_ms": plain, **found}
                    | {"prompt_over": found["prompt_ms"] / plain, "append_over": found["append_ms"] / found["step_ms"]}
                    | {"held_mb": weights + kv, "memory_over": found["peak_mb"] / (weights + kv)}
                )
                print(rows[-1], f"{time.perf_counter() - begun:.0f} s", flush=True)
                e.close()
                del e
                gc.collect()
                torch.cuda.empty_cache()
            (a, b), (c, d) = seen.values()
            difference, same = float((a - c).norm() / a.norm()), float((b == d).float().mean())
            rows[-1] |= {"logits_differ": difference, "same_pinned": same}
            print(f"{shape} {scorer}: logits differ by {difference:.4f}, same pinned tokens {same:.3f}", flush=True)
            Path(os.environ.get("OUT", "."), "prompt7.json").write_text(json.dumps(rows, indent=1))
        del model
        gc.collect()
        torch.cuda.empty_cache()
    print("shape         scorer                 captured  prompt/forward  append/step  peak/held  captures (s)")
    for r in rows:
        print(
            f"{r['shape']:13} {r['scorer']:22} {r['captured']!s:8} {r['prompt_over']:12.2f} {r['append_over']:14.2f}"
            f" {r['memory_over']:11.3f} {r['captures']:6d} {r['capture_s']:.1f}"
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or [*SHAPES]))
