"""`results/summary.json`: the headline figures, each computed from records, with the id and the machine of its record.

No figure of time has two machines in it, and none changes its card because of a later run on another one (`one_card`).
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sinkstream.bench.draw_records import DrawRecord
from sinkstream.bench.draw_tables import DRAW_HEADLINES
from sinkstream.bench.generate_records import GENERATE_HEADLINES, GenerateRecord
from sinkstream.bench.late_records import LATE_HEADLINES, LateRecord
from sinkstream.bench.prompt_records import PromptRecord
from sinkstream.bench.prompt_tables import PROMPT_HEADLINES
from sinkstream.bench.record import BenchRecord
from sinkstream.bench.serving.records import ServeRecord
from sinkstream.bench.serving.tables import SERVE_HEADLINES
from sinkstream.bench.summary import SPEED_HEADLINES
from sinkstream.cache import FAMILIES
from sinkstream.matrix.record import load_points
from sinkstream.records.cards import arithmetic, card, one_card
from sinkstream.records.files import write_atomically
from sinkstream.records.headline import Headline
from sinkstream.records.pairing import paired_delta, same_text_and_model
from sinkstream.records.pairs import Pairs
from sinkstream.records.records import SUMMARY_FILE, Record, load_records
from sinkstream.records.selection import evaluated, is_plain, nearest_in_time, select
from sinkstream.registry import Registry
from sinkstream.report.block_pairs import block_pairs
from sinkstream.report.evidence import EVIDENCE_HEADLINES, verdict_counts
from sinkstream.report.nearest_rival import NEAREST_RIVAL_HEADLINES, timed_ways
from sinkstream.report.precision import precision_runs
from sinkstream.studies.cliff.tables import share_past_trained
from sinkstream.studies.diagnosis.record import Diagnosis
from sinkstream.studies.diagnosis.tables import DIAGNOSIS_HEADLINES
from sinkstream.studies.recall.facts import FactsRecord
from sinkstream.studies.recall.record import RecallRecord
from sinkstream.studies.recall.summary import FACTS_HEADLINES, RECALL_HEADLINES, REPLY_HEADLINES
from sinkstream.studies.rivals.compare import comparisons
from sinkstream.studies.rivals.record import RivalRecord
from sinkstream.studies.rivals.tables import RIVAL_HEADLINES
from sinkstream.studies.streameval.reply import ReplyRecord

#: Key -> function of all records, oldest first, that returns a headline, or None if records are missing.
HEADLINES: Registry[Callable[[Sequence[Record]], Headline | None]] = Registry("headline")
#: Other headlines, and what loads the records below a folder that they are computed from, oldest first.
SOURCES: list[tuple[Registry[Callable[[Sequence[Any]], Headline | None]], Callable[[Path], Sequence[Any]]]] = [
    (SPEED_HEADLINES, BenchRecord.below),
    (PROMPT_HEADLINES, PromptRecord.below),
    (LATE_HEADLINES, LateRecord.below),
    (GENERATE_HEADLINES, GenerateRecord.below),
    (DRAW_HEADLINES, DrawRecord.below),
    (SERVE_HEADLINES, ServeRecord.below),
    (DIAGNOSIS_HEADLINES, Diagnosis.below),
    (RECALL_HEADLINES, RecallRecord.below),
    (FACTS_HEADLINES, FactsRecord.below),
    (REPLY_HEADLINES, ReplyRecord.below),
    (NEAREST_RIVAL_HEADLINES, timed_ways),
    (EVIDENCE_HEADLINES, lambda results: [point for point in load_points(results) if point.status == "complete"]),
]
SIGNIFICANT_DIGITS = 6
Headlines = dict[str, dict[str, float | str]]


@dataclass(frozen=True)
class Summary:
    """What was written: the file, its headline figures, and what each missing key would need."""

    path: Path
    headlines: Headlines
    missing: dict[str, str]


def write_summary(results: Path, pairs: Pairs | None = None) -> Summary:
    """Compute the headline figures from all records below a folder and write its summary.json; see `load_records`.

    Nothing of an older file is kept: a key whose records are gone disappears.

    Raises ValueError: the folder does not exist, or it holds a broken record.
    """
    headlines, missing = _headlines_below(results, pairs)
    return Summary(write_atomically(results / SUMMARY_FILE, _as_text(headlines)), headlines, missing)


def summary_is_current(results: Path, pairs: Pairs | None = None) -> bool:
    """Whether the folder's summary.json is what its records give. Raises as `write_summary`."""
    path = results / SUMMARY_FILE
    headlines, _ = _headlines_below(results, pairs)
    return path.is_file() and path.read_text(encoding="utf-8") == _as_text(headlines)


def _headlines_below(results: Path, pairs: Pairs | None) -> tuple[Headlines, dict[str, str]]:
    """All headline figures that the records allow, and for every other key what it is computed from."""
    if not results.is_dir():
        raise ValueError(f"{results}: not a folder with records")
    headlines: Headlines = {}
    missing: dict[str, str] = {}

    def compute(
        registry: Registry[Callable[[Sequence[Any]], Headline | None]], of: Sequence[Any], made_of: Sequence[Any]
    ) -> None:
        on = {record.id: card(record) for record in made_of}
        for key, headline in registry.items():
            found = headline(of)
            if found is None:
                missing[key] = f"no record for: {registry.summary(key)}"
            else:
                figures = {"value": found.value, "low": found.low, "high": found.high}
                rounded = {name: _rounded(figure) for name, figure in figures.items() if figure is not None}
                where = {"on": on[found.record]} if found.record in on else {}
                headlines[key] = {**rounded, "record": found.record, **where}

    records = load_records(results, pairs)
    compute(HEADLINES, records, records)
    rivals = RivalRecord.below(results)
    compute(RIVAL_HEADLINES, comparisons(records, rivals), rivals)
    for registry, load in SOURCES:
        loaded = load(results)
        compute(registry, loaded, loaded)
    verdicts = verdict_counts(results)
    if verdicts is None:
        missing["evidence.verdicts"] = "no criteria beside the records: experiments/criteria.toml"
    else:
        headlines["evidence.verdicts"] = verdicts
    return headlines, missing


def _rounded(value: float) -> float:
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}")


def _as_text(headlines: Headlines) -> str:
    return json.dumps(headlines, indent=1, ensure_ascii=False) + "\n"


@HEADLINES.register("foundation.hf_strict_over_full_tpot")
@one_card
def hf_strict_over_full_tpot(records: Sequence[Record]) -> Headline | None:
    """Mean steady TPOT of strict over the full cache's, newest interleaved pair, Pythia-2.8B shape, hf backend, GPU."""
    of_shape = select(records, model="pythia-2.8b", backend="hf", device="cuda")
    strict, full = select(of_shape, policy="strict", plain=True), select(of_shape, policy="full")
    pruned = [r for r in strict if r.summary["events"] and r.protocol.get("interleaved", 1) > 1]
    timed, baselines = ([r for r in of if r.summary["steady_tpot_ms"]["mean"] is not None] for of in (pruned, full))
    for run in reversed(timed):
        baseline = nearest_in_time(run, baselines)
        if baseline is not None:
            tpots = [one.summary["steady_tpot_ms"]["mean"] for one in (run, baseline)]
            return Headline(tpots[0] / tpots[1], run.id)
    return None


@HEADLINES.register("foundation.demo_seconds")
def demo_seconds(records: Sequence[Record]) -> Headline | None:
    """Age of the process at the last record of the newest demo, which must be complete."""
    demos = [record for record in records if "demo" in record.command[:3]]
    if not demos or demos[-1].status != "complete":
        return None
    return Headline(demos[-1].summary["process_sec"], demos[-1].id)


def _pg19_ppl(records: Sequence[Record], policy: str) -> Headline | None:
    """PPL of SmolLM2-135M on PG19 under `policy`, from the group of comparable runs with most policies and tokens."""
    runs = [
        record
        for name in ("recompute", "window-only", "strict")
        for record in select(records, model="smollm2-135m", text="pg19", policy=name, plain=True)
        if record.summary["ppl"] is not None
    ]
    groups: dict[tuple, dict[str, Record]] = {}
    for run in sorted(runs, key=lambda record: record.created):
        key = (run.data["sha256"], run.model["hash"], arithmetic(run), run.protocol["dtype"], run.protocol["cap"])
        groups.setdefault((*key, run.protocol["decode_tokens"]), {})[run.policy["name"]] = run
    if not groups:
        return None
    best = max(
        groups.values(), key=lambda group: (len(group), max(run.summary["decode_tokens"] for run in group.values()))
    )
    return Headline(best[policy].summary["ppl"], best[policy].id) if policy in best else None


@HEADLINES.register("foundation.ppl_recompute")
def ppl_recompute(records: Sequence[Record]) -> Headline | None:
    """PPL of sliding-window recompute, SmolLM2-135M on PG19."""
    return _pg19_ppl(records, "recompute")


@HEADLINES.register("foundation.ppl_window_only")
def ppl_window_only(records: Sequence[Record]) -> Headline | None:
    """PPL of the window without sinks, SmolLM2-135M on PG19."""
    return _pg19_ppl(records, "window-only")


@HEADLINES.register("foundation.ppl_strict")
def ppl_strict(records: Sequence[Record]) -> Headline | None:
    """PPL of strict streaming, SmolLM2-135M on PG19."""
    return _pg19_ppl(records, "strict")


@HEADLINES.register("diagnosis.cliff_share_length")
def cliff_share_length(records: Sequence[Record]) -> Headline | None:
    """Share of visible length past the trained positions in the loss at the largest R, neox-27m-sink, cliff grid."""
    return share_past_trained(records, model="neox-27m-sink")


@HEADLINES.register("engine.ppl_relative_error")
def ppl_relative_error(records: Sequence[Record]) -> Headline | None:
    """Largest relative PPL error of the engine's fastest rung against the float32 hf backend, same model and tokens."""
    errors = (Headline(abs(p.relative_error), p.record.id) for p in precision_runs(records))
    return max(errors, default=None)


def _block_speedup(records: Sequence[Record], device: str, policy: str, compress_every: int) -> Headline | None:
    """Of the newest pair of a plain policy on the hf backend with that device."""
    pairs = block_pairs(select(records, policy=policy, backend="hf", device=device, plain=True))
    found = [pair for pair in pairs if pair.blocks.policy["options"].get("compress_every") == compress_every]
    return Headline(found[-1].speedup, found[-1].blocks.id) if found else None


@HEADLINES.register("diagnosis.block_speedup_lazy32")
@one_card
def block_speedup_lazy32(records: Sequence[Record]) -> Headline | None:
    """Lazy R = 32 in blocks against step by step, newest pair of runs, hf backend, GPU."""
    return _block_speedup(records, "cuda", "lazy", 32)


@HEADLINES.register("diagnosis.block_speedup_strict")
@one_card
def block_speedup_strict(records: Sequence[Record]) -> Headline | None:
    """Strict in blocks against step by step, newest pair of runs, hf backend, GPU."""
    return _block_speedup(records, "cuda", "strict", 1)


@HEADLINES.register("diagnosis.block_speedup_cpu")
@one_card
def block_speedup_cpu(records: Sequence[Record]) -> Headline | None:
    """Blocks against step by step on the CPU: the smaller of strict's and lazy's (R = 32), newest pairs, hf backend."""
    strict, lazy = _block_speedup(records, "cpu", "strict", 1), _block_speedup(records, "cpu", "lazy", 32)
    return None if strict is None or lazy is None else min(strict, lazy)


@HEADLINES.register("diagnosis.block_max_abs_nll_difference")
def block_max_abs_nll_difference(records: Sequence[Record]) -> Headline | None:
    """Largest difference of one token's NLL between blocks and step by step, over all float32 pairs of runs."""
    pairs = [pair for pair in block_pairs(records) if pair.blocks.protocol["dtype"] == "float32"]
    return max((Headline(pair.max_abs_nll_difference, pair.blocks.id) for pair in pairs), default=None)


@HEADLINES.register("recall.ppl_delta_gated")
def ppl_delta_gated(records: Sequence[Record]) -> Headline | None:
    """ΔPPL % of strict with lexical recall, gate and slots by default, against strict; SmolLM2, cap 512, worst text."""
    runs = [r for r in select(records, model="SmolLM2-135M", policy="strict") if r.protocol["cap"] == 512]
    newest: dict[str, Headline] = {}
    for run in runs:
        recall = {name: value for name, value in run.policy["options"].items() if name.startswith("recall")}
        controls = [c for c in runs if is_plain(c) and same_text_and_model(c, run) and _way(c) == _way(run)]
        if recall == {"recall": "lexical"} and controls:
            delta = paired_delta(run, controls[-1])
            if delta.delta_percent is not None:
                newest[run.data["name"]] = Headline(delta.delta_percent, run.id, delta.low, delta.high)
    return max(newest.values(), default=None)


def _way(record: Record) -> tuple[Any, ...]:
    """What two losses that are compared must share beside model and text."""
    protocol = record.protocol
    return arithmetic(record), evaluated(record), *(protocol[name] for name in ("backend", "dtype", "tf32"))


@HEADLINES.register("dropin.families")
def dropin_families(records: Sequence[Record]) -> Headline | None:
    """Model families that the cache serves; the tests run each against the oracle. Of the registry, not of a record."""
    return Headline(len(FAMILIES), "sinkstream.cache.FAMILIES") if records else None
