"""How tokens are drawn: the options of a stream, and their rows in the table that a step reads on the device.

The order is that of transformers' logits processors: biases, penalties, temperature, top-k, top-p, min-p.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from sinkstream.kernels.fixed_point import LIMIT, ONE
from sinkstream.kernels.layout import DRAWN, LIKELIEST
from sinkstream.kernels.runtime import to_device
from sinkstream.kernels.sample import Draws, SampleBuffers, SampleKernels
from sinkstream.kernels.sample_table import PLAIN, PROMPT, RACE, THRESHOLD, SampleTable
from sinkstream.policies.options import plain

GREEDY_TEMPERATURE = 0.0
# of a temperature of 1e-7, which only ties tell from a lower one: keys of logits up to 8,192 then stay below 2^61,
# where kernels and twins cut them, so that all would be alike
LARGEST_SCALE = 2.0**48
# of a step's float32: whatever a step multiplies, divides and adds up stays finite, and 0 times a penalty is no NaN
LARGEST, LARGEST_RATIO = 1e30, 1e6
LARGEST_TOP_K = 1 << 30  # more tokens than any vocabulary has


@dataclass(frozen=True)
class Sampler:
    """How tokens are drawn.

    Attributes
    ----------
    temperature : float, default=0.0
        0 takes the likeliest token; so does what is above 0 and below 1e-7, where no logits are equal.
    top_k : int or None
        Keep the k likeliest tokens, and those that are as likely as the last of them.
    top_p : float or None
        Keep the smallest set of likeliest tokens that holds this much probability: a token stays exactly if the tokens
        that are likelier hold less. Equally likely tokens stay together.
    min_p : float or None
        Keep tokens at least this likely relative to the likeliest.
    repetition_penalty : float, default=1.0
        Logits of tokens seen before, in the prompt or drawn, are divided by it where positive and multiplied where
        negative (Keskar et al., arXiv:1909.05858).
    presence_penalty, frequency_penalty : float, default=0.0
        Subtracted from the logits of tokens drawn before, once, and once for each time (as in OpenAI's API).
    logit_bias : mapping of float by int
        Added to the logits of these token ids; minus infinity forbids a token.

    Raises
    ------
    ValueError
        Naming the option, the value and what is accepted.
    """

    temperature: float = GREEDY_TEMPERATURE
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self):
        for f in fields(self):
            object.__setattr__(self, f.name, plain(getattr(self, f.name)))
        if isinstance(self.logit_bias, Mapping):
            biases = {plain(token): plain(value) for token, value in self.logit_bias.items()}
            object.__setattr__(self, "logit_bias", biases)
        t, p, m, r = self.temperature, self.top_p, self.min_p, self.repetition_penalty
        _check("temperature", t, _within(t, 0, LARGEST), f"a number from 0 (greedy) to {LARGEST:g}")
        _check("top_k", self.top_k, self.top_k is None or _is_whole(self.top_k, 1), "a whole number of at least 1")
        _check("top_p", p, p is None or (_within(p, 0, 1) and p > 0), "a number above 0, at most 1")
        _check("min_p", m, m is None or _within(m, 0, 1), "a number from 0 to 1")
        within = _within(r, 1 / LARGEST_RATIO, LARGEST_RATIO)
        _check("repetition_penalty", r, within, f"a number from {1 / LARGEST_RATIO:g} to {LARGEST_RATIO:g}")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _check(name, value, _within(value, -LARGEST, LARGEST), f"a number from {-LARGEST:g} to {LARGEST:g}")
        _check("logit_bias", self.logit_bias, isinstance(self.logit_bias, Mapping), "numbers by token id")
        lowest = torch.finfo(torch.float32).min
        for token, bias in self.logit_bias.items():
            _check("logit_bias", {token: bias}, _is_whole(token, 0), "token ids, whole numbers from 0")
            within = _within(bias, lowest, LARGEST) or bias == -math.inf
            accepted = f"a number from {lowest:.2g} to {LARGEST:g}, or minus infinity, for each token id"
            _check("logit_bias", {token: bias}, within, accepted)
        if self.greedy and any(o is not None for o in (self.top_k, self.top_p, self.min_p)):
            raise ValueError("top_k, top_p and min_p change nothing at temperature=0; give a temperature above 0")

    @classmethod
    def of(cls, options: dict[str, Any]) -> "Sampler":
        """The sampler with these options. Raises ValueError for an unknown option, too."""
        unknown = sorted(set(options) - set(cls.__dataclass_fields__))
        if unknown:
            raise ValueError(f"unknown option {unknown[0]!r}; accepted: {', '.join(cls.__dataclass_fields__)}")
        return cls(**options)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature == GREEDY_TEMPERATURE

    @property
    def bare(self) -> bool:
        """Whether the likeliest token of the logits as they are is taken, which a step does by itself."""
        return self.greedy and not self.kernels.tables

    @property
    def kernels(self) -> SampleKernels:
        """What a draw needs."""
        nucleus = self.top_p is not None and self.top_p < 1
        penalties = self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0
        return SampleKernels(
            thresholds=(self.top_k is not None) + nucleus,
            tops=self.top_k is not None or nucleus or bool(self.min_p),
            tables=penalties or bool(self.logit_bias),
        )

    def check_vocab(self, vocab: int) -> None:
        """Raise ValueError if a biased token is none of `vocab`, or no token of them is left."""
        for token, bias in self.logit_bias.items():
            _check("logit_bias", {token: bias}, token < vocab, f"token ids from 0 to {vocab - 1}")
        if sum(bias == -math.inf for bias in self.logit_bias.values()) == vocab:
            raise ValueError(f"logit_bias forbids each of the {vocab} tokens; accepted: one that leaves a token")

    def write(self, table: SampleTable, stream: int, seed: int, prompt: torch.Tensor | None = None) -> None:
        """Fill the rows of a stream.

        Parameters
        ----------
        table : SampleTable
            With counts and biases, if the sampler needs these.
        seed : int
            Of the stream's random numbers, modulo 2^64.
        prompt : Tensor, (tokens,), int64, or None
            Tokens seen before.
        """
        table.clear(stream)
        scale = 0.0 if self.greedy else min(ONE / math.log(2) / self.temperature, LARGEST_SCALE)
        kind = PLAIN if self.greedy else THRESHOLD if self.kernels.tops else RACE
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        top_k = min(self.top_k or 0, LARGEST_TOP_K)
        lowest = min(LIMIT, int(-math.log2(self.min_p) * ONE)) if self.min_p else LIMIT
        table.fill(stream, [scale, self.top_p or 1.0, *penalties], [kind, top_k, lowest, _signed(seed)])
        if self.kernels.tables and table.counts is not None and table.bias is not None:
            if prompt is not None:
                table.counts[stream, prompt] = PROMPT
            if self.logit_bias:
                ids = torch.tensor(list(self.logit_bias), device=table.bias.device)
                table.bias[stream, ids] = torch.tensor(list(self.logit_bias.values()), device=table.bias.device)


@dataclass(frozen=True)
class StreamSampler:
    """How one stream draws: its options, its seed, and the tokens seen before, ``(tokens,)`` int64 on any device."""

    sampler: Sampler
    seed: int
    prompt: torch.Tensor | None = None


class SamplingState:
    """How the streams of an engine draw, in buffers whose addresses never change; these are made when first needed.

    Parameters
    ----------
    streams, vocab : int
    device : torch.device

    Attributes
    ----------
    draws : Draws or None
        What a step needs to draw; None while every stream takes the likeliest token of its logits.
    marks : Tensor, (streams,), int64
        `DRAWN` or `LIKELIEST`.
    version : int
        Changes whenever `marks` does.
    """

    def __init__(self, streams: int, vocab: int, device: torch.device):
        self.streams, self.vocab, self.device = streams, vocab, device
        self.version = 0
        self.draws: Draws | None = None
        self._marks = [LIKELIEST] * streams
        with torch.inference_mode(False):
            self.marks = torch.full((streams,), LIKELIEST, device=device)
        self._buffers: SampleBuffers | None = None
        self._table: SampleTable | None = None
        self._samplers: dict[int, Sampler] = {}

    @property
    def kernels(self) -> SampleKernels | None:
        """What the draws of all streams need; a captured step serves these and no others."""
        return None if self.draws is None else self.draws.kernels

    @contextmanager
    def using(self, samplers: Mapping[int, StreamSampler]) -> Iterator[None]:
        """Have streams draw so while the context lasts; the others draw as they did."""
        try:
            for stream, one in samplers.items():
                self.begin(stream, one)
            yield
        finally:
            for stream in samplers:
                self.end(stream)

    def end(self, stream: int) -> None:
        """Have a stream take the likeliest token of its logits from now on."""
        if self._samplers.pop(stream, None) is not None:
            self._changed()

    @torch.no_grad()
    def begin(self, stream: int, one: StreamSampler) -> None:
        """Have a stream draw so from now on. Raises ValueError if a biased token is none of the vocabulary."""
        one.sampler.check_vocab(self.vocab)
        self._samplers.pop(stream, None)
        if not one.sampler.bare:
            with torch.inference_mode(False):
                if self._table is None:
                    self._table = SampleTable.empty(self.streams, self.device)
                    self._buffers = SampleBuffers(self.streams, self.vocab, self.device)
                if one.sampler.kernels.tables:
                    self._table.remember(self.vocab)
                one.sampler.write(self._table, stream, one.seed, one.prompt)
            self._samplers[stream] = one.sampler
        self._changed()

    def _changed(self) -> None:
        marks = [DRAWN if s in self._samplers else LIKELIEST for s in range(self.streams)]
        if marks != self._marks:
            self.marks.copy_(to_device(torch.tensor(marks), self.device))
            self._marks, self.version = marks, self.version + 1
        self.draws = None
        if self._samplers and self._table is not None and self._buffers is not None:
            kernels = SampleKernels()
            for sampler in self._samplers.values():
                kernels |= sampler.kernels
            self.draws = Draws(self._table, kernels, self._buffers)


def _signed(seed: int) -> int:
    """The int64 of the same 64 bits."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)


def _within(value: Any, least: float, most: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _check(option: str, value, right: bool, accepted: str) -> None:
    if not right:
        raise ValueError(f"{option}={value!r} is not accepted; accepted: {accepted}")
