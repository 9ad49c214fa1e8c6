"""Scorers decide *which* older tokens stay pinned: one file and one registered class each, registering itself."""

from sinkstream.policies.scorers.base import SCORERS, Candidates, Scorer, scored_field, select
from sinkstream.registry import import_folder

import_folder(__name__, __path__)

from sinkstream.policies.scorers.structural import structural_weights  # noqa: E402

__all__ = ["SCORERS", "Candidates", "Scorer", "scored_field", "select", "structural_weights"]
