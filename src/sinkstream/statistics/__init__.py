"""Statistics of paired runs: intervals of ΔPPL and means, event-aligned curves, what a length of text resolves."""

from sinkstream.statistics.bootstrap import DEFAULT, Bootstrap, Estimate
from sinkstream.statistics.curves import AFTER, BEFORE, EventCurve, event_curve, event_cycles
from sinkstream.statistics.delta import (
    BLOCK_TOKENS,
    MIN_BLOCKS,
    PairedDelta,
    block_sums,
    delta_of_blocks,
    mean_interval,
    mean_of_blocks,
    paired_delta_ppl,
    share_of_blocks,
    suitable_block_tokens,
)
from sinkstream.statistics.power import Resolution, resolution
from sinkstream.statistics.proportion import proportion

__all__ = [
    "AFTER",
    "BEFORE",
    "BLOCK_TOKENS",
    "DEFAULT",
    "MIN_BLOCKS",
    "Bootstrap",
    "Estimate",
    "EventCurve",
    "PairedDelta",
    "Resolution",
    "block_sums",
    "delta_of_blocks",
    "event_curve",
    "event_cycles",
    "mean_interval",
    "mean_of_blocks",
    "paired_delta_ppl",
    "proportion",
    "resolution",
    "share_of_blocks",
    "suitable_block_tokens",
]
