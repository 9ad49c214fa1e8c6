"""Statistics of paired runs: intervals of ΔPPL and means, event-aligned curves, what a length of text resolves."""

from sinkstream.statistics.curves import AFTER, BEFORE, EventCurve, event_curve, event_cycles
from sinkstream.statistics.delta import (
    BLOCK_TOKENS,
    MIN_BLOCKS,
    PairedDelta,
    PplInterval,
    block_sums,
    mean_interval,
    paired_delta_ppl,
    ppl_interval,
    share_interval,
    suitable_block_tokens,
)
from sinkstream.statistics.estimate import Estimate
from sinkstream.statistics.power import Resolution, resolution

__all__ = [
    "AFTER",
    "BEFORE",
    "BLOCK_TOKENS",
    "MIN_BLOCKS",
    "Estimate",
    "EventCurve",
    "PairedDelta",
    "PplInterval",
    "Resolution",
    "block_sums",
    "event_curve",
    "event_cycles",
    "mean_interval",
    "paired_delta_ppl",
    "ppl_interval",
    "resolution",
    "share_interval",
    "suitable_block_tokens",
]
