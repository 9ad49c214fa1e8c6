"""Configurations and protocol of the benchmark, and the arithmetic of the byte floor."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from sinkstream.cache import describe
from sinkstream.evaluation.settings import RunSettings
from sinkstream.measure.timing import WARMUP_TOKENS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STEADY_TOKENS = 600
CAP = 2052
LEAST_PROMPT = 4096  # random ids that prompts are cut from; repeated beyond
BLOCK_TOKENS = 50_000
SHORTEST_CHUNK = 50  # tokens; 12 of them in the default length, enough for an interval
MOST_CHUNKS = 4000

DEFINITIONS = {
    "tpot": (
        "wall seconds of the steady tokens over their number, host included: every token is chosen on the device (the"
        " likeliest, which a step of the engine finds itself, or the text's next one with its NLL) and appended; the"
        " device is waited for once a chunk; Python's garbage collector passes over what was there before the tokens"
    ),
    "latency": (
        "time between two tokens, CUDA events on a GPU and the clock on a CPU; the first token of every chunk, which"
        " the wait before it delays, is left out"
    ),
    "floor": (
        "weights, the input embedding left out, and the keys and values that a step sees (mean over the steady tokens),"
        " at the copy bandwidth; weights once, however many streams"
    ),
}


@dataclass(frozen=True)
class Protocol:
    """What all configurations of a command share.

    Raises ValueError, naming the option, the value and what is accepted.
    """

    tokens: int = STEADY_TOKENS  # steady tokens
    warmup: int = WARMUP_TOKENS  # tokens decoded before them
    seconds: float | None = None  # time limit of the steady tokens of one configuration; it then has fewer of them
    teacher_forced: bool = False  # feed a text and record its NLL, instead of the likeliest token
    profile: bool = False  # profile a step, kernel by kernel
    prompt_caps: int = 1  # tokens of the prompt, in caps

    def __post_init__(self) -> None:
        if self.tokens < 2:
            raise ValueError(f"tokens={self.tokens} is not accepted; accepted: a whole number of at least 2")
        if self.warmup < 1:
            raise ValueError(f"warmup={self.warmup} is not accepted; accepted: a whole number of at least 1")
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            raise ValueError(f"seconds={self.seconds} is not accepted; accepted: a finite number above 0")

    @property
    def chunk_tokens(self) -> int:
        """Tokens of one turn, between two device synchronisations."""
        return max(SHORTEST_CHUNK, self.tokens // MOST_CHUNKS)


@dataclass(frozen=True)
class BenchConfig:
    """One configuration: a rung, a method with its cap, and how many streams are stepped together."""

    rung: str
    run: RunSettings
    streams: int = 1

    def __post_init__(self) -> None:
        if self.streams < 1:
            raise ValueError(f"streams={self.streams} is not accepted; accepted: whole numbers of at least 1")

    @property
    def label(self) -> str:
        """For people: rung, method, cap and streams."""
        streams = f", {self.streams} streams" if self.streams > 1 else ""
        return f"{self.rung} {self.run.label()}, cap {self.run.cap}{streams}"

    def identity(self) -> dict[str, Any]:
        """JSON-able; equal for equal configurations."""
        return {"rung": self.rung, "streams": self.streams, "run": self.run.record()}


@dataclass(frozen=True)
class Floor:
    """The least that a step can read."""

    weight_bytes: int  # weights that a step reads, the input embedding left out
    kv_token_bytes: int  # bytes of the keys and values of one cached token
    visible_mean: float  # cached tokens that a step sees, on average, the new one included
    streams: int

    @property
    def kv_bytes(self) -> float:
        """Keys and values of all streams."""
        return self.kv_token_bytes * self.visible_mean * self.streams

    @property
    def bytes(self) -> float:
        """All of it: weights once."""
        return self.weight_bytes + self.kv_bytes

    def record(self) -> dict[str, Any]:
        """JSON-able, without the time."""
        return asdict(self) | {"kv_bytes": self.kv_bytes, "bytes": self.bytes}


def kv_token_bytes(model: PreTrainedModel) -> int:
    """Bytes of the keys and values of one cached token."""
    spec = describe(model)
    return 2 * spec.layers * spec.kv_heads * spec.head_dim * spec.dtype.itemsize
