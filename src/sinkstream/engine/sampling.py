"""Choosing the next token on the device: bias, penalties, temperature, top-k, top-p, min-p, in this order.

The order and the meaning of each option are those of transformers' logits processors; those of the presence and the
frequency penalty, which transformers does not have, are those of OpenAI's API.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from sinkstream.kernels import likeliest

GREEDY_TEMPERATURE = 0.0

NO_TOKEN = -1  # drawn where the logits are no distribution; the step takes the likeliest token in its place


@dataclass(frozen=True)
class Sampler:
    """How tokens are drawn.

    Attributes
    ----------
    temperature : float, default=0.0
        0 takes the likeliest token.
    top_k : int or None
        Keep the k likeliest tokens.
    top_p : float or None
        Keep the smallest set of likeliest tokens that holds this much probability.
    min_p : float or None
        Keep tokens at least this likely relative to the likeliest.
    repetition_penalty : float, default=1.0
        Logits of tokens seen before are divided by it where positive and multiplied where negative
        (Keskar et al., arXiv:1909.05858).
    presence_penalty, frequency_penalty : float, default=0.0
        Subtracted from the logits of tokens that were generated before: once, and once for each time.
    logit_bias : mapping of int to float
        Added to the logits of these token ids; -inf forbids a token.

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
        _check("temperature", self.temperature, self.temperature >= 0, "a number of at least 0 (0 is greedy)")
        whole = self.top_k is None or (isinstance(self.top_k, int) and self.top_k >= 1)
        _check("top_k", self.top_k, whole, "a whole number of at least 1")
        _check("top_p", self.top_p, self.top_p is None or 0 < self.top_p <= 1, "a number above 0, at most 1")
        _check("min_p", self.min_p, self.min_p is None or 0 <= self.min_p <= 1, "a number from 0 to 1")
        _check("repetition_penalty", self.repetition_penalty, self.repetition_penalty > 0, "a number above 0")
        for name in ("presence_penalty", "frequency_penalty"):
            _check(name, getattr(self, name), abs(getattr(self, name)) < float("inf"), "a finite number")
        ids = all(isinstance(t, int) and t >= 0 for t in self.logit_bias)
        right = ids and all(bias < float("inf") for bias in self.logit_bias.values())  # NaN is refused too
        _check("logit_bias", self.logit_bias, right, "token ids and numbers, or -inf to forbid a token")
        if self.greedy and any(o is not None for o in (self.top_k, self.top_p, self.min_p)):
            raise ValueError("top_k, top_p and min_p change nothing at temperature=0; give a temperature above 0")

    @classmethod
    def of(cls, options: dict[str, Any]) -> "Sampler":
        """The sampler with these options. Raises ValueError also for a name that is no option."""
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
        return self.greedy and not (self.remembers or self.counts or self.logit_bias)

    @property
    def remembers(self) -> bool:
        """Whether tokens seen before matter."""
        return self.repetition_penalty != 1.0

    @property
    def counts(self) -> bool:
        """Whether it matters how often tokens were generated before."""
        return bool(self.presence_penalty or self.frequency_penalty)

    def process(
        self, logits: torch.Tensor, seen: torch.Tensor | None = None, counts: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits of the distribution that is drawn from; -inf for what cannot be drawn.

        Parameters
        ----------
        logits : Tensor, (streams, vocab)
        seen : Tensor or None, (streams, vocab), bool
            Tokens that appeared before; needed with a repetition penalty.
        counts : Tensor or None, (streams, vocab), whole numbers
            How often tokens were generated before; needed with a presence or frequency penalty.

        Returns
        -------
        Tensor, (streams, vocab), float32
        """
        logits = logits.float()
        if self.logit_bias:
            logits = logits + self._bias(logits.shape[-1], logits.device)
        if self.remembers:
            if seen is None:
                raise ValueError(f"repetition_penalty={self.repetition_penalty} needs `seen`, the tokens seen before")
            punished = torch.where(logits < 0, logits * self.repetition_penalty, logits / self.repetition_penalty)
            logits = torch.where(seen, punished, logits)
        if self.counts:
            if counts is None:
                raise ValueError("a presence or frequency penalty needs `counts`, how often tokens were generated")
            logits = logits - self.frequency_penalty * counts - self.presence_penalty * (counts > 0)
        if self.greedy:
            return logits
        logits = logits / self.temperature
        if self.top_k is not None:
            lowest = logits.topk(min(self.top_k, logits.shape[-1])).values[..., -1:]
            logits = logits.masked_fill(logits < lowest, float("-inf"))
        if self.top_p is not None:
            logits = _keep_top_p(logits, self.top_p)
        if self.min_p is not None:
            probabilities = logits.softmax(-1)
            unlikely = probabilities < self.min_p * probabilities.amax(-1, keepdim=True)
            logits = logits.masked_fill(unlikely, float("-inf"))
        return logits

    def _bias(self, vocab: int, device: torch.device) -> torch.Tensor:
        """The bias of every token, (vocab,) float32 on the device; made once."""
        if (vocab, device) not in self._biases:
            if max(self.logit_bias) >= vocab:
                raise ValueError(f"logit_bias for token {max(self.logit_bias)}; accepted: 0 to {vocab - 1}")
            bias = torch.zeros(vocab)
            bias[list(self.logit_bias)] = torch.tensor(list(self.logit_bias.values()), dtype=torch.float32)
            self._biases[vocab, device] = bias.to(device)
        return self._biases[vocab, device]

    @cached_property
    def _biases(self) -> dict[tuple[int, torch.device], torch.Tensor]:
        return {}

    def draw(
        self,
        logits: torch.Tensor,
        seen: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        counts: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Next token of every stream, ``(streams,)`` int64; nothing is sent to the host. Arguments as in `process`.

        `NO_TOKEN` where a logit is NaN or plus infinity: then there is no distribution to draw from.
        """
        logits = self.process(logits, seen, counts)
        if self.greedy:
            return likeliest(logits)
        probabilities = logits.softmax(-1)
        races = torch.empty_like(probabilities).exponential_(generator=generator)
        first = (probabilities / races).max(-1)  # of exponential races, one a token
        return torch.where(first.values.isnan(), NO_TOKEN, first.indices)


def _keep_top_p(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    ascending, order = logits.sort(dim=-1)
    drop = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
    drop[..., -1:] = False
    return logits.masked_fill(drop.scatter(-1, order, drop), float("-inf"))


def _check(option: str, value, right: bool, accepted: str) -> None:
    if not right:
        raise ValueError(f"{option}={value!r} is not accepted; accepted: {accepted}")
