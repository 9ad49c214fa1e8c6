"""Slack: a hard bound on how far the cache may run past its target, whatever other triggers say."""

from dataclasses import dataclass
from typing import Any

from sinkstream.policies.options import option
from sinkstream.policies.triggers.base import TRIGGERS, Trigger


@TRIGGERS.register("slack")
@dataclass(frozen=True)
class Slack(Trigger):
    """Prune whenever more than `slack` tokens lie past the target, whatever compress_every says.

    Source: the ``extra_slack`` of the project's plan.
    """

    slack: int | None = option(
        None, "prune as soon as the cache is more than this many tokens past its target", minimum=0
    )

    @property
    def growth(self) -> int:
        assert self.slack is not None  # the option switches the trigger on
        return self.slack

    def due(self, over: int, state: Any) -> bool:
        return over > self.growth
