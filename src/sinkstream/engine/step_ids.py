"""`StepIds`: the token ids of one stream, read as late as may be from what its steps leave on the device."""

from sinkstream.engine.planned import PlannedStreams
from sinkstream.engine.recorder import CopyInFlight, EarlyReader
from sinkstream.kernels.layout import NO_TOKEN


class StepIds:
    """Token ids that steps have appended and that nobody has taken.

    Parameters
    ----------
    state : PlannedStreams
        Of one stream.
    """

    def __init__(self, state: PlannedStreams):
        self.state = state
        self._reader = EarlyReader(state.plan) if state.plan.is_cuda else None
        self.forget()

    def forget(self) -> None:
        """Begin a new stream."""
        self._read = 0  # rows of the present plan
        self._discarded: list[CopyInFlight] = []  # token ids of plans that have been discarded
        self._ids: list[int] = []

    def planned(self) -> None:
        """The rows of the plan have no token ids yet."""
        if self._reader is not None:
            self._reader.due()

    def keep(self) -> None:
        """Copy the token ids of a plan that will be discarded, without waiting for its steps."""
        if self._read < self.state.steps_done:
            self._discarded.append(CopyInFlight(self.state.appended(self._read)))
        self._read = 0

    def take(self, count: int) -> list[int]:
        """The oldest ids; waits until the step that appended the last of them has begun."""
        for part in self._discarded:
            self._ids += [row[0] for row in part.tolist()]
        self._discarded = []
        more = count - len(self._ids)
        if more > 0:
            rows = self.state.plan[self._read : self._read + more]
            if self._reader is not None:
                self._ids += [row[0] for row in self._reader.read(rows, (0,))]
            else:
                self._ids += [row[0] for row in self.state.appended(self._read)[:more].tolist()]
            self._read += more
        taken, self._ids = self._ids[:count], self._ids[count:]
        return [0 if token == NO_TOKEN else token for token in taken]
