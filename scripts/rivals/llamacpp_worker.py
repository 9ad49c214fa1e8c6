"""llama.cpp on the CPU, through cyllama's binding: a context that shifts, teacher-forced token by token.

When the context is full, the oldest tokens behind the first `keep` are removed and the positions of the others are
moved, as llama.cpp's own server does with ``--context-shift``. `discard` tokens go at once; the server's default is
half. With the option `blocks` the tokens after the first `timed_tokens` are decoded in batches, each up to the next
shift: nothing is evicted between them. Its quantised kernels round a batch and a single token differently.
"""

from typing import Any

import numpy as np
from cyllama.llama import llama_cpp
from worker import Tokens, clock, main, process_peak


def nll_of(logits: np.ndarray, target: int) -> float:
    """NLL of the target under logits (vocab,), in nats, in float64."""
    wide = logits.astype(np.float64)
    top = wide.max()
    return float(np.log(np.exp(wide - top).sum()) + top - wide[target])


class Model(llama_cpp.LlamaModel):
    """cyllama 0.2.18 asks its model for `n_vocab` where it reads logits, and its model does not have the attribute."""

    @property
    def n_vocab(self) -> int:
        return self.get_vocab().n_vocab


class Context:
    """A model and one sequence of at most `cap` tokens."""

    def __init__(self, path: str, cap: int, threads: int):
        llama_cpp.disable_logging()
        self.model = Model(path, llama_cpp.LlamaModelParams(), verbose=False)
        options = llama_cpp.LlamaContextParams()
        options.n_ctx = options.n_batch = options.n_ubatch = cap
        options.n_threads = options.n_threads_batch = threads
        self.context = llama_cpp.LlamaContext(self.model, options, verbose=False)
        if self.context.n_ctx != cap:
            raise ValueError(f"cap={cap} is not accepted: llama.cpp makes a context of {self.context.n_ctx} tokens")
        self.batch = llama_cpp.LlamaBatch(n_tokens=cap, embd=0, n_seq_max=1)
        self.past = 0

    def decode(self, tokens: list[int]) -> None:
        """Append tokens; the logits of all are wanted."""
        self.batch.reset()
        for at, token in enumerate(tokens):
            self.batch.add(token, self.past + at, [0], True)
        self.context.decode(self.batch)
        self.context.synchronize()
        self.past += len(tokens)

    def nll(self, at: int, target: int) -> float:
        """NLL of a target after the token at that place of the latest batch."""
        return nll_of(np.array(self.context.get_logits_ith(at)), target)

    def shift(self, keep: int, discard: int) -> None:
        """Remove `discard` tokens behind the first `keep` and close the gap."""
        if not self.context.memory_seq_rm(0, keep, keep + discard):
            raise ValueError("this model's context cannot be shifted")
        self.context.memory_seq_add(0, keep + discard, self.past, -discard)
        self.past -= discard


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Score and time the job's tokens from `first` on."""
    ids, cap, first = job["ids"], job["cap"], job["first"]
    if job["device"] != "cpu":
        raise ValueError("this binding of llama.cpp is built for the CPU")
    context = Context(job["gguf"], cap, job["threads"])
    keep = job["options"]["keep"]
    discard = job["options"]["discard"] or (cap - keep) // 2
    tokens = Tokens()
    _, prefill_seconds = clock(lambda: None, lambda: context.decode(ids[:first]))
    checked = float(np.mean([context.nll(at, ids[at + 1]) for at in range(first - 1)]))

    def append(first: int, last: int) -> None:
        if context.past >= cap:
            context.shift(keep, discard)
        context.decode(ids[first:last])

    last, t = len(ids) - 1, first
    blocks_from = first + job["timed_tokens"] if job["options"]["blocks"] else last
    while t < last:
        timed = t < blocks_from
        free = cap - context.past or discard
        end = t + 1 if timed else min(t + free, last)
        _, seconds = clock(lambda: None, lambda t=t, end=end: append(t, end))
        for at in range(t, end):
            length = context.past - (end - 1 - at)
            tokens.add(at + 1, context.nll(at - t, ids[at + 1]), seconds if timed else float("nan"), length)
        t = end
    return {
        **tokens.record(),
        **process_peak(),
        "prefill_tokens": first,
        "prefill_seconds": prefill_seconds,
        "prefill_nll": checked,
        "discard": discard,
        "llama_cpp": f"ggml {llama_cpp.ggml_version()} {llama_cpp.ggml_commit()}",
    }


if __name__ == "__main__":
    main(measure, "cyllama", "numpy")
