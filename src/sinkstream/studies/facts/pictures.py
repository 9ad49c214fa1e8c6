"""The picture of right answers by distance, one line a policy."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from sinkstream.show.plots import COLOURS, line_formats, new_figure, save
from sinkstream.statistics import Estimate

CHANCE = 10  # answers that there are to choose from


def draw_shares(
    places: Sequence[float],
    names: Sequence[str],
    lines: Iterable[tuple[str, Sequence[Estimate]]],
    path: Path | str,
    *,
    xlabel: str,
    title: str,
) -> Path:
    """Draw shares of right answers with their intervals; writes a PNG atomically.

    Parameters
    ----------
    places, names : sequence
        The distances, and how the axis names them.
    lines : iterable of (str, sequence of Estimate)
        A policy's label and its share at every distance; shares without a value are left out.

    Raises ImportError: matplotlib is not installed.
    """
    figure, (axis,) = new_figure(1)
    for (label, shares), style in zip(lines, line_formats()):
        known = [(place, s.value, s.low, s.high) for place, s in zip(places, shares) if s.value is not None]
        if known:
            at, *percent = np.array(known).T * np.array([[1], [100], [100], [100]])
            axis.plot(at, percent[0], label=label, marker="o", **style)
            axis.vlines(at, percent[1], percent[2], color=style["color"])
    axis.axhline(100 / CHANCE, color=COLOURS[0], linewidth=1, linestyle=":")
    axis.set_xscale("log")
    axis.set_xticks(places, names)
    axis.minorticks_off()
    axis.set_ylim(0, 102)
    axis.set_xlabel(xlabel)
    axis.set_ylabel("right answers (%)")
    axis.set_title(title)
    figure.legend(loc="outside right upper", frameon=False, handlelength=4)
    return save(figure, path)
