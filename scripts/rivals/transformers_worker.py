"""transformers' own `generate()`: greedy, one of its caches, nothing evicted; time between two tokens.

`generate()` cannot be made to score a given text, so it has no perplexity; its cache is the full one.
"""

import time
from typing import Any

import torch
from torch_worker import ids_of, load, mean_nll, memory, synchronise
from transformers import CompileConfig, GenerationConfig, StoppingCriteria, StoppingCriteriaList
from worker import clock, main


class Clock(StoppingCriteria):
    """Notes the time after every token and never stops."""

    def __init__(self, device: str):
        self.device, self.times = device, []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        synchronise(self.device)
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Time `generate()` after a prompt of as many tokens as the cap, for as many tokens as the job decodes."""
    device, new = job["device"], len(job["ids"]) - job["first"]
    if job["method"].startswith("offloaded") and not device.startswith("cuda"):
        raise ValueError("an offloaded cache moves layers between a GPU and the host: it needs a GPU")
    model, ids = load(job), ids_of(job)
    prompt = ids[:, : job["first"]]
    config = GenerationConfig(
        max_new_tokens=new, min_new_tokens=new, do_sample=False, cache_implementation=job["method"], pad_token_id=0
    )
    if job["method"] == "static":
        config.compile_config = CompileConfig()
        config.compile_config._compile_all_devices = True  # else generate() compiles for GPUs only
    with torch.inference_mode():
        checked = mean_nll(model(prompt).logits, prompt)
    if job["method"] == "static":  # compiles, outside the measurement
        _, compile_seconds = clock(
            lambda: synchronise(device), lambda: model.generate(prompt, generation_config=config)
        )
    else:
        compile_seconds = None
    watch = Clock(device)
    start = time.perf_counter()
    model.generate(prompt, generation_config=config, stopping_criteria=StoppingCriteriaList([watch]))
    seconds = [b - a for a, b in zip(watch.times, watch.times[1:])]
    count = len(seconds)
    return {
        "index": list(range(job["first"] + 1, job["first"] + 1 + count)),
        "nll": [None] * count,
        "seconds": seconds,
        "kv_length": [job["first"] + 1 + at for at in range(count)],
        **memory(device),
        "prefill_tokens": job["first"],
        "prefill_seconds": watch.times[0] - start,
        "prefill_nll": checked,
        "compile_seconds": compile_seconds,
    }


if __name__ == "__main__":
    main(measure, "torch", "transformers", "numpy", "tokenizers", "triton", "datasets")
