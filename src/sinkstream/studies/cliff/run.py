"""The cliff: a grid of runs from well under to beyond the trained positions, with growth inside and outside the cap.

Growth outside the cap, as in the published tables, changes two things at once against strict streaming at the same cap:
R tokens are evicted together, and up to cap + R - 1 tokens are visible. Growth inside the cap changes the first only.
All runs of a grid decode the same tokens, so that `studies.cliff.tables` can separate the two token by token.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from sinkstream.evaluation.settings import RunSettings
from sinkstream.policies import CAP_ACCOUNTING

CAPS = (0.25, 0.5, 0.75, 1.0, 1.25)
STRIDES = (128, 1024)
SINK = 4
LEAST_SCORED = 512


def cliff_settings(
    trained: int,
    tokens: int,
    *,
    caps: Sequence[float] = CAPS,
    strides: Sequence[int] = STRIDES,
    positions: Sequence[str] = ("cache", "original"),
    sink: int = SINK,
    block_tokens: int = 256,
) -> list[RunSettings]:
    """The runs of the grid: strict at every cap, and lazy with both cap accountings up to the trained positions.

    Lazy runs whose growth leaves no window inside the cap are left out.

    Parameters
    ----------
    trained : int
        Positions that the model was trained on.
    tokens : int
        Of the text; all runs share one prefill, the most slots that any of them fills.
    caps : sequence of float
        Caps over `trained`.
    strides : sequence of int
        R of the lazy runs.
    positions : sequence of {"cache", "original"}

    Raises ValueError: an option out of range, or a text that leaves fewer than `LEAST_SCORED` tokens, or two times R,
    to score.
    """
    for name, given in (("caps", caps), ("compress-every", strides), ("positions", positions)):
        if not given or len(set(given)) < len(given):
            raise ValueError(f"--{name} {_typed(given)} is not accepted; accepted: one or more, each once")
    if not all(0 < cap <= 16 for cap in caps):
        raise ValueError(f"--caps {_typed(caps)} is not accepted; accepted: above 0 and at most 16 trained lengths")
    if min(strides) < 2:
        raise ValueError(
            f"compress_every={min(strides)} is not accepted; accepted: at least 2 (1 is strict, always run)"
        )
    one = partial(RunSettings, allow_untrained_positions=True, evaluate="blocks", block_tokens=block_tokens)
    settings = []
    for mode in positions:
        for cap in sorted({round(cap * trained) for cap in caps}):
            settings.append(one("strict", cap, {"sink": sink}, positions=mode))
            for stride in strides if cap <= trained else ():
                options = {"sink": sink, "compress_every": stride}
                for accounting in CAP_ACCOUNTING:
                    if sink + CAP_ACCOUNTING[accounting](stride - 1) < cap:
                        settings.append(one("lazy", cap, options, cap_accounting=accounting, positions=mode))
    prefill = max(run.eviction_policy.peak for run in settings)
    needed = prefill + 1 + max(LEAST_SCORED, 2 * max(strides))
    if tokens < needed:
        raise ValueError(
            f"the text has {tokens} tokens and the largest cache of the grid fills {prefill} of them; accepted: at"
            f" least {needed} tokens, or smaller --caps or --compress-every"
        )
    return [replace(run, prefill=prefill) for run in settings]


def _typed(values: Sequence[float | str]) -> str:
    """A list as it is typed on the command line."""
    return ",".join(value if isinstance(value, str) else f"{value:g}" for value in values) or "''"
