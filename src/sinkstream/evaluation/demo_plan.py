"""How long the demo will be: the measured speed of the machine, and the size of demo that fits the time."""

import math
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sinkstream.data import TokenStream
from sinkstream.evaluation.backends import open_decoder
from sinkstream.evaluation.decoders import ModuleDecoder, RecomputeDecoder
from sinkstream.evaluation.demo import CAP, SAMPLE_EVERY, TOKENS, demo_settings
from sinkstream.evaluation.record import run_identity
from sinkstream.evaluation.settings import BLOCK_TOKENS, RunSettings
from sinkstream.measure.timing import timed
from sinkstream.models import LoadedModel
from sinkstream.records.records import load_records

SECONDS = 150.0  # for the runs; loading, measuring and drawing come to it
LATE = 1.15  # times that time: runs that would end later are left out
LEAST_CAPS = 4  # a text shorter than four caps says little about eviction
ADAPTIVE_SHORT = 20  # tokens of one forward of the adaptive policy on average, a little less than was counted
FULL_GROWTH = 1 / 7_000  # what attention of the full cache adds to a block, for every token of the text

BLOCK = BLOCK_TOKENS["cpu"]
SHORT = 32  # tokens of one forward of refresh, whose blocks end at its prunes
STEPS, SHORTS, BLOCKS, WINDOWS = 8, 4, 2, 2  # pieces of each kind that are measured, after one step that is not


@dataclass(frozen=True)
class Speed:
    """Mean seconds of the pieces that a demo consists of."""

    step: float  # one token by itself
    # short, block: one forward of `SHORT` and of `BLOCK` tokens, scored
    short: float
    block: float
    window: float  # one window of recompute


def tokens_measured(cap: int) -> int:
    """Tokens of the text that `measure_speed` takes."""
    return cap + 1 + STEPS + SHORTS * SHORT + BLOCKS * BLOCK + 1


@torch.inference_mode()
def measure_speed(loaded: LoadedModel, ids: torch.Tensor, cap: int) -> Speed:
    """Measure the pieces of a demo on the model itself, which takes a few seconds.

    `ids` are at least `tokens_measured(cap)` token ids (tokens,) int64; `cap` is also the window of recompute.
    """
    device = loaded.model.device
    ids = ids.to(device)
    with closing(open_decoder(loaded, RunSettings("strict", cap, timed_tokens=STEPS))) as strict:
        assert isinstance(strict, ModuleDecoder), "the backend hf runs the module of transformers"
        strict.prefill(ids[:cap])
        strict.step(ids[cap : cap + 1])
        means, at = [], cap + 1
        for size, times in ((1, STEPS), (SHORT, SHORTS), (BLOCK, BLOCKS)):
            places = range(at, at + times * size, size)
            pieces = [(ids[i : i + size], ids[i + 1 : i + size + 1]) for i in places]
            means.append(sum(timed(strict.score, *piece, device=device)[1] for piece in pieces) / times)
            at += times * size
    with closing(open_decoder(loaded, RunSettings("recompute", cap))) as recompute:
        assert isinstance(recompute, RecomputeDecoder), "the method recompute has a decoder of its own"
        recompute.skip(ids[:cap])
        targets = slice(cap + 1, cap + WINDOWS + 1)
        _, seconds = timed(recompute.score, ids[cap : cap + WINDOWS], ids[targets], device=device)
    step, short, block = means
    return Speed(step, short, block, seconds / WINDOWS)


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
