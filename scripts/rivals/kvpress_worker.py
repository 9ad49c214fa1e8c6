"""kvpress: a `DecodingPress` over a text, teacher-forced, as kvpress's own pipeline decodes.

The cache holds ``cap - interval`` tokens after a compression and grows by `interval`, so that its peak is the cap. The
prefill is as long as a compressed cache: the first compression is due when the cache is full for the first time.

The first `timed_tokens` are decoded one by one. Then, if the rival's option `blocks` says so, the tokens between two
compressions go through the model and the press's hooks in one forward: the cache does not change between them, so that
their loss is the same. One thing differs: a press that asks the latest queries (SnapKV) is given the rotation of each,
where a decode step gives it the rotation of the last one for all.
"""

from dataclasses import dataclass, field
from typing import Any

import kvpress
import torch
from torch_worker import ids_of, load, mean_nll, memory, synchronise
from transformers import DynamicCache
from worker import Tokens, clock, main


@dataclass
class Stream:
    """A model, its cache and what was measured."""

    model: Any
    ids: torch.Tensor  # (1, tokens)
    device: str
    cache: DynamicCache = field(default_factory=DynamicCache)
    tokens: Tokens = field(default_factory=Tokens)

    @property
    def entries(self) -> int:
        """KV entries that the first layer holds."""
        return self.cache.layers[0].keys.shape[2]

    def forward(self, first: int, last: int) -> tuple[torch.Tensor, float]:
        """Append tokens `first` to `last` - 1; their logits (tokens, vocab) and seconds."""
        place = torch.arange(first, last, device=self.device)[None]

        def call() -> torch.Tensor:
            return self.model(self.ids[:, first:last], past_key_values=self.cache, position_ids=place).logits[0]

        return clock(lambda: synchronise(self.device), call)

    def append(self, first: int, last: int, *, timed: bool, scored: bool = True) -> None:
        """Append tokens in one forward and note the loss of each."""
        before = self.entries
        logits, seconds = self.forward(first, last)
        if scored:
            targets = self.ids[0, first + 1 : last + 1]
            losses = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none").tolist()
            for at, loss in enumerate(losses):
                self.tokens.add(first + at + 1, loss, seconds if timed else float("nan"), before + at + 1)


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Score the job's tokens from `first` on, and time the first of them."""
    options = dict(job["options"])
    interval, blocks = options.pop("interval"), options.pop("blocks")
    prefill, first, last = job["cap"] - interval, job["first"], len(job["ids"]) - 1
    press = getattr(kvpress, job["method"])(**options)
    decoding = kvpress.DecodingPress(press, compression_interval=interval, target_size=prefill)
    stream = Stream(load(job), ids_of(job), job["device"])
    timed = last - first
    if blocks:  # up to a compression
        timed = min(timed, -(-job["timed_tokens"] // interval) * interval)
    with torch.inference_mode():
        logits, prefill_seconds = stream.forward(0, prefill)
        checked = mean_nll(logits[None], stream.ids[:, :prefill])
        sinks = stream.cache.layers[0].values[0, :, :4].clone()
        with decoding(stream.model):
            for t in range(prefill, first + timed):
                stream.append(t, t + 1, timed=True, scored=t >= first)
            if blocks:
                decoding.compression_interval = 1  # forwards, of `interval` tokens each
            for t in range(first + timed, last, interval):
                stream.append(t, min(t + interval, last), timed=False)
    values = stream.cache.layers[0].values[0]
    held = [bool((values[:, :, None] == sinks[:, None, at : at + 1]).all(-1).any(1).all()) for at in range(4)]
    return {
        **stream.tokens.record(),
        **memory(job["device"]),
        "prefill_tokens": prefill,
        "prefill_seconds": prefill_seconds,
        "prefill_nll": checked,
        "sinks_held": sum(held),
    }


if __name__ == "__main__":
    main(measure, "kvpress", "torch", "transformers", "numpy", "tokenizers", "triton", "datasets")
