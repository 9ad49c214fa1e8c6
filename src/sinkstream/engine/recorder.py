"""Which tokens the steps appended: read from the plan, where every step leaves the ids, without a kernel a token."""

import torch

from sinkstream.kernels.layout import TOKEN


class Recorder:
    """Token ids that are appended while it is open; see `StreamState.recording`.

    Parameters
    ----------
    state : StreamState
    looks : bool
        Whether `latest` will be asked.
    """

    def __init__(self, state, looks: bool):
        self._state, self._first, self._parts = state, state.steps_done, []
        self._glimpse = _Glimpse(state.plan) if looks and state.plan.is_cuda else None

    def tokens(self) -> torch.Tensor:
        """All of them so far, ``(steps, streams)`` int64 on the device; `LIKELIEST` where the stream sat out."""
        self.keep()
        self._first = self._state.steps_done
        return torch.cat(self._parts)

    def latest(self) -> list[int]:
        """What the latest step appended to each stream; waits until that step has begun, not until it has ended."""
        row = self._state.plan[self._state.steps_done - 1]
        return row[:, TOKEN].tolist() if self._glimpse is None else self._glimpse.read(row)

    # ---- for the state ----

    def due(self) -> None:
        """A step is about to be launched."""
        if self._glimpse is not None:
            self._glimpse.due()

    def keep(self) -> None:
        """The plan is about to be discarded."""
        self._parts.append(self._state.appended(self._first))
        self._first = 0


class _Glimpse:
    """Reads a row of the plan on a CUDA device while the step that the row is for is under way.

    A step of one CUDA graph ends before anything launched after it begins, and an event inside cannot be waited for.
    So the row is copied on a stream of its own, from where the step may begin, until the ids are there: as a rule the
    first or the second time.
    """

    def __init__(self, plan: torch.Tensor):
        self._device, self._stream = plan.device, torch.cuda.Stream(plan.device)
        self._host = torch.empty(plan.shape[1:], dtype=plan.dtype, pin_memory=True)
        self._due, self._arrived = torch.cuda.Event(), torch.cuda.Event()

    def due(self) -> None:
        """The row is planned and its step is launched next."""
        self._due.record(torch.cuda.current_stream(self._device))

    def read(self, row: torch.Tensor) -> list[int]:
        """Token ids of the row, (streams, 8), once its step has begun."""
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._due)
            while True:
                self._host.copy_(row, non_blocking=True)
                self._arrived.record()
                self._arrived.synchronize()
                tokens = self._host[:, TOKEN].tolist()
                if min(tokens) >= 0:
                    return tokens
