"""`PlannedStreams`: which tokens the steps of a plan append, and who is told of steps and plans."""

from contextlib import contextmanager
from typing import Any, Protocol

import torch

from sinkstream.cache import ModelSpec
from sinkstream.engine.held import HeldStreams
from sinkstream.engine.recorder import Recorder
from sinkstream.engine.sampling import SamplingState
from sinkstream.kernels.layout import LIKELIEST
from sinkstream.policies import EvictionPolicy


class BetweenSteps(Protocol):
    """What is done to a stream between two steps by somebody else than the policy: recall."""

    def before_step(self) -> None:
        """Called before a step is planned."""

    def planned(self) -> None:
        """Called when the rows of a plan have been written."""

    def keep(self) -> None:
        """Called before a plan is discarded."""

    def rewind(self, tokens: int) -> None:
        """Called before the latest tokens are taken back. Raises ValueError if they cannot be."""

    def rebasing(self) -> None:
        """Called before positions are rebased."""

    def forget(self) -> None:
        """Called when the stream is forgotten."""


class PlannedStreams(HeldStreams):
    """Streams, and the tokens that they append.

    Parameters
    ----------
    vocab : int
    spec, policy, more
        As for `HeldStreams`.

    Attributes
    ----------
    sampling : SamplingState
    between_steps : list of BetweenSteps
        What is told of every step and plan.
    """

    def __init__(self, spec: ModelSpec, policy: EvictionPolicy, *, vocab: int, **more: Any):
        super().__init__(spec, policy, vocab=vocab, **more)
        self._recorders: list[Recorder] = []
        self.between_steps: list[BetweenSteps] = []
        self.sampling = SamplingState(self.streams, vocab, self.device)
        self._filled: tuple[int, int] | None = None  # versions of `tokens` and the marks in it
        self._row = 0  # steps of the plan that have been launched
        self._active: tuple[int, ...] = ()

    def choose(self, tokens: torch.Tensor | None) -> None:
        """Say what the next step appends.

        Parameters
        ----------
        tokens : Tensor or None, (streams,), int64, on the device
            None: what `sampling` says of each stream; nothing is launched if the step before was told so too.
        """
        if tokens is not None:
            self.tokens.copy_(tokens)
        elif self._filled != (self.tokens._version, self.sampling.version):  # every write counts, whoever did it
            self.tokens.copy_(self.sampling.marks)
            self._filled = (self.tokens._version, self.sampling.version)

    @contextmanager
    def recording(self, *, looks: bool = False, keeps: bool = True):
        """Gives a `Recorder`, which tells the token ids that are appended from now on, while the context lasts.

        Parameters
        ----------
        looks : bool
            Whether tokens will be looked at one by one.
        keeps : bool
            Whether all of them will be asked for at the end.
        """
        recorder = Recorder(self, looks, keeps)
        self._recorders.append(recorder)
        try:
            yield recorder
        finally:
            self._recorders.remove(recorder)

    @property
    def active(self) -> tuple[int, ...]:
        """Streams that the steps of the present plan append to."""
        return self._active

    @property
    def steps_done(self) -> int:
        """Steps of the present plan that have been launched; their rows hold the token ids."""
        return self._row

    def appended(self, first: int) -> torch.Tensor:
        """Token ids that the steps of the present plan appended, from its step `first` on.

        Returns
        -------
        Tensor, (steps, streams), int64
            A copy on the device; `LIKELIEST` where the stream sat out, `NO_TOKEN` where nothing could be drawn.
        """
        ids = self.span().appended(first, self._row)
        for s in range(self.streams):
            if s not in self._active:
                ids[:, s] = LIKELIEST
        return ids

    def _keep_recorded(self) -> None:
        for recorder in self._recorders:
            recorder.keep()
        for told in self.between_steps:
            told.keep()
