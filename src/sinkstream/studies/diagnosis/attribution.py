"""Attribution: which part of a policy's extra NLL has which cause, so that the parts add up to the whole.

Every token's paired difference, NLL(policy) − NLL(strict at the same cap), is split in three steps. Let f_i(v) be the
NLL of token i under strict streaming that sees v tokens, known from strict runs at several caps and interpolated
linearly between them, token by token; v_i what the policy saw at token i, V the mean of v_i, C the cap of the control.

    NLL_i(policy) − f_i(C)  =  [f_i(V) − f_i(C)]          fewer_tokens: a shorter visible length on average
                             + [f_i(v_i) − f_i(V)]        varying_length: a visible length that varies about its mean
                             + [NLL_i(policy) − f_i(v_i)] what the visible length does not explain

and the last bracket is credited whole to one class of tokens: past_trained (the visible length exceeds the trained
positions), else near_event (in the 32 tokens from an event on), else elsewhere (the choice of tokens kept, lasting
error). Lengths are clipped at the trained positions, so that f holds no loss from untrained positions: that loss is
credited to past_trained. Beyond the shortest or longest strict run f is constant.

Without strict runs at other caps the first two parts cannot be separated from the third; they are then None, with a
reason, and the classes of tokens split the whole difference.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sinkstream.statistics import AFTER, BLOCK_TOKENS, DEFAULT, Bootstrap, Estimate, mean_interval

PARTS = {
    "fewer_tokens": "seeing fewer tokens on average",
    "varying_length": "visible length changing",
    "past_trained": "positions past the trained length",
    "near_event": "tokens near an event",
    "elsewhere": "other tokens",
}


@dataclass(frozen=True)
class Attribution:
    """Parts of the mean paired difference, in nats per token."""

    total: Estimate  # mean of NLL(policy) − NLL(strict); log of the ratio of perplexities
    parts: dict[str, Estimate]  # by the names of `PARTS`; the values that are not None add up to the total
    tokens: dict[str, int]  # how many tokens each class has (past_trained, near_event, elsewhere)
    mean_length: float  # V above
    lengths: list[int]  # caps of the strict runs that f was made of

    def shares(self) -> dict[str, float | None]:
        """Each part over the total; None unless the interval of the total leaves out zero."""
        total, parts = self.total.value, {name: part.value for name, part in self.parts.items()}
        if total is None or not self.total.excludes_zero:
            return dict.fromkeys(parts)
        return {name: None if value is None else value / total for name, value in parts.items()}


def attribute(
    nll: np.ndarray,
    visible: np.ndarray,
    since_event: np.ndarray,
    strict: Mapping[int, np.ndarray],
    *,
    cap: int,
    trained_positions: int | None = None,
    positions: np.ndarray | None = None,
    block_tokens: int = BLOCK_TOKENS,
    bootstrap: Bootstrap = DEFAULT,
) -> Attribution:
    """Split the paired difference of a policy from strict streaming; see the head of this module for the estimator.

    Parameters
    ----------
    nll : (tokens,) float
        The policy's, in nats.
    visible : (tokens,) int
        Tokens that the policy saw when it predicted each.
    since_event : (tokens,) int
        Tokens since its latest event; negative before the first.
    strict : mapping of int to (tokens,) float
        NLL of strict streaming on the same tokens, by cap; has `cap`.
    cap : int
        The control's.
    trained_positions : int or None
        None: unknown, so none is past them.
    positions, block_tokens
        As in `paired_delta_ppl`.

    Raises ValueError: there is no strict run at `cap`.
    """
    if cap not in strict:
        raise ValueError(f"no strict run at cap={cap}; there are: {', '.join(map(str, sorted(strict))) or 'none'}")
    nll, visible = np.asarray(nll, dtype=np.float64), np.asarray(visible)
    control = np.asarray(strict[cap], dtype=np.float64)
    past = np.zeros(len(nll), dtype=bool) if trained_positions is None else visible > trained_positions
    near = (since_event >= 0) & (since_event < AFTER)
    classes = {"past_trained": past, "near_event": near & ~past, "elsewhere": ~near & ~past}
    clipped = visible if trained_positions is None else np.minimum(visible, trained_positions)
    usable = {v: run for v, run in strict.items() if v == cap or trained_positions is None or v <= trained_positions}
    mean_length = float(clipped.mean()) if clipped.size else float(cap)
    explained, values = control, {}
    if len(usable) > 1:
        at_mean = nll_at_length(usable, np.full(len(nll), mean_length))
        explained = nll_at_length(usable, clipped)
        values = {"fewer_tokens": at_mean - control, "varying_length": explained - at_mean}
    elif np.array_equal(clipped, np.full(len(nll), cap)):
        values = dict.fromkeys(("fewer_tokens", "varying_length"), np.zeros(len(nll)))
    values |= {name: np.where(chosen, nll - explained, 0.0) for name, chosen in classes.items()}
    measured = np.isfinite(nll - control - sum(values.values()))

    def mean(value: np.ndarray) -> Estimate:
        return mean_interval(
            np.where(measured, value, np.nan), positions=positions, block_tokens=block_tokens, bootstrap=bootstrap
        )

    unknown = Estimate(reason="needs strict runs at other caps")
    parts = {name: mean(values[name]) if name in values else unknown for name in PARTS}
    tokens = {name: int(np.count_nonzero(chosen & measured)) for name, chosen in classes.items()}
    return Attribution(mean(nll - control), parts, tokens, mean_length, sorted(usable))


def nll_at_length(strict: Mapping[int, np.ndarray], length: np.ndarray) -> np.ndarray:
    """NLL under strict streaming at a visible length of its own for each token, interpolated linearly between runs.

    Parameters
    ----------
    strict : mapping of int to (tokens,) float
        At least two runs, by cap.
    length : (tokens,) float
        Clipped to the range of the caps.

    Returns
    -------
    (tokens,) float
    """
    caps = np.array(sorted(strict))
    runs = np.stack([np.asarray(strict[cap], dtype=np.float64) for cap in caps])
    length = np.clip(length, caps[0], caps[-1])
    upper = np.clip(np.searchsorted(caps, length), 1, len(caps) - 1)
    weight = (length - caps[upper - 1]) / (caps[upper] - caps[upper - 1])
    token = np.arange(len(length))
    return (1 - weight) * runs[upper - 1, token] + weight * runs[upper, token]
