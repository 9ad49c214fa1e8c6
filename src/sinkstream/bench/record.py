"""From what a configuration gave to its speed record."""

import itertools
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from sinkstream.bench.decoding import Samples, TimedRun
from sinkstream.bench.settings import DEFINITIONS, BenchConfig, Floor, Protocol
from sinkstream.data import TokenStream
from sinkstream.measure.bandwidth import Bandwidth
from sinkstream.measure.environment import package_versions
from sinkstream.measure.metrics import finite_or_none
from sinkstream.measure.numerics import numerics
from sinkstream.measure.timing import distribution
from sinkstream.models import LoadedModel


def identity(
    loaded: LoadedModel, text: TokenStream, config: BenchConfig, protocol: Protocol, seed: int
) -> dict[str, Any]:
    """What makes two timed configurations the same: model, precision, hardware, releases, tokens, configuration."""
    versions, device = package_versions(), loaded.model.device
    return {
        "versions": {name: versions[name] for name in ("sinkstream", "torch", "transformers", "triton")},
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "model_hash": loaded.hash,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": device.type,
        "data_sha256": text.sha256,
        "config": config.identity(),
        "protocol": asdict(protocol),
        "seed": seed,
        **numerics(),
    }


def run_figures(run: TimedRun, kv_token_bytes: int, ceiling: Bandwidth) -> dict[str, Any]:
    """The parts of a record that a run states or that are computed from it."""
    samples, config, policy = run.samples, run.config, run.config.run.policy()
    visible = sum(samples.visible) / samples.tokens
    floor = Floor(run.weight_bytes, kv_token_bytes, visible, config.streams)
    return {
        "id": run.id,
        "status_reason": run.reason,
        "policy": {
            "name": config.run.method,
            "label": config.run.label(),
            "options": {} if policy is None else {**policy.record(), "positions": config.run.positions},
        },
        "ceiling": ceiling.record(),
        **speed(samples, floor, ceiling),
        "latency_ms": _latencies(samples),
        "chunks": {"tokens": samples.chunk_tokens, "seconds": [round(s, 7) for s in samples.chunk_seconds]},
        "blocks": _blocks(samples),
        "profile": run.profile,
    }


def speed(samples: Samples, floor: Floor, ceiling: Bandwidth) -> dict[str, dict[str, Any]]:
    """The parts `floor` and `steady`: what a step must read, how long that takes, and how long it took."""
    tpot, floor_ms = 1e3 * samples.seconds / samples.tokens, ceiling.milliseconds(floor.bytes)
    return {
        "floor": floor.record() | {"ms": floor_ms},
        "steady": {
            "tokens": samples.tokens,
            "wall_sec": samples.seconds,
            "tpot_ms": tpot,
            "tokens_per_sec": 1e3 * floor.streams / tpot,
            "gbs": floor.bytes / tpot / 1e6,
            "over_floor": tpot / floor_ms,
            "share_of_floor": floor_ms / tpot,
        },
    }


def run_protocol(run: TimedRun) -> dict[str, Any]:
    """What a run adds to the `protocol` part of its record."""
    protocol = run.protocol
    return {
        "cap": run.config.run.cap,
        "streams": run.config.streams,
        "warmup_tokens": protocol.warmup,
        "tokens": protocol.tokens,
        "chunk_tokens": protocol.chunk_tokens,
        "in_turn": run.in_turn,
        "turn": run.turn,
        "feed": "text" if protocol.teacher_forced else "greedy",
        **DEFINITIONS,
    }


def _latencies(samples: Samples) -> dict[str, dict[str, Any]]:
    milliseconds = 1e3 * np.concatenate(samples.latency).astype(np.float64)
    event = np.asarray(samples.event, dtype=bool)
    return {
        name: {"tokens": int(np.isfinite(some).sum()), **distribution(some, with_max=True)}
        for name, some in (
            ("all", milliseconds),
            ("event", milliseconds[event]),
            ("other", milliseconds[~event]),
        )
    }


def _blocks(samples: Samples) -> list[dict[str, Any]]:
    """One entry for each block of tokens after which the memory was noted."""
    ends = np.cumsum(samples.chunk_tokens)
    seconds = np.concatenate([[0.0], np.cumsum(samples.chunk_seconds)])
    nll = np.concatenate(samples.nll) if samples.nll else None
    starts = [0, *(tokens for tokens, _ in samples.memory)]
    blocks = []
    for (first, last), (_, memory) in zip(itertools.pairwise(starts), samples.memory):
        before, after = (int(np.searchsorted(ends, t, side="right")) for t in (first, last))
        spent = seconds[after] - seconds[before]
        mine = None if nll is None else nll[first:last]
        blocks.append(
            {
                "first_token": first,
                "tokens": last - first,
                "tpot_ms": 1e3 * spent / (last - first),
                "memory_mb": memory,
                "mean_nll": None if mine is None else finite_or_none(mine.mean()),
                "not_finite": None if mine is None else int((~np.isfinite(mine)).sum()),
            }
        )
    return blocks
