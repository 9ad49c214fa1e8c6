"""Last-query refresh: keep what the newest token looks at."""

from dataclasses import dataclass
from typing import ClassVar

from sinkstream.policies.scorers.base import SCORERS, FieldScorer


@SCORERS.register("last-query")
@dataclass(frozen=True)
class LastQuery(FieldScorer):
    """Keep, per layer and kv head, the tokens that the latest query attends to most.

    Source: TOVA (Oren et al., arXiv:2401.06104). Deviation: each kv head chooses for itself; TOVA averages the heads.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"attention"})
    per_head: ClassVar[bool] = True

    @property
    def observed_queries(self) -> int:
        return 1
