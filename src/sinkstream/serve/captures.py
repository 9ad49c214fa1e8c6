"""The CUDA graphs of a server: captured before it answers, and counted where a request had to wait for one."""

import logging
import time
from collections.abc import Callable

from sinkstream.engine.decoder import StreamDecoder
from sinkstream.engine.sampling import Sampler

PROGRESS_SECONDS = 2.0
DRAWS = (  # one of each kind of draw
    Sampler(temperature=1.0),  # of OpenAI's API where a request does not say
    Sampler(temperature=1.0, min_p=0.5),
    Sampler(temperature=1.0, top_p=0.5),
    Sampler(temperature=1.0, top_p=0.5, top_k=8),
)
PENALTY = {"presence_penalty": 1.0}
SAMPLERS: dict[str, tuple[Sampler, ...]] = {
    "common": DRAWS[:1],
    "all": (*DRAWS, *(Sampler(**vars(draw) | PENALTY) for draw in DRAWS)),
}
Count = Callable[[str, int, float], None]

log = logging.getLogger(__name__)


def capture_at_start(decoder: StreamDecoder, which: str, tokens: int, count: Count) -> None:
    """Capture what a running server needs, and count what it captures from then on.

    Parameters
    ----------
    decoder : StreamDecoder
        Its streams are empty, and are so afterwards.
    which : {"common", "all", "none"}
        As in `ServeSettings.captures`.
    tokens : int
        Of the longest chunk of a prompt, one of which is fed: longer ones than the captured ones compile their kernels.
    count : callable
        ``count(when, graphs, seconds)`` with "start", once, or "traffic".
    """
    captures = decoder.captures
    if which != "none" and decoder.captures.count:  # the backend captures
        decoder.capture(SAMPLERS[which], _progress())
        decoder.prefill([0] * tokens)
        decoder.reset(stream=0)
        log.info("captured %d CUDA graphs in %.1f s", captures.count, captures.seconds)
    count("start", captures.count, captures.seconds)

    def told(name: str, seconds: float) -> None:
        count("traffic", 1, seconds)
        log.info("captured %s for a request, which has waited %.0f ms for it", name, 1e3 * seconds)

    captures.told = told


def _progress() -> Callable[[int, int], None]:
    """Tells the log how far the captures are, every other second."""
    next_one = time.monotonic() + PROGRESS_SECONDS

    def told(done: int, total: int) -> None:
        nonlocal next_one
        if time.monotonic() >= next_one:
            next_one = time.monotonic() + PROGRESS_SECONDS
            log.info("captured %d of %d CUDA graphs", done, total)

    return told
