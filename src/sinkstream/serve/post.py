"""From the scheduler's thread to the event loops: all that a round tells, handed over at once."""

import asyncio
from collections.abc import Callable
from contextlib import suppress

Wake = Callable[[], None]


class Post:
    """Who has heard something in this round and is to be woken; used by the scheduler's thread only.

    A wake-up costs a write to the loop's socket and a switch between two threads, so that all requests of a round share
    one.
    """

    def __init__(self) -> None:
        self._waiting: dict[asyncio.AbstractEventLoop, list[Wake]] = {}
        self._urgent = False

    def add(self, loop: asyncio.AbstractEventLoop, wake: Wake, *, urgent: bool = True) -> None:
        """Call `wake` in its loop at the next delivery, for which a prompt waits if it is urgent."""
        self._waiting.setdefault(loop, []).append(wake)
        self._urgent = self._urgent or urgent

    def deliver_urgent(self) -> None:
        """Wake all that wait if what one of them has heard is urgent.

        What a loop does once it is woken it does instead of this thread: while many requests begin, the device would
        wait for it.
        """
        if self._urgent:
            self.deliver()

    def deliver(self) -> None:
        """Wake all that wait; those of a loop that has ended hear nothing."""
        if not self._waiting:
            return
        waiting, self._waiting, self._urgent = self._waiting, {}, False
        for loop, wakes in waiting.items():
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(_wake, wakes)


def _wake(wakes: list[Wake]) -> None:
    for wake in wakes:
        wake()
