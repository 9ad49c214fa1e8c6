"""One policy's diagnosis: its run against its controls, every figure with its interval."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from sinkstream.records.pairing import common_tokens
from sinkstream.records.records import Record
from sinkstream.statistics import (
    AFTER,
    Bootstrap,
    PairedDelta,
    Resolution,
    event_curve,
    mean_interval,
    paired_delta_ppl,
    resolution,
    suitable_block_tokens,
)
from sinkstream.studies.diagnosis.attribution import Attribution, attribute
from sinkstream.studies.diagnosis.drift import drift, latency
from sinkstream.studies.diagnosis.spikes import (
    event_positions,
    extreme_events,
    period,
    plain_spikes,
    tokens_since_event,
)
from sinkstream.studies.diagnosis.verdict import verdict


@dataclass(frozen=True)
class Controls:
    """Control runs of a policy, on the same text and model."""

    strict: Record  # strict streaming at the policy's cap
    # full, recompute: the full cache where it fits; recompute at the policy's cap, usually sampled
    full: Record | None = None
    recompute: Record | None = None
    lengths: Mapping[int, Record] = field(default_factory=dict)  # strict streaming at other caps, by cap

    def record(self) -> dict[str, Any]:
        """The ids of the runs."""
        lengths = {str(cap): record.id for cap, record in sorted(self.lengths.items())}
        ids = {name: None if run is None else run.id for name, run in self.named().items()}
        return {**ids, "lengths": lengths}

    def named(self) -> dict[str, Record | None]:
        """The runs that ΔPPL is taken against, by name."""
        return {"strict": self.strict, "full": self.full, "recompute": self.recompute}


def diagnose(record: Record, controls: Controls, *, seed: int = 0) -> dict[str, Any]:
    """Diagnose one policy's run, which has prune events; `seed` is that of all resampling.

    Returns what `record.POLICY_KEYS` lists (see docs/diagnosis.md). Differences are policy minus control in nats.

    Raises ValueError: the run has fewer than two prune events, or a control is of another text or model or shares no
    token.
    """
    events = event_positions(record)
    if events.size < 2:
        raise ValueError(
            f"run {record.id!r} of policy {record.label!r} has {events.size} prune events; a diagnosis needs at least"
            " 2: accepted: a policy that evicts, and a text of at least two prune periods"
        )
    bootstrap = Bootstrap(seed=seed)
    pairs = {name: common_tokens(record, run) for name, run in controls.named().items() if run is not None}
    deltas = {name: _delta(*pair, bootstrap) for name, pair in pairs.items()}
    curves = {
        name: event_curve(nll - control, index, events, block_tokens=_block(index), bootstrap=bootstrap)
        for name, (index, nll, control) in pairs.items()
        if name != "recompute"
    }
    index, nll, control = pairs["strict"]
    attribution = _attribution(record, controls, events, bootstrap)
    return {
        "label": record.label,
        "run": record.id,
        "tokens_sha256": record.tokens_file["sha256"],
        "commit": record.environment["git"]["commit"],
        "policy": dict(record.policy),
        "cap": record.protocol["cap"],
        "ppl": record.summary["ppl"],
        "controls": controls.record(),
        "strict": _reference(controls, bootstrap),
        "period": period(events),
        "delta_ppl": {name: asdict(delta) for name, delta in deltas.items()},
        "resolution": _resolution(resolution(nll - control, index, _block(index))),
        "spike": {name: {**asdict(curve), "found": curve.found} for name, curve in curves.items()},
        "plain": {"policy": plain_spikes(nll, index, events), "strict": plain_spikes(control, index, events)},
        "drift": drift(record.arrays, record.model["trained_positions"]),
        "latency": latency(record.arrays, record.protocol["warmup_tokens"]),
        "extreme": extreme_events(nll - control, index, events),
        "long_run": _long_run(nll - control, index, events, bootstrap),
        "attribution": {**asdict(attribution), "shares": attribution.shares()},
        "verdict": verdict(deltas["strict"], curves["strict"], attribution),
    }


def _reference(controls: Controls, bootstrap: Bootstrap) -> dict[str, Any]:
    """Strict streaming's own figures, for the row that policies are read against."""
    strict = controls.strict
    others = {name: run for name, run in controls.named().items() if run is not None and run is not strict}
    return {
        "run": strict.id,
        "ppl": strict.summary["ppl"],
        "delta_ppl": {name: asdict(_delta(*common_tokens(strict, run), bootstrap)) for name, run in others.items()},
        "drift": drift(strict.arrays, strict.model["trained_positions"]),
        "latency": latency(strict.arrays, strict.protocol["warmup_tokens"]),
    }


def _block(index: np.ndarray) -> int:
    return suitable_block_tokens(int(index[-1] - index[0]) + 1)


def _delta(index: np.ndarray, nll: np.ndarray, control: np.ndarray, bootstrap: Bootstrap) -> PairedDelta:
    return paired_delta_ppl(nll, control, positions=index, block_tokens=_block(index), bootstrap=bootstrap)


def _attribution(record: Record, controls: Controls, events: np.ndarray, bootstrap: Bootstrap) -> Attribution:
    """The attribution on the tokens that the policy and all strict runs have scored."""
    cap = record.protocol["cap"]
    runs = {**controls.lengths, cap: controls.strict}
    paired = {length: common_tokens(record, run) for length, run in runs.items()}
    index = paired[cap][0]
    for common, _, _ in paired.values():
        index = np.intersect1d(index, common, assume_unique=True)
    strict = {length: nll[np.isin(common, index)] for length, (common, _, nll) in paired.items()}
    scored = np.isin(record.arrays["index"], index)
    spaced = np.diff(events).max() > 1  # with an event at every token, every token is near an event
    return attribute(
        record.arrays["nll"][scored],
        record.arrays["kv_length"][scored],
        tokens_since_event(index, events) if spaced else np.full(len(index), -1),
        strict,
        cap=cap,
        trained_positions=record.model["trained_positions"],
        positions=index,
        block_tokens=_block(index),
        bootstrap=bootstrap,
    )


def _long_run(difference: np.ndarray, index: np.ndarray, events: np.ndarray, bootstrap: Bootstrap) -> dict[str, Any]:
    """Lasting error, in nats per token.

    `outside_events`: mean difference of the tokens outside all windows after events; `growth`: mean of the second half
    of the text minus mean of the first half.
    """
    since, block = tokens_since_event(index, events), _block(index)
    outside = np.where((since < 0) | (since >= AFTER), difference, np.nan)
    scored = np.isfinite(difference)
    later = np.cumsum(scored) > scored.sum() / 2
    sizes = np.array([np.count_nonzero(scored & ~later), np.count_nonzero(scored & later)])
    weight = np.where(later, 1, -1) * scored.sum() / np.maximum(sizes[later.astype(int)], 1)
    figures = {"outside_events": outside, "growth": difference * weight}
    return {
        name: asdict(mean_interval(values, positions=index, block_tokens=block, bootstrap=bootstrap))
        for name, values in figures.items()
    }


def _resolution(seen: Resolution | None) -> dict[str, Any] | None:
    if seen is None:
        return None
    figures = {"noise_nats": seen.noise, "effect_size": seen.effect_size, "z": seen.z, "tokens": seen.n_tokens}
    return {**figures, "tokens_needed": {f"{percent:g} %": seen.tokens_needed(percent) for percent in (0.1, 0.5, 1)}}
