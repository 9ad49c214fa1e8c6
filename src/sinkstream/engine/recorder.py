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
        self._reader = EarlyReader(state.plan) if looks and state.plan.is_cuda else None

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
        return row[:, TOKEN].tolist() if self._reader is None else self._reader.read(row[None], self._state.active)[0]

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


class EarlyReader:
    """Reads rows of the plan on a CUDA device while the step of the last of them is running.

    On the stream of the steps a copy would wait for the end of the step's CUDA graph, and no event inside a graph can
    be waited for. So the rows are copied on a second stream, again and again from the launch of the step on, until the
    last one holds the token ids: as a rule the first or the second copy does.
    """

    def __init__(self, plan: torch.Tensor):
        self._device, self._stream = plan.device, torch.cuda.Stream(plan.device)
        self._host = torch.empty(plan.shape, dtype=plan.dtype, pin_memory=True)
        self._due = torch.cuda.Event()

    def due(self) -> None:
        """Called when the rows are planned and before the step of the last one is launched."""
        self._due.record(torch.cuda.current_stream(self._device))

    def read(self, rows: torch.Tensor, active: Sequence[int]) -> list[list[int]]:
        """Token ids of rows, (rows, streams, 8), once the last step has begun, which these streams take part in."""
        host = self._host[: len(rows)]
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._due)
            while True:
                host.copy_(rows, non_blocking=True)
                self._stream.synchronize()
                tokens = host[:, :, TOKEN].tolist()
                if all(tokens[-1][s] >= 0 for s in active):
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
