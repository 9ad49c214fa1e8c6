"""How near the engine's half-precision runs are to the float32 path on the same tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sinkstream.engine import STEPS
from sinkstream.records.pairing import common_places
from sinkstream.records.records import Record
from sinkstream.records.selection import is_plain, same_text_and_model

HALF = ("float16", "bfloat16")
LEAST_TOKENS = 1000


@dataclass(frozen=True)
class Precision:
    """An engine run beside its float32 control."""

    record: Record
    control: Record
    tokens: int
    ppl: float
    control_ppl: float
    relative_error: float  # of the perplexity, on the tokens that both scored; positive where the engine's is higher
    # share of tokens at which both find the same token likeliest; None where a record does not say
    agreement: float | None


def precision_runs(records: Sequence[Record]) -> list[Precision]:
    """For each model, text and policy: the newest half-precision run of the fastest rung that has a float32 control."""
    rungs = STEPS.names()
    latest: dict[tuple, Precision] = {}
    for record in sorted(records, key=lambda r: rungs.index(r.protocol["backend"]) if _is_engine(r) else -1):
        if not _is_engine(record) or record.status != "complete" or record.protocol["dtype"] not in HALF:
            continue
        found = [p for p in (compare(record, c) for c in records if _is_control(c, record)) if p is not None]
        if found:
            key = (record.model["name"], record.data["sha256"], record.policy.get("label"), record.protocol["cap"])
            latest[key] = found[-1]
    return list(latest.values())


def compare(record: Record, control: Record) -> Precision | None:
    """Both on the tokens that both scored; None with fewer than 1,000 of them."""
    found = record.pairs.figure("precision", (record, control), lambda: _figures(record, control))
    return None if found is None else Precision(record, control, **found)


def _figures(record: Record, control: Record) -> dict[str, Any] | None:
    _, here, there = common_places(record, control)
    nll, control_nll = (r.arrays["nll"][at].astype(np.float64) for r, at in ((record, here), (control, there)))
    both = np.isfinite(nll) & np.isfinite(control_nll)
    if both.sum() < LEAST_TOKENS:
        return None
    ppl, control_ppl = (float(np.exp(values[both].mean())) for values in (nll, control_nll))
    agreement = _agreement(record, control, here, there)
    error = ppl / control_ppl - 1
    figures = {"tokens": int(both.sum()), "ppl": ppl, "control_ppl": control_ppl}
    return {**figures, "relative_error": error, "agreement": agreement}


def _agreement(record: Record, control: Record, here: np.ndarray, there: np.ndarray) -> float | None:
    if "top1" not in record.arrays or "top1" not in control.arrays:
        return None
    own, other = record.arrays["top1"][here], control.arrays["top1"][there]
    known = (own >= 0) & (other >= 0)
    return float((own == other)[known].mean()) if known.any() else None


def _is_engine(record: Record) -> bool:
    return record.protocol["backend"] in STEPS


def _is_control(control: Record, record: Record) -> bool:
    protocol = control.protocol
    return (
        control.status == "complete"
        and (protocol["backend"], protocol["dtype"]) == ("hf", "float32")
        and not protocol["tf32"]
        and same_text_and_model(control, record)
        and is_plain(control) == is_plain(record)
        and control.policy["name"] == record.policy["name"]
        and control.policy["options"] == record.policy["options"]
        and protocol["cap"] == record.protocol["cap"]
    )
