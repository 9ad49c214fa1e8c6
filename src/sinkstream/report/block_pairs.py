"""Runs in blocks beside the same runs step by step: how much faster, and how far apart their NLL."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sinkstream.measure.records import Record
from sinkstream.report.selection import same_conditions


@dataclass(frozen=True)
class BlockPair:
    """A run in blocks and the same run step by step: same tokens, model, policy, precision and hardware."""

    blocks: Record
    steps: Record

    @property
    def speedup(self) -> float:
        """Seconds of all timed steps over the seconds that blocks took for the same tokens, scoring included."""
        return self.steps.summary["decode_sec"] / (
            self.blocks.summary["total_sec"] - self.blocks.summary["prefill_sec"]
        )

    @property
    def max_abs_nll_difference(self) -> float:
        """Largest difference of one token's NLL, in nats."""
        blocks, steps = (one.arrays["nll"].astype(np.float64) for one in (self.blocks, self.steps))
        return float(np.abs(blocks - steps).max())


def block_pairs(records: Sequence[Record]) -> list[BlockPair]:
    """Every complete run in blocks with the newest run step by step that it can be compared with.

    Parameters
    ----------
    records : sequence of Record
        Oldest first, as the pairs are.
    """
    complete = [r for r in records if r.status == "complete" and r.protocol["sample_every"] == 1]
    stepped = [r for r in complete if _evaluated(r) == "steps" and _all_timed(r)]
    pairs = []
    for run in complete:
        if _evaluated(run) == "blocks" and run.summary["total_sec"]:
            pairs += [BlockPair(run, other) for other in stepped if _same_run(run, other)][-1:]
    return pairs


def _evaluated(record: Record) -> str:
    return record.protocol.get("evaluate", "steps")


def _all_timed(record: Record) -> bool:
    return record.summary["timed_tokens"] == record.summary["decode_tokens"]


def _same_run(one: Record, other: Record) -> bool:
    keys = ("cap", "prefill_tokens")
    return (
        same_conditions(one, other)
        and one.policy["name"] == other.policy["name"]
        and one.policy["options"] == other.policy["options"]
        and all(one.protocol[key] == other.protocol[key] for key in keys)
    )
