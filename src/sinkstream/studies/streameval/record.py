"""Records of streaming question answering: one JSON file a policy, one row a question."""

from dataclasses import dataclass

import numpy as np

from sinkstream.records.schema import with_keys
from sinkstream.studies.facts.record import AnswersRecord


@dataclass(frozen=True)
class StreamEvalRecord(AnswersRecord):
    """What one policy answers of a stream of facts; `lines`: from the statement to the question."""

    SCHEMA, KIND, OWN = "sinkstream.streameval/1", "streameval", {"lines": np.int64}
    REQUIRED = with_keys(AnswersRecord.REQUIRED, protocol=("every",))
