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

    def add(self, loop: asyncio.AbstractEventLoop, wake: Wake) -> None:
        """Call `wake` in its loop at the next delivery."""
        self._waiting.setdefault(loop, []).append(wake)

    def deliver(self) -> None:
        """Wake all that wait; those of a loop that has ended hear nothing."""
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, {}
        for loop, wakes in waiting.items():
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(_wake, wakes)


def _wake(wakes: list[Wake]) -> None:
    for wake in wakes:
        wake()
