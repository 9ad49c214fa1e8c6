"""Triggers decide *when* to prune: one file and one registered class each. A file in this folder registers itself."""

from sinkstream.policies.triggers.base import TRIGGERS, Trigger
from sinkstream.registry import import_folder

import_folder(__name__, __path__)

from sinkstream.policies.triggers.adaptive import SIGNALS, Adaptive  # noqa: E402
from sinkstream.policies.triggers.lazy import Lazy  # noqa: E402
from sinkstream.policies.triggers.turns import Turns  # noqa: E402

__all__ = ["SIGNALS", "TRIGGERS", "Adaptive", "Lazy", "Trigger", "Turns"]
