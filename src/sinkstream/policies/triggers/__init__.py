"""Triggers decide *when* to prune: one file and one registered class each."""

from sinkstream.policies.triggers.base import TRIGGERS, Trigger
from sinkstream.policies.triggers.lazy import Lazy
from sinkstream.policies.triggers.slack import Slack

from sinkstream.policies.triggers.adaptive import SIGNALS, Adaptive  # isort: skip  (registration order is table order)

__all__ = ["SIGNALS", "TRIGGERS", "Adaptive", "Lazy", "Slack", "Trigger"]
