"""``bench --prefill``: prompts of several lengths through the engine and the drop-in, against a plain forward.

What is timed of a module alone is timed once, before an engine packs its weights; the lengths of one way follow each
other, each several times after a call that is not timed. A policy that feeds a prompt slowly is timed fewer times.
"""

import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import DynamicCache

from sinkstream.bench.policy_session import PolicySession
from sinkstream.bench.prompt_records import PROMPT_TIMES, PromptRecord
from sinkstream.bench.settings import kv_token_bytes
from sinkstream.cache import StreamingCache, describe
from sinkstream.compat import with_cache
from sinkstream.data import TokenStream
from sinkstream.engine import Engine
from sinkstream.evaluation.decoders import step_weight_bytes
from sinkstream.evaluation.runner import Report, Request
from sinkstream.evaluation.settings import RunSettings
from sinkstream.measure.matmul import MatmulRate
from sinkstream.measure.memory import free_bytes
from sinkstream.measure.timing import timed
from sinkstream.models import LoadedModel
from sinkstream.policies import EvictionPolicy, PruneSchedule

APPEND_TOKENS = 50
REPEATS = 5
REPEAT_SECONDS = 3.0  # of one length in one way: no repeat begins after so many, and there is at least one
STEPS_TIMED = 64
TURNS_TIMED = 32  # their prunes come again after 32 turns of 50 tokens where one token in 64 brings a prune
WARM_TURNS = 8  # before turns are timed: one that crosses a prune and one that crosses none are compiled and captured

DEFINITIONS = {
    "forward": "the module's own forward of the prompt with an empty dynamic cache, logits of the last token only",
    "generate": "generate() of one token: dynamic, with transformers' dynamic cache; drop_in, with a StreamingCache",
    "floor": (
        "operations of all products, the head once, and of attention over what the policy lets each token see, at the"
        " measured rate of matrix products"
    ),
}


def prompt_flops(loaded: LoadedModel, policy: EvictionPolicy, tokens: int) -> int:
    """Floating-point operations that a prompt needs: products, the head once, attention over what the policy shows."""
    model, spec = loaded.model, describe(loaded.model)
    head = model.get_output_embeddings().weight
    layers = step_weight_bytes(model) // model.dtype.itemsize - head.numel()
    seen = int(PruneSchedule(policy).plan(tokens).visible.sum())
    return 2 * (layers * tokens + head.numel()) + 4 * spec.layers * spec.query_heads * spec.head_dim * seen


@dataclass
class PromptSession(PolicySession[PromptRecord]):
    """Times prompts of one model, under one policy after the other."""

    record_class = PromptRecord
    work, prefix = "prompts", "prompt"

    loaded: LoadedModel
    text: TokenStream  # what the prompts are the beginning of, repeated if need be
    lengths: Sequence[int]  # tokens of the prompts
    backend: str  # the engine's, for the step that an appended turn is compared with
    ceiling: MatmulRate
    request: Request
    name: str  # the same in all records of one command
    repeats: int = REPEATS
    repeat_seconds: float = REPEAT_SECONDS
    drop_in: bool = True  # whether generate() with a StreamingCache is timed
    _of_module: dict[str, list[float]] = field(default_factory=dict)  # times that no policy changes, measured once

    def check(self, runs: Sequence[RunSettings]) -> None:
        """Raise ValueError, before anything is timed, if the engine or the device does not serve the prompts."""
        model = self.loaded.model
        self._check_engine(runs, self.backend)
        needed, free = kv_token_bytes(model) * max(self.lengths), free_bytes(model.device)
        if needed > free:
            raise ValueError(
                f"--prefill {max(self.lengths)}: keys and values of a dynamic cache take {needed / 1e9:.2f} GB, and"
                f" {free / 1e9:.2f} GB are free; accepted: shorter prompts"
            )

    # ---- one policy ----

    @torch.no_grad()
    def _measure(self, run: RunSettings, report: Report) -> list[Callable[[], dict[str, Any]]]:
        ids = self._ids(max(self.lengths) + 1)
        ways = {"forward": partial(self._forward, ids), "dynamic": partial(self._generate, ids, None)}
        cache = None
        if self.drop_in:
            cache = StreamingCache.for_model(self.loaded.model, policy=self._policy(run), **self._options(run))
            ways["drop_in"] = partial(self._generate, ids, cache)
        times, done = dict(self._of_module), len(self._of_module) * len(self.lengths)
        for name in [name for name in ways if name not in times]:
            times[name] = []
            for tokens in self.lengths:
                report(done, self._timings)
                times[name].append(self._median(partial(ways[name], tokens)))
                done += 1
        self._of_module = {name: times[name] for name in ("forward", "dynamic")}
        if cache is not None:
            cache.close()
        del cache, ways
        gc.collect()
        with self._open_engine(run, self.backend) as engine:
            times["engine"], memory = self._engine(engine, ids, lambda i: report(done + i, self._timings))
            append = self._append(engine, ids)
        report(self._timings, self._timings)
        return [partial(self._record, run, times, append, memory)]

    def _forward(self, ids: torch.Tensor, tokens: int) -> None:
        model = self.loaded.model
        model(ids[None, :tokens], **with_cache(model, DynamicCache(config=model.config)), logits_to_keep=1)

    def _generate(self, ids: torch.Tensor, cache: StreamingCache | None, tokens: int) -> None:
        model: Any = self.loaded.model
        prompt, given = ids[None, :tokens], {}
        if cache is not None:
            cache.reset()
            given = with_cache(model, cache)
        model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=1, do_sample=False, pad_token_id=0, **given
        )

    def _engine(
        self, engine: Engine, ids: torch.Tensor, begun: Callable[[int], None]
    ) -> tuple[list[float], dict[str, float | None]]:
        """Milliseconds of every length, and the memory that was held before and at the peak.

        `begun` is called with the number of the length that is timed next.
        """
        device = ids.device
        cuda = device.type == "cuda"
        held = torch.cuda.memory_allocated(device) / 2**20 if cuda else None
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)

        def prefill(tokens: int) -> None:
            engine.reset(stream=0)
            engine.prefill(ids[:tokens])

        times = []
        for i, tokens in enumerate(self.lengths):
            begun(i)
            times.append(self._median(partial(prefill, tokens)))
        return times, {
            "held_mb": held,
            "peak_mb": torch.cuda.max_memory_allocated(device) / 2**20 if cuda else None,
        }

    def _append(self, engine: Engine, ids: torch.Tensor) -> dict[str, float]:
        """A turn appended to a full stream, and a step of the same stream."""
        engine.reset(stream=0)
        full = engine.policy.peak
        engine.prefill(ids[torch.arange(full, device=ids.device) % len(ids)])
        turn = ids[:APPEND_TOKENS]

        def steps() -> None:
            for _ in range(STEPS_TIMED):
                engine.advance(None, [0])

        step = self._median(steps) / STEPS_TIMED
        for _ in range(WARM_TURNS + engine.policy.growth // APPEND_TOKENS):
            engine.prefill(turn)
        turns = self._median(partial(engine.prefill, turn), TURNS_TIMED)
        return {"tokens": len(turn), "ms": turns, "step_ms": step, "over_step": turns / step}

    @property
    def _timings(self) -> int:
        """How many medians a record takes: every length in every way, and the appended turn."""
        return (len(PROMPT_TIMES) - (not self.drop_in)) * len(self.lengths) + 1

    def _median(self, call: Callable[[], object], repeats: int | None = None) -> float:
        """Median milliseconds of a call, after one that compiles and captures and is not counted."""
        repeats = self.repeats if repeats is None else repeats
        device = self.loaded.model.device
        call()
        times: list[float] = []
        while not times or (len(times) < repeats and sum(times) < self.repeat_seconds):
            times.append(timed(call, device=device)[1])
        return 1e3 * statistics.median(times)

    # ---- what it is ----

    def _own_identity(self, run: RunSettings) -> dict[str, Any]:
        left_out = {} if self.drop_in else {"drop_in": False}
        return {"lengths": list(self.lengths), "backend": self.backend, **left_out}

    def _record(self, run: RunSettings, times: dict[str, list[float]], append: dict, memory: dict) -> dict[str, Any]:
        policy, prompts = self._policy(run), []
        for i, tokens in enumerate(self.lengths):
            flops = prompt_flops(self.loaded, policy, tokens)
            found = {f"{name}_ms": times[name][i] if name in times else None for name in PROMPT_TIMES}
            prompts.append({"tokens": tokens, "flops": flops, "floor_ms": self.ceiling.milliseconds(flops), **found})
        return self._record_of(
            run,
            protocol={
                **self._protocol(run),
                "backend": self.backend,
                "lengths": list(self.lengths),
                "append_tokens": APPEND_TOKENS,
                "append_repeats": TURNS_TIMED,
                "repeats": self.repeats,
                "repeat_seconds": self.repeat_seconds,
                "text": self.text.name,
                "text_sha256": self.text.sha256,
                **DEFINITIONS,
            },
            ceiling=asdict(self.ceiling),
            prompts=prompts,
            append=append,
            memory=memory,
        )
