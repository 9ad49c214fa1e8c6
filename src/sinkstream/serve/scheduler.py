"""One thread that does all work on the model: it gives each job a step in turn.

A job is a generator; one `next` is one unit of work: a chunk of a prompt, a wait for memory, or what comes between two
tokens of a reply. A round is one unit of each job and then one decode step for all jobs that have asked for a token
(continuous batching). So jobs join and leave between two steps, and a long prompt holds the others up for one chunk a
round.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import TypeVar

from sinkstream.serve.errors import busy, stopping

T = TypeVar("T")
STEP = "step"  # what a job yields that goes on once it has been given a token by the decode step of all jobs
WAITING = "waiting"  # what a job yields that has done nothing, because it waits for another job
RETRY_SECONDS = 5
IDLE_SECONDS = 0.5
Work = Generator[str | None, None, None]

log = logging.getLogger(__name__)


class Job:
    """A generator that is under way.

    Attributes
    ----------
    waiting : bool
        Whether its latest turn did nothing.
    """

    def __init__(self, work: Work, dropped: Callable[[], None]):
        self.work, self.waiting, self.cancelled = work, False, threading.Event()
        self._dropped, self._begun = dropped, False

    def advance(self) -> None:
        """Do one unit of work. Raises StopIteration at the end."""
        self._begun = True
        self.waiting = next(self.work) == WAITING

    def close(self) -> None:
        """End it; a generator that has not begun cannot tell so by itself."""
        self.work.close()
        if not self._begun:
            self._dropped()

    def cancel(self) -> None:
        """Ask for its end before its next unit of work, from any thread."""
        self.cancelled.set()


class Scheduler:
    """Runs jobs fairly in one thread.

    Parameters
    ----------
    limit : int
        Most jobs at once.
    step : callable
        Called at the end of each round: the decode step of all jobs that have asked for a token.
    idle : callable
        Called when there has been nothing to do for a while; says whether there is more of it to do.
    """

    def __init__(
        self, limit: int, idle: Callable[[], bool] = lambda: False, *, step: Callable[[], None] = lambda: None
    ):
        self.limit, self._idle, self._step = limit, idle, step
        self._jobs: deque[Job] = deque()
        self._calls: deque[tuple[Callable[[], object], Future]] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._last: Callable[[], None] | None = None
        self._thread = threading.Thread(target=self._run, name="sinkstream-scheduler", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def submit(self, work: Work, dropped: Callable[[], None] = lambda: None) -> Job:
        """Add a job; `dropped` is called if it ends before it has begun.

        Raises
        ------
        APIError
            429 if there are too many, 503 if the server is stopping.
        """
        job = Job(work, dropped)
        with self._changed:
            if self._stopping:
                raise stopping()
            if len(self._jobs) >= self.limit:
                raise busy(f"{len(self._jobs)} requests wait or run, the most that are accepted", RETRY_SECONDS)
            self._jobs.append(job)
            self._changed.notify()
        return job

    def call(self, function: Callable[[], T]) -> "Future[T]":
        """Run a function between two units of work; its result or exception is the future's."""
        future: Future = Future()
        with self._changed:
            if self._stopping:
                raise stopping()
            self._calls.append((function, future))
            self._changed.notify()
        return future

    def wake(self) -> None:
        """What a job waits for may have come; from any thread."""
        with self._changed:
            self._changed.notify()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def counts(self) -> dict[str, int]:
        """How many jobs run and how many wait."""
        with self._changed:
            waiting = sum(job.waiting for job in self._jobs)
            return {"running": len(self._jobs) - waiting, "waiting": waiting}

    def stop(self, last: Callable[[], None] | None = None) -> None:
        """Cancel all jobs, run `last` in the thread, end the thread and wait for it."""
        if not self.alive:
            return
        with self._changed:
            self._stopping, self._last = True, last
            self._changed.notify()
        self._thread.join()

    # ---- the thread ----

    def _run(self) -> None:
        try:
            self._rounds()
        except BaseException:
            log.exception("the scheduler has failed; the server answers no further request")
        with self._changed:
            self._stopping, calls = True, [*self._calls]
        for _, future in calls:
            if future.set_running_or_notify_cancel():
                future.set_exception(stopping())

    def _rounds(self) -> None:
        while True:
            self._wait()
            with self._changed:
                if all(job.waiting and not job.cancelled.is_set() for job in self._jobs) and not self._calls:
                    self._changed.wait(0.05)
                ends, jobs = self._stopping, list(self._jobs)
            if ends:
                for job in jobs:
                    self._end(job)
            self._run_calls()
            if ends:
                if self._last is not None:
                    self._last()
                return
            for job in jobs:
                self._advance(job)
            self._step()

    def _wait(self) -> None:
        """Wait for something to do; meanwhile do what is for idle times, a piece at a time."""
        more = True
        while True:
            with self._changed:
                if not (self._jobs or self._calls or self._stopping):
                    self._changed.wait(IDLE_SECONDS if more else None)
                if self._jobs or self._calls or self._stopping:
                    return
            if more:
                try:
                    more = self._idle()
                except Exception:
                    log.exception("what is done in idle times failed")
                    more = False

    def _run_calls(self) -> None:
        while True:
            with self._changed:
                if not self._calls:
                    return
                function, future = self._calls.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

    def _advance(self, job: Job) -> None:
        if job.cancelled.is_set():
            self._end(job)
            return
        try:
            job.advance()
        except StopIteration:
            self._remove(job)
        except BaseException:
            log.exception("a job failed")
            self._remove(job)

    def _end(self, job: Job) -> None:
        try:
            job.close()
        except BaseException:
            log.exception("a job failed while it was ended")
        self._remove(job)

    def _remove(self, job: Job) -> None:
        with self._changed:
            self._jobs.remove(job)
