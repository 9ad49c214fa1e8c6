"""Eviction policies: which cached tokens stay. Pure and model-free: integers in, integers out."""

from sinkstream.policies.eviction import CAP_ACCOUNTING, EvictionPolicy, option_names, option_specs
from sinkstream.policies.presets import PRESETS, preset_options
from sinkstream.policies.schedule import PruneSchedule, Step, Steps
from sinkstream.policies.scorers import SCORERS, Candidates, Scorer, scored_field, select, structural_weights
from sinkstream.policies.triggers import SIGNALS, TRIGGERS, Trigger

__all__ = [
    "CAP_ACCOUNTING",
    "PRESETS",
    "SCORERS",
    "SIGNALS",
    "TRIGGERS",
    "Candidates",
    "EvictionPolicy",
    "PruneSchedule",
    "Scorer",
    "Step",
    "Steps",
    "Trigger",
    "option_names",
    "option_specs",
    "preset_options",
    "scored_field",
    "select",
    "structural_weights",
]
