"""Figures of single prune events: where they are, unpaired spikes, and how bad the worst events are."""

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
    if not events.size:
        return np.full(len(positions), -1)
    last = np.searchsorted(events, positions, side="right") - 1
    return np.where(last >= 0, positions - events[np.maximum(last, 0)], -1)


def period(events: np.ndarray) -> dict[str, float | int | None]:
    """Tokens from one event to the next: shortest, median, longest; and the number of events."""
    cycles = np.diff(events)
    if cycles.size == 0:
        return {"events": int(events.size), "min": None, "median": None, "max": None}
    figures = {"min": int(cycles.min()), "median": float(np.median(cycles)), "max": int(cycles.max())}
    return {"events": int(events.size), **figures}


def after_events(values: np.ndarray, positions: np.ndarray, events: np.ndarray) -> np.ndarray:
    """The values in the `AFTER` tokens from each event on, (events, tokens) float; NaN from the next event on.

    Parameters as in `event_cycles`.
    """
    lags, table = event_cycles(values, positions, events, before=1)
    return table[:, (lags >= 0) & (lags < AFTER)]


def plain_spikes(nll: np.ndarray, positions: np.ndarray, events: np.ndarray) -> dict[str, Any]:
    """Unpaired figures: maximum, width and area above the median of the NLL (nats) in the window after each event.

    Any window of natural text has a maximum and an area above its median, event or not.

    Returns
    -------
    dict
        `max` (nats), `width` (tokens above the middle between median and maximum) and `area` (nats above the median,
        summed), each as a distribution over the events.
    """
    table = after_events(nll, positions, events)
    table = table[np.isfinite(table).any(axis=1)]
    if table.size == 0:
        return dict.fromkeys(("max", "width", "area"), distribution(np.empty(0), with_max=True))
    largest, median = np.nanmax(table, axis=1), np.nanmedian(table, axis=1)
    above = np.nan_to_num(table, nan=-np.inf) > ((largest + median) / 2)[:, None]
    area = np.nansum(np.maximum(table - median[:, None], 0), axis=1)
    figures = {"max": largest, "width": above.sum(axis=1), "area": area}
    return {name: distribution(values, with_max=True) for name, values in figures.items()}


def extreme_events(difference: np.ndarray, positions: np.ndarray, events: np.ndarray) -> dict[str, Any]:
    """Mean paired difference (nats) in the window after each event, as a distribution; how many exceed `EXTREME_NATS`.

    `extreme` counts the events, `extreme_per_1000_tokens` is the same by length of text.
    """
    table = after_events(difference, positions, events)
    table = table[np.isfinite(table).any(axis=1)]
    means = np.nanmean(table, axis=1) if table.size else np.empty(0)
    extreme = int(np.count_nonzero(means > EXTREME_NATS))
    return {
        "threshold_nats": EXTREME_NATS,
        "mean_nats": distribution(means, with_max=True),
        "extreme": extreme,
        "extreme_per_1000_tokens": 1000 * extreme / len(positions) if len(positions) else None,
    }
