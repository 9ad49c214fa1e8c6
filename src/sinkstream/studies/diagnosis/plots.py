"""Pictures of a diagnosis: one of each kind a policy, and the attribution of all of them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sinkstream.records.pairing import common_tokens
from sinkstream.records.records import Record
from sinkstream.registry import Registry
from sinkstream.show.plots import COLOURS, SHADE, new_figure, save
from sinkstream.statistics import AFTER, BLOCK_TOKENS, block_sums
from sinkstream.studies.diagnosis.attribution import PARTS

#: Name -> function (record, control, entry) that returns a figure, or None if there is nothing to draw.
DIAGNOSIS_PICTURES: Registry[Callable[[Record, Record, dict[str, Any]], Any]] = Registry("picture of a diagnosis")
BLACK, ORANGE, SKY, GREEN, RED, BLUE, PINK = COLOURS
GREY = "#b3b3b3"
ZOOM_PERIODS, ZOOM_TOKENS = 6, 512
CLOSE_BEFORE, CLOSE_AFTER = 64, 128  # tokens around an event that are shown one by one
MOST_MARKS = 400  # more prune events would cover the axis
DPI = 96  # the page holds five pictures a policy


def draw_policy(record: Record, control: Record, entry: dict[str, Any], folder: Path, slug: str) -> dict[str, Path]:
    """Draw every registered picture of one policy as PNG files; returns them by name.

    Raises ImportError: matplotlib is not installed.
    """
    paths = {}
    for name, draw in DIAGNOSIS_PICTURES.items():
        figure = draw(record, control, entry)
        if figure is not None:
            paths[name] = save(figure, folder / f"{slug}-{name}.png", DPI)
    return paths


@DIAGNOSIS_PICTURES.register("nll")
def nll_with_marks(record: Record, control: Record, entry: dict[str, Any]) -> Any:
    """NLL over the token index: the whole text in block means, and around one event token by token, prunes marked."""
    figure, (whole, zoom, paired) = new_figure(3, share_x=False, height=7.5)
    runs = ((control, "strict", {"color": GREY, "linewidth": 3.2}), (record, entry["label"], {"color": RED}))
    first, last = _close_up(record)
    for run, name, style in runs:
        index, nll = run.arrays["index"], run.arrays["nll"]
        starts, sums, counts = block_sums(nll, index, BLOCK_TOKENS)
        middles = (starts + np.minimum(starts + BLOCK_TOKENS, index[-1] + 1)) / 2  # the last block may be a shorter one
        whole.plot(middles, sums / counts, label=name, **{"linewidth": 1.2, **style})
        shown = (index >= first) & (index <= last)
        zoom.plot(index[shown], nll[shown], **{"linewidth": 1, **style})
    index, nll, control_nll = common_tokens(record, control)
    shown = (index >= first) & (index <= last)
    paired.vlines(index[shown], 0, (nll - control_nll)[shown], color=BLUE, linewidth=1.8)
    for axis in (zoom, paired):
        _marks(axis, record, first, last, label="prune event" if axis is zoom else None)
    prunes = _ticks(whole, record)
    whole.axvspan(first, last, color=SKY, alpha=0.3, linewidth=0, label="stretch below")
    whole.set(ylabel="NLL (nats per token)", title=f"{entry['label']}: means of {BLOCK_TOKENS} tokens{prunes}")
    zoom.set(ylabel="NLL (nats per token)", title=f"the stretch of {last - first + 1} tokens, one by one")
    paired.set(ylabel="difference (nats per token)", title="the same tokens, NLL of the policy minus NLL of strict")
    paired.axhline(0, color=BLACK, linewidth=0.8)
    paired.set_xlabel("token index in the text")
    _legend(figure)
    return figure


@DIAGNOSIS_PICTURES.register("curve")
def paired_curve(record: Record, control: Record, entry: dict[str, Any]) -> Any:
    """Mean paired NLL difference by distance from the prune event, with its pointwise 95 % band."""
    curves = {name: curve for name, curve in entry["spike"].items() if np.size(curve["lags"]) > 1}
    if not curves:
        return None
    figure, axes = new_figure(len(curves))
    for axis, (name, curve) in zip(axes, curves.items()):
        _draw_curve(axis, curve)
        axis.set_title(f"{entry['label']} minus {name}: mean over {curve['n_events']:,} events, 95 % pointwise band")
    axes[-1].set_xlabel("tokens since the prune event (negative: before the next one)")
    _legend(figure, *axes[0].get_legend_handles_labels())
    return figure


def _legend(figure: Any, *handles_and_labels: Any) -> None:
    """A legend below the panels, in one line."""
    figure.legend(*handles_and_labels, loc="outside lower center", ncols=5, frameon=False, handlelength=3)


def _draw_curve(axis: Any, curve: dict[str, Any]) -> None:
    lags = np.asarray(curve["lags"])
    mean, low, high = (np.asarray(curve[name], dtype=float) for name in ("mean", "low", "high"))
    window = (-0.5, min(AFTER, lags.max() + 1) - 0.5)
    axis.fill_between(lags, low, high, color=BLUE, alpha=0.22, linewidth=0)
    axis.plot(lags, mean, color=BLUE, linewidth=1.6, label="paired difference")
    axis.axhline(0, color=BLACK, linewidth=0.8)
    axis.axvline(-0.5, color=BLACK, linewidth=1.2, linestyle=":", label="prune event")
    axis.axvspan(*window, color=GREEN, alpha=0.08, linewidth=0, label="spike window")
    if curve["level"]["value"] is not None:
        axis.axhline(curve["level"]["value"], color=ORANGE, linewidth=1.4, linestyle="-.", label="level before")
    axis.set_ylabel("NLL difference (nats per token)")


@DIAGNOSIS_PICTURES.register("latency")
def latency_with_marks(record: Record, control: Record, entry: dict[str, Any]) -> Any:
    """Latency of every timed token over the token index, with prune marks."""
    index, milliseconds = record.arrays["index"], 1e3 * record.arrays["seconds"]
    timed = np.isfinite(milliseconds)
    if not timed.any():
        return None
    figure, (axis,) = new_figure(1)
    event = record.arrays["event"]
    axis.plot(index[timed], milliseconds[timed], color=BLUE, linewidth=0.9, label="one token")
    axis.scatter(
        index[timed & event], milliseconds[timed & event], color=RED, s=18, zorder=3, label="step with a prune event"
    )
    _marks(axis, record, index[timed][0], index[timed][-1])
    top = np.quantile(milliseconds[timed], 0.995)
    above = np.count_nonzero(milliseconds[timed] > 1.5 * top)
    axis.set_ylim(0, 1.5 * top if above else None)
    cut = f" ({above} of {timed.sum()} tokens lie above the axis)" if above else ""
    axis.set(xlabel="token index in the text", ylabel="latency (ms per token)")
    axis.set_title(f"{entry['label']}: latency of the timed tokens{cut}")
    _legend(figure)
    return figure


@DIAGNOSIS_PICTURES.register("kv")
def visible_length(record: Record, control: Record, entry: dict[str, Any]) -> Any:
    """Visible KV length over the token index, in a stretch of the text, against the control and the trained length."""
    figure, (axis,) = new_figure(1)
    first, last = _stretch(record)
    for run, name, colour, style in ((control, "strict", BLACK, "--"), (record, entry["label"], RED, "-")):
        index = run.arrays["index"]
        shown = (index >= first) & (index <= last)
        axis.plot(
            index[shown],
            run.arrays["kv_length"][shown],
            color=colour,
            linestyle=style,
            linewidth=1.5,
            drawstyle="steps-post",
            label=name,
        )
    kv, trained = entry["drift"]["kv_length"], record.model["trained_positions"]
    axis.axhline(kv["mean"], color=BLUE, linestyle="-.", linewidth=1.2, label=f"mean {kv['mean']:,.1f}")
    if trained is not None and kv["max"] > 0.8 * trained:
        axis.axhline(trained, color=PINK, linewidth=1.6, linestyle=":", label=f"trained length {trained:,}")
    axis.set(xlabel="token index in the text", ylabel="visible KV length (tokens)")
    axis.set_title(f"{entry['label']}: sees {kv['min']:,} to {kv['max']:,} tokens")
    _legend(figure)
    return figure


@DIAGNOSIS_PICTURES.register("drops")
def drop_histogram(record: Record, control: Record, entry: dict[str, Any]) -> Any:
    """How many tokens each prune step dropped."""
    drops = record.arrays["drop_size"][record.arrays["drop_size"] > 0]
    if not drops.size:
        return None
    figure, (axis,) = new_figure(1, height=2.8)
    width = max(1, int(np.ptp(drops)) // 40)
    edges = np.arange(drops.min() - 0.5, drops.max() + width + 0.5, width)
    axis.hist(drops, bins=edges, color=BLUE, edgecolor="white", linewidth=0.6)
    axis.set(xlabel="tokens dropped in one step", ylabel="steps with a drop (count)")
    axis.set_xlim(0, 1.08 * drops.max() + 1)
    sizes = entry["drift"]["drop_size"]
    axis.set_title(f"{entry['label']}: {drops.size:,} drops, mean {sizes['mean']:.1f}, P99 {sizes['p99']:.0f} tokens")
    return figure


def draw_attribution(entries: Sequence[dict[str, Any]], path: Path) -> Path:
    """Draw the parts of every policy's ΔPPL as bars with 95 % intervals, one group of bars a policy."""
    figure, (axis,) = new_figure(1, height=1.4 + 0.55 * len(entries))
    parts = zip(PARTS.items(), (BLUE, SKY, PINK, RED, ORANGE))
    rows = [("total", "all of it", "white"), *((name, text, colour) for (name, text), colour in parts)]
    for offset, (name, text, colour) in zip(np.linspace(0.35, -0.35, len(rows)), rows):
        edge = {"edgecolor": BLACK, "linewidth": 1} if name == "total" else {}
        for number, entry in enumerate(entries):
            whole = entry["attribution"]
            estimate = whole["total"] if name == "total" else whole["parts"][name]
            y = len(entries) - 1 - number + offset
            label = text if number == 0 else None
            axis.barh(y, 100 * (estimate["value"] or 0), height=0.12, color=colour, label=label, **edge)
            if estimate["low"] is not None:
                axis.plot([100 * estimate["low"], 100 * estimate["high"]], [y, y], color="#555555", linewidth=1)
    for number in range(0, len(entries), 2):
        axis.axhspan(number - 0.5, number + 0.5, color=SHADE, linewidth=0, zorder=0)
    axis.axvline(0, color=BLACK, linewidth=0.8)
    axis.set_yticks(range(len(entries)), [entry["label"] for entry in reversed(entries)])
    axis.set_ylim(-0.6, len(entries) - 0.4)
    note = _spread_out(axis, [100 * abs(entry["attribution"]["total"]["value"] or 0) for entry in entries])
    axis.set_xlabel(f"100 × nats per token, about percent of PPL{note}")
    axis.set_title("ΔPPL against strict, in parts (95 % intervals)")
    figure.legend(loc="outside right upper", frameon=False)
    return save(figure, path, DPI)


def _spread_out(axis: Any, totals: Sequence[float]) -> str:
    """Switch to a symmetric logarithmic scale where one policy would flatten all others; returns a note on it."""
    typical = max(1.0, 2 * float(np.median(totals)))
    if max(totals) < 10 * typical:
        return ""
    axis.set_xscale("symlog", linthresh=typical, linscale=2)
    reach = [typical * step for step in (0.5, 1, 10, 100) if typical * step <= 2 * max(totals)]
    ticks = [*(-x for x in reversed(reach)), 0, *reach]
    low, high = axis.get_xlim()
    ticks = [tick for tick in ticks if low <= tick <= high]
    axis.set_xticks(ticks, [f"{tick:+.3g}" if tick else "0" for tick in ticks], minor=False)
    axis.set_xticks([], minor=True)
    return f" (linear to ±{typical:.2g}, logarithmic beyond)"


def _stretch(record: Record) -> tuple[int, int]:
    """First and last index of a stretch in the middle of the run: some prune periods, or as many tokens as fit."""
    index, events = record.arrays["index"], record.arrays["index"][record.arrays["event"]]
    typical = float(np.median(np.diff(events))) if events.size > 1 else ZOOM_TOKENS
    length = int(min(max(ZOOM_PERIODS * typical, 96), max(ZOOM_TOKENS, 3 * typical), index.size))
    begin = (index.size - length) // 2
    return int(index[begin]), int(index[begin + length - 1])


def _close_up(record: Record) -> tuple[int, int]:
    """First and last index of the tokens around the event nearest to the middle of the run."""
    index, events = record.arrays["index"], record.arrays["index"][record.arrays["event"]]
    middle = index[index.size // 2]
    event = events[np.abs(events - middle).argmin()] if events.size else middle
    return int(max(index[0], event - CLOSE_BEFORE)), int(min(index[-1], event + CLOSE_AFTER - 1))


def _ticks(axis: Any, record: Record) -> str:
    """Short marks at the foot of the picture, one a prune event; returns the words for the title."""
    events = record.arrays["index"][record.arrays["event"]]
    if events.size > MOST_MARKS:
        return f", {events.size:,} prune events (too many to mark)"
    axis.vlines(events, 0, 0.05, color=GREEN, linewidth=1.1, transform=axis.get_xaxis_transform())
    return f", {events.size:,} prune events marked at the foot"


def _marks(axis: Any, record: Record, first: int, last: int, label: str | None = "prune event") -> None:
    """Thin lines at the prune events of a stretch; none where they would cover the picture."""
    events = record.arrays["index"][record.arrays["event"]]
    events = events[(events >= first) & (events <= last)]
    if 2 * events.size < last - first:
        for number, event in enumerate(events):
            line = {"color": GREEN, "linestyle": ":", "linewidth": 1.1, "zorder": 0}
            axis.axvline(event - 0.5, label=label if number == 0 else None, **line)
