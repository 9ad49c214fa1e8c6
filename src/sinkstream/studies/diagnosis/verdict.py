"""The verdict of a diagnosis, computed: go, or no-go with the part to look at first."""

from collections.abc import Mapping

from sinkstream.show.table import with_interval
from sinkstream.statistics import Estimate, EventCurve, PairedDelta
from sinkstream.studies.diagnosis.attribution import PARTS, Attribution

VERDICTS = {
    "go": "PPL is not shown to be worse than strict streaming's: the interval of ΔPPL does not lie above zero",
    "no-go: spike": "PPL is worse and there is a spike after the events: treat it (overlap, max_drop, refresh)",
    "no-go: drift": "PPL is worse without a spike: look at drift and positions first",
    "undecided": "too little text for an interval",
}


def verdict(delta: PairedDelta, curve: EventCurve, attribution: Attribution) -> dict[str, str]:
    """Apply the criteria of `VERDICTS` by 95 % intervals.

    Returns `outcome`, a key of `VERDICTS`, and `line`, one sentence with the figures.
    """
    if delta.low is None:
        return {"outcome": "undecided", "line": f"undecided: {delta.reason}"}
    figure = f"ΔPPL {with_interval(delta.delta_percent, delta.low, delta.high, 2, unit=' %')}"
    spike = _spike(curve)
    if delta.low <= 0:
        return {"outcome": "go", "line": f"go: {figure} is not shown to be worse than strict; {spike}"}
    if curve.found:
        return {"outcome": "no-go: spike", "line": f"no-go: {figure} and {spike}: treat the spike first"}
    line = f"no-go: {figure}, {spike}: look at drift and positions first; {_largest(attribution.parts)}"
    return {"outcome": "no-go: drift", "line": line}


def _spike(curve: EventCurve) -> str:
    if curve.area.value is None:
        return f"no spike can be told ({curve.area.reason})"
    if curve.area.low is None:
        return f"a spike cannot be told from noise ({curve.area.reason})"
    area = f"area {curve.area.value:+.2f} [{curve.area.low:+.2f}, {curve.area.high:+.2f}] nats"
    peak = f"peak {curve.peak.value:+.3f} [{curve.peak.low:+.3f}, {curve.peak.high:+.3f}] nats"
    return f"{'a spike' if curve.found else 'no spike'} ({peak}, {area})"


def _largest(parts: Mapping[str, Estimate]) -> str:
    known = {name: part.value for name, part in parts.items() if part.value is not None}
    name = max(known, key=lambda part: known[part])
    return f"the largest part is {PARTS[name]} ({100 * known[name]:+.2f} of 100 × nats)"
