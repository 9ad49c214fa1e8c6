"""Adaptive pruning: prune early where the model is unsure, wait where it is sure."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from sinkstream.policies.options import option
from sinkstream.policies.triggers.base import TRIGGERS, Trigger
from sinkstream.registry import Registry

SIGNALS: Registry = Registry("risk signal")


@SIGNALS.register("entropy")
def entropy(log_probs: torch.Tensor) -> torch.Tensor:
    """Entropy of the next-token distribution, in nats.

    Parameters
    ----------
    log_probs : Tensor, (..., vocab), float32
        Log-softmax of the logits.

    Returns
    -------
    Tensor, (...)
        Not a number where a log-probability is not.
    """
    bounded = log_probs.clamp(min=torch.finfo(log_probs.dtype).min)  # 0 times minus infinity is 0 here
    return -(log_probs.exp() * bounded).sum(-1)


@SIGNALS.register("top1")
def top1(log_probs: torch.Tensor) -> torch.Tensor:
    """One minus the probability of the likeliest next token. Axes as in `entropy`."""
    return 1 - log_probs.amax(-1).exp()


class RunningQuantile:
    """A quantile of a stream in constant memory, by stochastic approximation.

    Each value moves the estimate by ``4 * rate * scale`` times (q − [value <= estimate]), where scale is the running
    mean absolute deviation from the estimate (smoothed with the same rate, from 0, this value included). The first
    value is the first estimate. Source: Robbins-Monro; Tierney 1983 for the quantile form.

    Parameters
    ----------
    q : float
        The quantile, in (0, 1).
    rate : float
        Step size, relative to four times the running mean absolute deviation.
    """

    def __init__(self, q: float, rate: float = 0.05):
        self.q, self.rate = q, rate
        self.estimate: float | None = None
        self.scale = 0.0

    def update(self, value: float) -> None:
        if self.estimate is None:
            self.estimate = value
        self.scale += self.rate * (abs(value - self.estimate) - self.scale)
        self.estimate += self.rate * self.scale * (self.q - (value <= self.estimate)) * 4


@dataclass
class _RiskState:
    low: RunningQuantile
    high: RunningQuantile
    risk: float | None = None
    seen_tokens: int = 0


@TRIGGERS.register("adaptive")
@dataclass(frozen=True)
class Adaptive(Trigger):
    """Prune by risk: high risk prunes from adaptive_min gathered tokens on, low risk waits up to adaptive_max.

    The risk signal is smoothed exponentially; above its upper running quantile it is high, below the lower it is low,
    and in between (and during the first 64 tokens) the event comes at adaptive_every. Source: the project's plan.
    """

    warmup_tokens: ClassVar[int] = 64

    adaptive: str | None = option(None, "risk signal that moves prune events", choices=SIGNALS.names)
    adaptive_min: int = option(16, "fewest gathered tokens at which high risk prunes", minimum=1)
    adaptive_every: int = option(32, "gathered tokens at which middling risk prunes", minimum=1)
    adaptive_max: int = option(64, "most gathered tokens that low risk waits for", minimum=1)
    adaptive_quantile: float = option(
        0.75, "upper running quantile of the risk; the lower is its mirror", minimum=0.5, maximum=0.99
    )
    adaptive_smoothing: float = option(0.8, "weight of the past in the smoothed risk", minimum=0.0, maximum=0.999)

    def __post_init__(self):
        super().__post_init__()
        if not self.adaptive_min <= self.adaptive_every <= self.adaptive_max:
            raise ValueError(
                f"adaptive_min={self.adaptive_min}, adaptive_every={self.adaptive_every}, adaptive_max="
                f"{self.adaptive_max} are not accepted; accepted: adaptive_min <= adaptive_every <= adaptive_max"
            )

    @property
    def signal(self) -> str | None:
        return self.adaptive

    @property
    def growth(self) -> int:
        return self.adaptive_max - 1

    @property
    def sure_growth(self) -> int:
        return self.adaptive_min - 1

    def start(self) -> _RiskState:
        return _RiskState(low=RunningQuantile(1 - self.adaptive_quantile), high=RunningQuantile(self.adaptive_quantile))

    def observe(self, state: _RiskState, risk: float) -> None:
        keep = self.adaptive_smoothing
        state.risk = risk if state.risk is None else keep * state.risk + (1 - keep) * risk
        state.low.update(state.risk)
        state.high.update(state.risk)
        state.seen_tokens += 1

    def due(self, over: int, state: _RiskState) -> bool:
        if over >= self.adaptive_max:
            return True
        low, high = state.low.estimate, state.high.estimate
        if state.seen_tokens < self.warmup_tokens or state.risk is None or low is None or high is None:
            return over >= self.adaptive_every
        if state.risk > high:
            return over >= self.adaptive_min
        return state.risk >= low and over >= self.adaptive_every
