"""How long a point will take: a formula of tokens, forwards and weights, corrected by the points that are done.

It serves ``--dry-run`` and the remaining time of a running matrix; it is no figure of any document.
"""

from collections.abc import Iterable
from functools import lru_cache

from sinkstream.data.text import TEXTS
from sinkstream.evaluation.decoders import RecomputeDecoder
from sinkstream.matrix.point import Point
from sinkstream.models import resolve_dtype
from sinkstream.models.size import weight_bytes

UNKNOWN_TOKENS, UNKNOWN_BYTES = 20_000, 3e8
# by kind of device: seconds of a forward besides its arithmetic, operations and bytes per second, seconds of a set-up
FORWARD_SEC = {"cpu": 0.02, "cuda": 0.015}
OPERATIONS = {"cpu": 4e10, "cuda": 6e13}
BYTES = {"cpu": 1e10, "cuda": 2e12}
SET_UP_SEC = {"cpu": 0.5, "cuda": 3.0}


@lru_cache(maxsize=64)
def _model_bytes(spec: str, dtype: str) -> float:
    try:
        return weight_bytes(spec, resolve_dtype(dtype, "cpu")) or UNKNOWN_BYTES
    except ValueError:
        return UNKNOWN_BYTES


def estimated_seconds(point: Point, *, timed: bool = True) -> float:
    """Seconds that a point is expected to take on its device, loading and compilation left out.

    `timed`: whether its speed is measured, and not taken from a point that differs in its text.
    """
    kind = point.device.partition(":")[0]
    size = _model_bytes(point.model.spec, point.dtype)
    parameters = size / resolve_dtype(point.dtype, "cpu").itemsize
    default = TEXTS[point.text.spec]().default_tokens if point.text.spec == "builtin" else None
    tokens = point.text.tokens or default or UNKNOWN_TOKENS
    seconds = 0.0
    if point.scored:
        forwards, fed = _work(point, tokens)
        seconds += forwards * FORWARD_SEC[kind] + 2 * parameters * fed / OPERATIONS[kind]
    if point.speed and timed:
        step = size / BYTES[kind]
        if point.settings.method == "recompute":
            step += 2 * parameters * point.settings.given_cap / OPERATIONS[kind]
        if (point.rung or "").startswith("hf"):
            step += FORWARD_SEC[kind]
        steps = point.speed.steady_tokens + point.speed.warmup_tokens
        seconds += point.speed.repeats * (steps * step + SET_UP_SEC[kind])
    return seconds


def _work(point: Point, tokens: int) -> tuple[float, float]:
    """(forwards, tokens that go through them) of scoring a point."""
    run = point.settings
    if run.method == "recompute":
        scored = tokens / run.sample_every
        return scored / RecomputeDecoder.batch, scored * run.given_cap
    if run.evaluate == "steps":
        return float(tokens), float(tokens)
    policy = run.policy()
    block = run.block_tokens
    if policy is not None and not policy.plan_known:
        block = max(1, min(block, policy.sure_growth + 1))
    return tokens / block, float(tokens)


class Remaining:
    """Seconds left of a list of points: estimates, scaled by what the points so far took."""

    def __init__(self, points: Iterable[Point]):
        self.estimates: dict[str, float] = {}
        timings: set[str] = set()
        for point in points:
            self.estimates[point.id] = estimated_seconds(point, timed=point.timing not in timings)
            timings.add(point.timing)
        self._spent = self._expected = 0.0
        self._open = dict(self.estimates)

    def done(self, point_id: str, seconds: float) -> None:
        """A point has ended after so many seconds."""
        self._spent += seconds
        self._expected += self._open.pop(point_id, 0.0)

    @property
    def seconds(self) -> float:
        """Seconds that the open points are expected to take."""
        scale = self._spent / self._expected if self._expected else 1.0
        return scale * sum(self._open.values())


def in_words(seconds: float) -> str:
    """A length of time for people: seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
