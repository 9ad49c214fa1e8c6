"""The headline figures that speed records give."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sinkstream.bench.record import BenchRecord
from sinkstream.bench.selection import LADDER_SHAPE, LEAST_TOKENS, fastest_rung, pairs, rival, select
from sinkstream.bench.two_shapes import BOTH
from sinkstream.models.shapes import PREFIX
from sinkstream.records.cards import one_card
from sinkstream.records.headline import Headline
from sinkstream.registry import Registry

#: Key -> function of all speed records, oldest first, that returns a headline, or None if records are missing.
SPEED_HEADLINES: Registry[Callable[[Sequence[BenchRecord]], Headline | None]] = Registry("speed headline")

CAP = 2052
RECALL_ARCHIVES = ("text", "kv")  # of the two shapes
TAIL_TOKENS = 20_000
LONG_TOKENS = 1_000_000
EARLY_TOKENS = 4_000


def _best(
    records: Sequence[BenchRecord], model: str, dtype: str, policy: str = "strict", *, streams: int = 1
) -> list[BenchRecord]:
    """Records of the fastest rung on a GPU, 2,052 slots, at least 500 steady tokens."""
    rung = fastest_rung(records)
    found = select(records, rung=rung, model=model, policy=policy, dtype=dtype, cap=CAP, streams=streams, short=True)
    return [r for r in found if r.steady["tokens"] >= LEAST_TOKENS]


def _over_floor(records: Sequence[BenchRecord], model: str, dtype: str) -> Headline | None:
    found = _best(records, model, dtype)
    return Headline(found[-1].steady["over_floor"], found[-1].id) if found else None


def _speedup(records: Sequence[BenchRecord], rung: str) -> Headline | None:
    """TPOT of another rung over the fastest one's: the newest record that has such a rival in its own command."""
    for record in reversed(_best(records, LADDER_SHAPE, "float16")):
        other = rival(records, record, rung)
        if other is not None and other.session == record.session:
            return Headline(other.steady["tpot_ms"] / record.steady["tpot_ms"], record.id)
    return None


@SPEED_HEADLINES.register("engine.tpot_over_floor")
@one_card
def tpot_over_floor(records: Sequence[BenchRecord]) -> Headline | None:
    """TPOT over the byte floor: Pythia-2.8B shape, float16, fastest rung, strict, cap 2,052, one stream, GPU."""
    return _over_floor(records, LADDER_SHAPE, "float16")


@SPEED_HEADLINES.register("engine.strict_over_lazy")
@one_card
def strict_over_lazy(records: Sequence[BenchRecord]) -> Headline | None:
    """TPOT of strict over lazy R=64 that took turns with it: Pythia-2.8B shape, float16, fastest rung, GPU."""
    strict, lazy = (_best(records, LADDER_SHAPE, "float16", policy) for policy in ("strict", "lazy R=64"))
    both = sorted([*strict, *lazy], key=lambda r: (r.created, r.id))
    found = [(a, b) for a, b in pairs(both) if a in strict and b in lazy]
    if not found:
        return None
    record, other = found[-1]
    return Headline(record.steady["tpot_ms"] / other.steady["tpot_ms"], record.id)


@SPEED_HEADLINES.register("engine.adaptive_over_strict")
@one_card
def adaptive_over_strict(records: Sequence[BenchRecord]) -> Headline | None:
    """TPOT of adaptive (entropy) over strict taking turns with it: 2,052 slots, fastest rung, worse of two shapes."""
    return _over_strict(records, "adaptive-entropy")


@SPEED_HEADLINES.register("engine.window_attention_over_strict")
@one_card
def window_attention_over_strict(records: Sequence[BenchRecord]) -> Headline | None:
    """TPOT of refresh by window attention, R = B = 64, over strict, as `engine.adaptive_over_strict`."""
    return _over_strict(records, "refresh-window-attention R=64 B=64")


@SPEED_HEADLINES.register("recall.tpot_over_strict")
@one_card
def recall_tpot_over_strict(records: Sequence[BenchRecord]) -> Headline | None:
    """TPOT of strict with lexical recall over strict taking turns with it: 2,052 slots, gate live, worse of two shapes.

    The shapes are Pythia-2.8B with the text archive, float16, and Llama-3.2-1B with the KV archive, bfloat16.
    """
    return _recall_figure(records, lambda strict, recall: recall.steady["tpot_ms"] / strict.steady["tpot_ms"])


@SPEED_HEADLINES.register("recall.p99_over_p50")
@one_card
def recall_p99_over_p50(records: Sequence[BenchRecord]) -> Headline | None:
    """P99 over P50 of a token with recall, as `recall.tpot_over_strict`."""
    return _recall_figure(records, lambda _, recall: recall.latency_ms["all"]["p99"] / recall.latency_ms["all"]["p50"])


def _recall_figure(
    records: Sequence[BenchRecord], figure: Callable[[BenchRecord, BenchRecord], float]
) -> Headline | None:
    """A figure of the newest pair of strict with and without recall by default, of each shape; the worse one."""
    worse, rung = [], fastest_rung(records)
    for (model, dtype), archive in zip(BOTH, RECALL_ARCHIVES, strict=True):
        found = [
            Headline(figure(strict, recall), recall.id)
            for strict, recall in pairs(select(records, rung=rung, model=model, dtype=dtype, cap=CAP, streams=1))
            if strict.policy["label"] == "strict"
            and recall.policy["name"] == "strict"
            and recall.recall is not None
            and recall.recall["gate_open"]
            and _recall_options(recall) == {"recall": "lexical", "recall_archive": archive}
        ]
        if not found:
            return None
        worse.append(found[-1])
    return max(worse)


def _recall_options(record: BenchRecord) -> dict[str, Any]:
    given = {name: value for name, value in record.policy["options"].items() if name.startswith("recall")}
    return {"recall_archive": "kv"} | given


def _over_strict(records: Sequence[BenchRecord], policy: str) -> Headline | None:
    worse = []
    for model, dtype in BOTH:
        timed = {label: _best(records, model, dtype, label) for label in ("strict", policy)}
        both = sorted([record for found in timed.values() for record in found], key=lambda r: (r.created, r.id))
        found = [(a, b) for a, b in pairs(both) if a in timed["strict"] and b in timed[policy]]
        if not found:
            return None
        strict, other = found[-1]
        worse.append(Headline(other.steady["tpot_ms"] / strict.steady["tpot_ms"], other.id))
    return max(worse)


@SPEED_HEADLINES.register("engine.p99_over_p50")
@one_card
def p99_over_p50(records: Sequence[BenchRecord]) -> Headline | None:
    """P99 over P50 of 20,000 tokens, evictions included: Pythia-2.8B shape, float16, fastest rung; worst policy."""
    found = [
        r
        for r in select(records, rung=fastest_rung(records), model=LADDER_SHAPE, dtype="float16", cap=CAP, streams=1)
        if r.steady["tokens"] >= TAIL_TOKENS
    ]
    last = [r for r in found if r.session == found[-1].session]
    tails = (Headline(r.latency_ms["all"]["p99"] / r.latency_ms["all"]["p50"], r.id) for r in last)
    return max(tails, default=None)


@SPEED_HEADLINES.register("engine.speedup_over_hf_lazy")
@one_card
def speedup_over_hf_lazy(records: Sequence[BenchRecord]) -> Headline | None:
    """TPOT of the hf backend's best lazy run over strict on the fastest rung: Pythia-2.8B shape, float16, GPU."""
    return _speedup([r for r in records if r.rung["name"] != "hf" or r.policy["name"] != "strict"], "hf")


@SPEED_HEADLINES.register("engine.speedup_over_recompute_sdpa")
@one_card
def speedup_over_recompute_sdpa(records: Sequence[BenchRecord]) -> Headline | None:
    """TPOT of sliding-window recompute with SDPA over strict on the fastest rung: Pythia-2.8B shape, float16, GPU."""
    return _speedup(records, "hf-recompute-sdpa")


@SPEED_HEADLINES.register("engine.speedup_over_static_compile")
@one_card
def speedup_over_static_compile(records: Sequence[BenchRecord]) -> Headline | None:
    """TPOT of generate() with a static cache, compiled, over strict on the fastest rung: Pythia-2.8B shape, GPU."""
    return _speedup(records, "hf-static")


@SPEED_HEADLINES.register("engine.llama_1b_tpot_over_floor")
@one_card
def llama_1b_tpot_over_floor(records: Sequence[BenchRecord]) -> Headline | None:
    """TPOT over the byte floor: Llama-3.2-1B shape, bfloat16, fastest rung, strict, cap 2,052, one stream, GPU."""
    return _over_floor(records, PREFIX + "llama-3.2-1b", "bfloat16")


@SPEED_HEADLINES.register("engine.streams8_over_floor")
@one_card
def streams8_over_floor(records: Sequence[BenchRecord]) -> Headline | None:
    """TPOT of 8 streams over their byte floor, the worse of Pythia-2.8B and Llama-3.2-1B: fastest rung, strict, GPU."""
    found = [_best(records, *shape, streams=8) for shape in BOTH]
    if not all(found):
        return None
    return max(Headline(of_shape[-1].steady["over_floor"], of_shape[-1].id) for of_shape in found)


@SPEED_HEADLINES.register("engine.million_token_tpot_ratio")
@one_card
def million_token_tpot_ratio(records: Sequence[BenchRecord]) -> Headline | None:
    """Median chunk TPOT of the last block of 1,000,000 tokens over that of the first 4,000; newest such GPU run."""
    long = [r for r in select(records) if r.steady["tokens"] >= LONG_TOKENS and len(r.blocks) > 1]
    if not long:
        return None
    record = long[-1]
    ends = np.cumsum(record.chunks["tokens"])
    tpots = np.asarray(record.chunks["seconds"]) / record.chunks["tokens"]
    late = ends > record.blocks[-1]["first_token"]
    return Headline(float(np.median(tpots[late]) / np.median(tpots[ends <= EARLY_TOKENS])), record.id)
