"""Recall past the window: the curve of a policy, the table and the picture of several policies."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from sinkstream.records.selection import has_model
from sinkstream.show.plots import COLOURS, line_formats, new_figure, save
from sinkstream.show.table import EMPTY, Table, plus_minus
from sinkstream.statistics import DEFAULT, Estimate, mean_interval
from sinkstream.studies.recall.record import RecallRecord

MOST_BANDS = 5
NEAR, FAR = 0.5, 2.0  # distances over cap: inside the window, and past it whatever the policy
LATE = (32, 64)  # tokens of a passage that every chooser has had the time to find
LAYOUT = ("ratios", "passages", "passage_tokens", "seed")  # of the protocol: what records that are pooled share
_NOTE = {"textcoords": "offset points", "fontsize": "small", "color": "#555555"}


class HasPassages(Protocol):
    """A record with the columns of passages: ours, or a rival's."""

    @property
    def passages(self) -> dict[str, np.ndarray]: ...


@dataclass(frozen=True)
class RecallPoint:
    """What a policy recalls at one distance."""

    ratio: float  # distance over cap
    distance: int  # tokens
    gain: Estimate  # nats per token: NLL of the passage when it is new, less its NLL when it was seen that far back


def recall_curve(record: HasPassages) -> list[RecallPoint]:
    """One point a distance, the shortest first; intervals are a bootstrap over passages."""
    passages, points = record.passages, []
    gains = passages["nll_unseen"] - passages["nll_again"]
    for ratio in np.unique(passages["ratio"]):
        at = passages["ratio"] == ratio
        gain = mean_interval(gains[at], block_tokens=1)
        points.append(RecallPoint(float(ratio), int(passages["distance"][at][0]), gain))
    return points


def display_name(record: RecallRecord) -> str:
    """The policy's label, with the status if the record is not complete."""
    label = record.policy["label"]
    return label if record.status == "complete" else f"{label} ({record.status})"


def ratios_of(records: Sequence[HasPassages]) -> list[float]:
    """The distances over cap that the records have, the shortest first."""
    return sorted({ratio for record in records for ratio in record.passages["ratio"].tolist()})


def gains_text(record: HasPassages, ratios: Sequence[float]) -> list[str]:
    """The recall gain at each of these distances, a dash where the record has none."""
    gains = {point.ratio: point.gain for point in recall_curve(record)}
    known = (gains.get(ratio, Estimate()) for ratio in ratios)
    return [plus_minus(gain.value, gain.low, gain.high, 2) for gain in known]


def pooled(records: Sequence[RecallRecord]) -> list[RecallRecord]:
    """One record a policy: the passages of its records on several texts together, which have no common PPL."""
    by_label: dict[str, list[RecallRecord]] = {}
    for record in records:
        by_label.setdefault(display_name(record), []).append(record)
    return [_joined(its) if len(its) > 1 else its[0] for its in by_label.values()]


def _joined(records: Sequence[RecallRecord]) -> RecallRecord:
    shared = set.intersection(*(set(record.passages) for record in records))
    passages = {name: np.concatenate([record.passages[name] for record in records]) for name in shared}
    curves = [record.curve for record in records if record.curve is not None]
    curve = None
    if len(curves) == len(records) and all(one["edges"] == curves[0]["edges"] for one in curves):
        curve = {"edges": curves[0]["edges"], "gains": [row for one in curves for row in one["gains"]]}
    return replace(records[-1], passages=passages, curve=curve, summary={**records[-1].summary, "ppl": None})


def curve_of(record: RecallRecord, first: int, end: int, ratios: Sequence[float]) -> Estimate:
    """Mean gain of the tokens from index `first` to `end` of the passages at some distances; with its interval.

    Without a value where the record has no curve, or none with these two edges.
    """
    curve = record.curve
    if curve is None or not {first, end} <= set(curve["edges"]):
        return Estimate(reason="the record has no such curve")
    edges, gains = np.array(curve["edges"]), np.array(curve["gains"])
    inside = (edges[:-1] >= first) & (edges[1:] <= end)
    at = np.isin(record.passages["ratio"], ratios)
    widths = np.diff(edges)[inside]
    return mean_interval((gains[at][:, inside] * widths).sum(axis=1) / widths.sum(), block_tokens=1)


def recall_table(records: Sequence[RecallRecord], title: str | None = None) -> Table:
    """One row a policy, one column a distance."""
    ratios, rows = ratios_of(records), []
    for record in pooled(records):
        ppl, unseen = record.summary["ppl"], record.passages["nll_unseen"]
        row = [display_name(record), EMPTY if ppl is None else f"{ppl:,.2f}"]
        rows.append([*row, f"{unseen.mean():.2f}" if len(unseen) else EMPTY, *gains_text(record, ratios)])
    header = ["Policy", "PPL", "NLL when new", *(f"{ratio:g} ×" for ratio in ratios)]
    return Table(header, rows, title, [footnote(records)])


def chooser_table(records: Sequence[RecallRecord], title: str | None = None) -> Table:
    """What each chooser gives back: gains, as a share of the window's, late in a passage, and what the frame held."""
    runs = pooled(records)
    ratios, rows = ratios_of(runs), []
    far = [ratio for ratio in ratios if ratio >= FAR]
    for record in runs:
        gains, held = gains_text(record, ratios), record.passages.get("held")
        at = np.isin(record.passages["ratio"], far)
        late = curve_of(record, *LATE, far)
        held_far = np.array([]) if held is None else held[at]
        known = np.isfinite(held_far).any()
        shares = [shared_text(record, ratio) for ratio in far]
        rows.append(
            [
                display_name(record),
                *gains,
                *shares,
                plus_minus(late.value, late.low, late.high, 2),
                f"{100 * np.nanmean(held_far):.0f} %" if known else EMPTY,
            ]
        )
    header = ["Policy", *(f"{ratio:g} ×" for ratio in ratios), *(f"{ratio:g} × as share" for ratio in far)]
    header += [f"tokens {LATE[0]}–{LATE[1] - 1}, from {FAR:g} ×", "Brought back"]
    return Table(header, rows, title, [chooser_footnote(runs)])


def curve_table(records: Sequence[RecallRecord], title: str | None = None) -> Table:
    """Gain by token index inside the passage, past the window: how soon a passage is found again."""
    runs = [record for record in pooled(records) if record.curve is not None]
    edges = list(dict.fromkeys(edge for record in runs if record.curve for edge in record.curve["edges"]))
    bands, rows = list(itertools.pairwise(sorted(edges))), []
    for record in runs:
        far = [ratio for ratio in ratios_of([record]) if ratio >= FAR]
        gains = (curve_of(record, first, end, far) for first, end in bands)
        rows.append([display_name(record), *(plus_minus(gain.value, gain.low, gain.high, 2) for gain in gains)])
    header = ["Policy", *(f"{first}–{end - 1}" for first, end in bands)]
    note = (
        f"Recall gain in nats per token, by the index of the token in the passage, distances from {FAR:g} × the cap on."
    )
    return Table(header, rows, title, [note])


def has_recall(records: Sequence[RecallRecord]) -> bool:
    """Whether any of the records is of a policy with recall."""
    return any(np.isfinite(record.passages.get("held", np.array([np.nan]))).any() for record in records)


def shared_text(record: RecallRecord, ratio: float) -> str:
    """The gain at a distance as a share of the same policy's at 0.5 ×, in percent with its interval."""
    gains, ratios = record.passages["nll_unseen"] - record.passages["nll_again"], record.passages["ratio"]
    share = share_of(gains[ratios == ratio], gains[ratios == NEAR])
    if share.value is None or share.low is None or share.high is None:
        return EMPTY
    return f"{100 * share.value:.0f} % [{100 * share.low:.0f}, {100 * share.high:.0f}]"


def share_of(far: np.ndarray, near: np.ndarray) -> Estimate:
    """Mean of `far` (n,) over the mean of `near` (m,), with a 95 % bootstrap interval; both are resampled."""
    if not len(far) or not len(near) or near.mean() <= 0:
        return Estimate(reason="a distance is missing, or nothing is recalled inside the window")
    rng = np.random.default_rng(DEFAULT.seed)
    draws = [x[rng.integers(0, len(x), (DEFAULT.resamples, len(x)))].mean(axis=1) for x in (far, near)]
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = draws[0] / draws[1]
    tail = 50 * (1 - DEFAULT.confidence)
    low, high = np.nanpercentile(shares, [tail, 100 - tail])
    return Estimate(float(far.mean() / near.mean()), float(low), float(high))


def chooser_footnote(records: Sequence[RecallRecord]) -> str:
    """What a reader must know to read the table of choosers."""
    return (
        f"{footnote(records)} As share: of the same policy's gain at {NEAR:g} ×, inside its window. Brought back: share"
        f" of the tokens of a passage whose first occurrence recall held when they were predicted, from {FAR:g} × on."
    )


def footnote(records: Sequence[RecallRecord]) -> str:
    """What a reader must know to read the table."""
    protocol = records[0].protocol
    return (
        f"Recall gain in nats per token, by distance in multiples of the cap ({protocol['cap']:,} slots): mean NLL of a"
        f" passage of {protocol['passage_tokens']} tokens that is new, less its NLL when it was seen that far back;"
        f" {protocol['passages']} passages a distance, ± half of the 95 % bootstrap interval over passages. 0 ="
        " forgotten. PPL is that of the stream without repetitions. The full cache is shown where it fits the trained"
        " positions."
    )


def draw_recall(records: Sequence[RecallRecord], path: Path | str, *, title: str | None = None) -> Path:
    """Draw recall gain over distance / cap, one line a policy, with its 95 % interval; writes a PNG atomically.

    Up to `MOST_BANDS` lines have bands; more have bars instead and stand a little apart.

    Raises ValueError: no records. Raises ImportError: matplotlib is not installed.
    """
    if not records:
        raise ValueError("no recall records to draw")
    figure, (axis,) = new_figure(1)
    records = pooled(records)
    for number, (record, style) in enumerate(zip(records, line_formats())):
        shift = None if len(records) <= MOST_BANDS else 2 ** (0.3 * (number / (len(records) - 1) - 0.5))
        _draw_curve(axis, record, style, shift)
    ticks = ratios_of(records)
    axis.axhline(0, color=COLOURS[0], linewidth=1)
    axis.axvline(1, color="#777777", linewidth=1.2, linestyle=":")
    axis.annotate("cap: the window ends", (1, 1), xycoords=("data", "axes fraction"), xytext=(4, -4), va="top", **_NOTE)
    axis.set_xscale("log")
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel(f"distance between the two occurrences (× cap of {records[0].protocol['cap']:,} slots)")
    axis.set_ylabel("recall gain (nats per token)")
    axis.set_title(title or f"{records[0].model['name']} on {records[0].data['name']}")
    figure.legend(loc="outside right upper", frameon=False, handlelength=4)
    return save(figure, path)


def _draw_curve(axis: Any, record: RecallRecord, style: dict[str, Any], shift: float | None) -> None:
    """One policy's line, its intervals as a band, or as bars where the line is moved sideways by a factor `shift`."""
    curve = recall_curve(record)
    ratios, gains = [(shift or 1.0) * point.ratio for point in curve], [point.gain.value for point in curve]
    axis.plot(ratios, gains, label=display_name(record), marker="o", markersize=4, **style)
    known = [(x, p.gain.low, p.gain.high) for x, p in zip(ratios, curve) if p.gain.low is not None]
    if known and shift is None:
        axis.fill_between(*zip(*known), color=style["color"], alpha=0.13, linewidth=0)
    elif known:
        axis.vlines(*zip(*known), color=style["color"], linewidth=1)


def by_layout(records: Sequence[RecallRecord], ratio: float) -> list[list[RecallRecord]]:
    """Records with passages at a distance, those of one layout together; the layout of the newest record is last."""
    layouts: dict[str, list[RecallRecord]] = {}
    for record in records:
        if ratio in record.passages["ratio"]:
            layout = str([record.protocol[name] for name in LAYOUT])
            layouts[layout] = [*layouts.pop(layout, []), record]
    return list(layouts.values())


def select_layouts(records: Sequence[RecallRecord], *, model: str, cap: int, ratio: float) -> list[list[RecallRecord]]:
    """As `select_recalls` with `pooled_at`, for every layout that has passages at a distance, the newest last."""
    return [_newest(layout) for layout in by_layout(_complete(records, model, cap), ratio)]


def select_recalls(
    records: Sequence[RecallRecord], *, model: str, cap: int, pooled_at: float | None = None
) -> list[RecallRecord]:
    """The newest complete record of each policy of a model at a cap, full cache first.

    On the streams with the most policies, the newest of equals, of those on which nothing was recalled if there are
    any; or with `pooled_at`, of all texts with the layout of the newest record that has passages at that distance.
    """
    if pooled_at is not None:
        return next(reversed(select_layouts(records, model=model, cap=cap, ratio=pooled_at)), [])
    runs = _complete(records, model, cap)
    recalled = {record.data["sha256"] for record in runs if "recall" in record.policy["options"]}
    plain = [record for record in runs if record.data["sha256"] not in recalled] or runs
    streams: dict[str, set[str]] = {}
    for record in reversed(plain):
        streams.setdefault(record.data["sha256"], set()).add(record.label)
    fullest = max(streams, key=lambda sha256: len(streams[sha256]), default=None)
    return _newest([record for record in plain if record.data["sha256"] == fullest])


def _complete(records: Sequence[RecallRecord], model: str, cap: int) -> list[RecallRecord]:
    return [r for r in records if r.status == "complete" and has_model(r, model) and r.protocol["cap"] == cap]


def _newest(records: Sequence[RecallRecord]) -> list[RecallRecord]:
    """The newest record of each policy and text, full cache first."""
    newest = {(record.policy["label"], record.data["name"]): record for record in records}
    return sorted(newest.values(), key=lambda record: record.policy["name"] != "full")
