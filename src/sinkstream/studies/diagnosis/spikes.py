"""Figures of single prune events: where they are, the plan's plain ones, and how bad the worst are."""

from typing import Any

import numpy as np

from sinkstream.measure.timing import distribution
from sinkstream.records.records import Record
from sinkstream.statistics import AFTER, event_cycles

EXTREME_NATS = 0.1


def event_positions(record: Record) -> np.ndarray:
    """Positions in the text, (events,) int, of the first token predicted after each prune event."""
    return record.arrays["index"][record.arrays["event"]].astype(np.int64)


def tokens_since_event(positions: np.ndarray, events: np.ndarray) -> np.ndarray:
    """Tokens since the latest event, (tokens,) int; -1 before the first one."""
    last = np.searchsorted(events, positions, side="right") - 1
    return (
        np.where(last >= 0, positions - events[np.maximum(last, 0)], -1) if events.size else np.full(len(positions), -1)
    )


def period(events: np.ndarray) -> dict[str, float | int | None]:
    """Tokens from one event to the next: shortest, median, longest; and the number of events."""
    cycles = np.diff(events)
    if cycles.size == 0:
        return {"events": int(events.size), "min": None, "median": None, "max": None}
    figures = {"min": int(cycles.min()), "median": float(np.median(cycles)), "max": int(cycles.max())}
    return {"events": int(events.size), **figures}


def plain_spikes(nll: np.ndarray, positions: np.ndarray, events: np.ndarray, window: int = AFTER) -> dict[str, Any]:
    """The plan's figures: maximum, width and area above the median of the NLL in a window after each event.

    They are not paired: any window of natural text has a maximum and an area above its median, event or not.

    Parameters
    ----------
    nll : (tokens,) float
        In nats.
    positions, events
        As in `event_cycles`.
    window : int, default=32
        Tokens from the event on; it ends early at the next event.

    Returns
    -------
    dict
        `max` (nats), `width` (tokens above the middle between median and maximum) and `area` (nats above the median,
        summed), each as a distribution over the events.
    """
    lags, table = event_cycles(nll, positions, events, before=1)
    table = table[:, (lags >= 0) & (lags < window)]
    table = table[np.isfinite(table).any(axis=1)]
    if table.size == 0:
        return dict.fromkeys(("max", "width", "area"), distribution(np.empty(0), with_max=True))
    largest, median = np.nanmax(table, axis=1), np.nanmedian(table, axis=1)
    above = np.nan_to_num(table, nan=-np.inf) > ((largest + median) / 2)[:, None]
    area = np.nansum(np.maximum(table - median[:, None], 0), axis=1)
    figures = {"max": largest, "width": above.sum(axis=1), "area": area}
    return {name: distribution(values, with_max=True) for name, values in figures.items()}


def extreme_events(
    difference: np.ndarray, positions: np.ndarray, events: np.ndarray, window: int = AFTER
) -> dict[str, Any]:
    """Mean paired difference over the window after each event, as a distribution, and how many are extreme.

    Returns
    -------
    dict
        `mean_nats`: distribution over the events. `extreme`: how many events exceed `EXTREME_NATS`;
        `extreme_per_1000_tokens`: the same by length of text.
    """
    lags, table = event_cycles(difference, positions, events, before=1)
    table = table[:, (lags >= 0) & (lags < window)]
    table = table[np.isfinite(table).any(axis=1)]
    means = np.nanmean(table, axis=1) if table.size else np.empty(0)
    extreme = int(np.count_nonzero(means > EXTREME_NATS))
    per_1000 = 1000 * extreme / len(positions) if len(positions) else None
    return {
        "threshold_nats": EXTREME_NATS,
        "mean_nats": distribution(means, with_max=True),
        "extreme": extreme,
        "extreme_per_1000_tokens": per_1000,
    }
