"""How the visible length varies between prunes, what a prune drops, and what it costs in time."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from sinkstream.measure.metrics import kv_length_range
from sinkstream.measure.timing import distribution


def drift(arrays: Mapping[str, np.ndarray], trained_positions: int | None) -> dict[str, Any]:
    """Visible length and drop sizes of a run, from its per-token arrays.

    Returns `kv_length` {min, mean, max, share_past_trained} in tokens, and `drop_size`, a distribution over the drops.
    The share is None without `trained_positions`.
    """
    lengths = arrays["kv_length"][arrays["kv_length"] > 0]
    drops = arrays["drop_size"][arrays["drop_size"] > 0]
    known = lengths.size and trained_positions is not None
    share = float(np.mean(lengths > trained_positions)) if known else None
    kv = {**kv_length_range(lengths), "share_past_trained": share}
    return {"kv_length": kv, "drop_size": distribution(drops, with_max=True)}


def latency(arrays: Mapping[str, np.ndarray], warmup_tokens: int) -> dict[str, Any]:
    """Distributions of the latency after the warm-up, in milliseconds: all steps, steps with an event, the others."""
    milliseconds = 1e3 * np.asarray(arrays["seconds"], dtype=np.float64)[warmup_tokens:]
    event = arrays["event"][warmup_tokens:]
    return {
        "tokens": int(np.isfinite(milliseconds).sum()),
        "all": distribution(milliseconds, with_max=True),
        "event_steps": distribution(milliseconds[event], with_max=True),
        "other_steps": distribution(milliseconds[~event], with_max=True),
    }
