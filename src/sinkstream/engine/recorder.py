"""Reading on the host what steps leave on the device; the tokens from the plan, without a kernel a token."""

from collections.abc import Sequence
from typing import Protocol

import torch

from sinkstream.kernels.layout import TOKEN


class PlannedSteps(Protocol):
    """What a recorder reads of `StreamState`, which has the meaning of each."""

    plan: torch.Tensor

    @property
    def active(self) -> tuple[int, ...]: ...

    @property
    def steps_done(self) -> int: ...

    def appended(self, first: int) -> torch.Tensor: ...


class Recorder:
    """Token ids that are appended while it is open; see `StreamState.recording`.

    Parameters
    ----------
    state : StreamState
    looks : bool
        Whether `latest` will be called.
    keeps : bool
        Whether `tokens` will be called; otherwise nothing is kept, however long the recorder is open.
    """

    def __init__(self, state: PlannedSteps, looks: bool, keeps: bool = True):
        self._state, self._first, self._keeps = state, state.steps_done, keeps
        self._parts: list[torch.Tensor] = []
        self._reader = _EarlyReader(state.plan) if looks and state.plan.is_cuda else None

    def tokens(self) -> torch.Tensor:
        """All of them so far, ``(steps, streams)`` int64 on the device; `LIKELIEST` where the stream was idle."""
        self.keep()
        self._first = self._state.steps_done
        return torch.cat(self._parts)

    def latest(self) -> list[int]:
        """What the latest step appended to each stream; waits until that step has begun, not until it has ended.

        Streams that sat the step out have no token; what stands in their places means nothing.
        """
        row = self._state.plan[self._state.steps_done - 1]
        return row[:, TOKEN].tolist() if self._reader is None else self._reader.read(row, self._state.active)

    # ---- for the state ----

    def due(self) -> None:
        """Called before a step is launched."""
        if self._reader is not None:
            self._reader.due()

    def keep(self) -> None:
        """Called before the plan is discarded."""
        if self._keeps:
            self._parts.append(self._state.appended(self._first))
        self._first = 0


class _EarlyReader:
    """Reads a row of the plan on a CUDA device while the step of that row is running.

    On the stream of the steps a copy would wait for the end of the step's CUDA graph, and no event inside a graph can
    be waited for. So the row is copied on a second stream, again and again from the launch of the step on, until it
    holds the token ids: as a rule the first or the second copy does.
    """

    def __init__(self, plan: torch.Tensor):
        self._device, self._stream = plan.device, torch.cuda.Stream(plan.device)
        self._host = torch.empty(plan.shape[1:], dtype=plan.dtype, pin_memory=True)
        self._due, self._arrived = torch.cuda.Event(), torch.cuda.Event()

    def due(self) -> None:
        """Called when the row is planned and before its step is launched."""
        self._due.record(torch.cuda.current_stream(self._device))

    def read(self, row: torch.Tensor, active: Sequence[int]) -> list[int]:
        """Token ids of the row, (streams, 8), once its step has begun, which these streams take part in."""
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._due)
            while True:
                self._host.copy_(row, non_blocking=True)
                self._arrived.record()
                self._arrived.synchronize()
                tokens = self._host[:, TOKEN].tolist()
                if all(tokens[s] >= 0 for s in active):
                    return tokens


class CopyInFlight:
    """An asynchronous copy of a small tensor to the host, which overlaps with what is launched next."""

    def __init__(self, tensor: torch.Tensor):
        self._host = tensor.to("cpu", non_blocking=True)  # to pinned memory
        self._arrived = torch.cuda.Event() if tensor.is_cuda else None
        if self._arrived is not None:
            self._arrived.record()

    def tolist(self) -> list:
        """Wait for the copy, and for nothing that was launched after it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host.tolist()
