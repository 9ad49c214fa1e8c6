"""Scorers decide *which* older tokens stay pinned between sinks and window: one file and one registered class each."""

# Registration order is table order: from the cheapest knowledge to the dearest.
from sinkstream.policies.scorers.base import SCORERS, Candidates, Scorer, select

from sinkstream.policies.scorers.uniform import Uniform  # isort: skip
from sinkstream.policies.scorers.structural import Structural, structural_weights  # isort: skip
from sinkstream.policies.scorers.uncertainty import Uncertainty  # isort: skip
from sinkstream.policies.scorers.window_attention import WindowAttention  # isort: skip
from sinkstream.policies.scorers.accumulated_attention import AccumulatedAttention  # isort: skip
from sinkstream.policies.scorers.last_query import LastQuery  # isort: skip
from sinkstream.policies.scorers.key_norm import KeyNorm  # isort: skip

__all__ = [
    "SCORERS",
    "AccumulatedAttention",
    "Candidates",
    "KeyNorm",
    "LastQuery",
    "Scorer",
    "Structural",
    "Uncertainty",
    "Uniform",
    "WindowAttention",
    "select",
    "structural_weights",
]
