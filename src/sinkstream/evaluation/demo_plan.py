"""How long the demo will be: what it costs at the speed of the machine, and how much of it fits the time."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sinkstream.data import TokenStream
from sinkstream.evaluation.demo import CAP, SAMPLE_EVERY, TOKENS, demo_settings
from sinkstream.evaluation.demo_speed import BLOCK, SHORT, Speed
from sinkstream.evaluation.record import run_identity
from sinkstream.evaluation.settings import RunSettings
from sinkstream.models import LoadedModel
from sinkstream.records.records import load_records

SECONDS = 150.0  # for the runs; loading, measuring and drawing come to it
LATE = 1.15  # times that time: runs that would end later are left out
LEAST_CAPS = 4  # a text shorter than four caps says little about eviction
ADAPTIVE_SHORT = 20  # tokens of one forward of the adaptive policy on average, a little less than was counted
FULL_GROWTH = 1 / 7_000  # what attention of the full cache adds to a block, for every token of the text


@dataclass(frozen=True)
class Size:
    """How much a demo runs."""

    tokens: int = TOKENS  # length of the text
    sample_every: int = SAMPLE_EVERY  # recompute scores every k-th token
    timed_tokens: int | None = None  # tokens of each run that are decoded one by one; default: as in the whole demo

    def settings(self, cap: int) -> list[RunSettings]:
        """The runs of a demo of this size."""
        return demo_settings(cap, self.sample_every, self.tokens, self.timed_tokens)

    def windows(self, cap: int) -> int:
        """Tokens that recompute scores, a window each."""
        return math.ceil((self.tokens - 1 - cap) / self.sample_every)


LADDER = (
    Size(1_024, 32, 72),
    Size(1_536, 28, 80),
    Size(2_048, 32),
    Size(3_072, 40),
    Size(4_096, 48),
    Size(),
)


@dataclass(frozen=True)
class Plan:
    """A size that was chosen for a time."""

    size: Size
    seconds: float  # time that there is for the runs
    expected: tuple[float, ...]  # seconds that each run is expected to take, in order
    whole_seconds: float  # seconds that the runs of the whole demo are expected to take

    @property
    def fits(self) -> bool:
        """Whether the runs are expected to take no longer than there is time."""
        return sum(self.expected) <= self.seconds

    def is_late(self, taken: Sequence[float]) -> bool:
        """Whether the next run would end far after its time, at the pace of the runs so far (`taken`, in seconds)."""
        done = len(taken)
        if done == len(self.expected):
            return False
        slowdown = max(1.0, sum(taken) / sum(self.expected[:done]))
        return sum(taken) + slowdown * self.expected[done] > LATE * max(self.seconds, sum(self.expected))


def check_choice(seconds: float, cap: int) -> None:
    """Raise ValueError unless the time for the runs is a number above 0 and the largest size takes that cap."""
    demo_settings(cap)[0].prefill_tokens(TOKENS)
    if not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"--seconds {seconds:g} is not accepted; accepted: a number above 0, or --tokens")


def expected_seconds(settings: Sequence[RunSettings], tokens: int, speed: Speed) -> list[float]:
    """Seconds that each run over a text of that many tokens takes at a speed."""
    return [_run_seconds(one, tokens, speed) for one in settings]


def choose(speed: Speed, seconds: float, cap: int = CAP, sample_every: int | None = None) -> Plan:
    """The largest size of the ladder whose runs are expected to take at most `seconds`; the smallest if none does.

    Sizes with fewer tokens than `LEAST_CAPS` caps are left out, except the whole demo. `sample_every` replaces that of
    the ladder.
    """
    sizes = [size for size in LADDER if size.tokens >= LEAST_CAPS * cap or size == LADDER[-1]]
    if sample_every is not None:
        sizes = [replace(size, sample_every=sample_every) for size in sizes]
    costs = [expected_seconds(size.settings(cap), size.tokens, speed) for size in sizes]
    plans = [Plan(size, seconds, tuple(cost), sum(costs[-1])) for size, cost in zip(sizes, costs)]
    return next((plan for plan in reversed(plans) if plan.fits), plans[0])


def size_of_records(
    out: Path, loaded: LoadedModel, streams: Callable[[int], TokenStream], cap: int, sample_every: int | None = None
) -> Size | None:
    """The size of the newest demo in the folder `out` that a demo of this cap can resume, None without one.

    `streams` gives the text with a number of tokens; `sample_every` replaces that of the records.

    Raises ValueError if a record in `out` cannot be read.
    """
    for record in reversed(load_records(out) if out.is_dir() else []):
        identity = record.arguments.get("identity")
        if record.status != "complete" or record.arguments.get("command") != "demo" or not identity:
            continue
        every = record.arguments["sample_every"] if sample_every is None else sample_every
        size = Size(record.data["tokens"], every, identity["settings"]["timed_tokens"])
        if identity["settings"]["cap"] != cap:
            continue
        stream = streams(size.tokens)
        if any(identity == run_identity(loaded, stream, one) for one in size.settings(cap)):
            return size
    return None


def _run_seconds(settings: RunSettings, tokens: int, speed: Speed) -> float:
    """Prefill, steps and blocks of one run."""
    prefill = settings.prefill_tokens(tokens)
    decode = tokens - 1 - prefill
    if settings.method == "recompute":
        return speed.window * (1 + math.ceil(decode / settings.sample_every))
    steps = min(decode, settings.timed_tokens or decode)
    block = prompt = speed.block / BLOCK
    if settings.method == "full":
        block *= 1 + FULL_GROWTH * tokens
    elif settings.method == "adaptive-entropy":
        block = prompt = speed.short / ADAPTIVE_SHORT
    elif settings.method.startswith("refresh"):
        block = speed.short / SHORT
    return prefill * prompt + steps * speed.step + (decode - steps) * block
