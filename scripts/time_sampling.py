"""Time a token of sampling against greedy decoding, in turns, through Engine as a user calls it (temporary)."""

import sys
import time

import torch

from sinkstream.engine import Engine

CASES = {
    "greedy": {},
    "temperature": {"temperature": 1.0},
    "top-p 0.95": {"temperature": 1.0, "top_p": 0.95},
    "top-k 40": {"temperature": 1.0, "top_k": 40},
    "min-p 0.05": {"temperature": 1.0, "min_p": 0.05},
    "top-k + top-p": {"temperature": 1.0, "top_k": 40, "top_p": 0.95},
    "repetition, greedy": {"repetition_penalty": 1.1},
    "temperature + penalties": {"temperature": 1.0, "repetition_penalty": 1.1, "presence_penalty": 0.5},
}


def seconds(engine: Engine, options: dict, tokens: int) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    engine.generate([], max_new_tokens=tokens, stop_tokens=(), **options)
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) / tokens


def main(shape: str, dtype: str) -> None:
    engine = Engine.from_pretrained(
        f"random:{shape}", cap=2052, backend="fused", dtype=getattr(torch, dtype), allow_untrained_positions=True
    )
    engine.prefill(torch.randint(1000, (2052,)))
    print(shape, dtype, torch.cuda.get_device_name(), flush=True)
    for name, options in CASES.items():
        begin = time.perf_counter()
        engine.generate([], max_new_tokens=50, stop_tokens=(), **options)
        print(f"  first 50 tokens of {name}: {time.perf_counter() - begin:.2f} s", flush=True)
    found = {name: [] for name in CASES}
    for _ in range(5):
        for name, options in CASES.items():
            found[name].append(seconds(engine, options, 300))
    middle = {name: sorted(times)[2] for name, times in found.items()}
    for name, value in middle.items():
        print(f"  {name}: {1e3 * value:.4f} ms, {value / middle['greedy']:.4f} x greedy", flush=True)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        main(*argument.split(":"))
