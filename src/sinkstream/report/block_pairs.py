"""Runs in blocks beside the same runs step by step: how much faster, and how far apart their NLL."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sinkstream.records.pairing import same_whole_text
from sinkstream.records.records import Record
from sinkstream.records.selection import conditions, evaluated


@dataclass(frozen=True)
class BlockPair:
    """A run in blocks and the same run step by step: same model, policy, precision and hardware.

    The tokens are the same, or those of the steps are the beginning of those of the blocks.
    """

    blocks: Record
    steps: Record

    @property
    def speedup(self) -> float:
        """Seconds that a step took over seconds that blocks took for a token, scoring included."""
        steps, blocks = self.steps.summary, self.blocks.summary
        of_blocks = (blocks["total_sec"] - blocks["prefill_sec"]) / blocks["decode_tokens"]
        return steps["decode_sec"] / steps["decode_tokens"] / of_blocks

    @property
    def max_abs_nll_difference(self) -> float:
        """Largest difference of one token's NLL, in nats."""

        def compute() -> float:
            steps = self.steps.arrays["nll"].astype(np.float64)
            return float(np.abs(self.blocks.arrays["nll"][: len(steps)] - steps).max())

        return self.blocks.pairs.figure("largest NLL difference", (self.blocks, self.steps), compute)


def block_pairs(records: Sequence[Record]) -> list[BlockPair]:
    """Every complete run in blocks with the newest run step by step that it can be compared with.

    Parameters
    ----------
    records : sequence of Record
        Oldest first, as the pairs are.
    """
    complete = [r for r in records if r.status == "complete" and r.protocol["sample_every"] == 1]
    timed = [r for r in complete if r.summary["timed_tokens"] == r.summary["decode_tokens"]]
    stepped = [r for r in timed if evaluated(r) == "steps"]
    pairs = []
    for run in complete:
        if evaluated(run) == "blocks" and run.summary["total_sec"]:
            pairs += [BlockPair(run, other) for other in stepped if _same_run(run, other)][-1:]
    return pairs


def _same_run(blocks: Record, steps: Record) -> bool:
    keys = ("cap", "prefill_tokens")
    return (
        _begins_like(blocks, steps)
        and conditions(blocks) == conditions(steps)
        and blocks.policy["name"] == steps.policy["name"]
        and blocks.policy["options"] == steps.policy["options"]
        and all(blocks.protocol[key] == steps.protocol[key] for key in keys)
    )


def _begins_like(blocks: Record, steps: Record) -> bool:
    """Whether the tokens of the steps are the first ones of the blocks."""
    longer, shorter = blocks.blocks, steps.blocks
    if not (longer and shorter and longer.whole and shorter.whole and same_whole_text(blocks, steps)):
        return False
    return longer.first == shorter.first and longer.last >= shorter.last
