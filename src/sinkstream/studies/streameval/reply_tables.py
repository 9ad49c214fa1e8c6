"""One endless reply: the table of several policies, and the picture of memory and time along the reply."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from sinkstream.records.cards import by_card, cards_text
from sinkstream.records.selection import has_model
from sinkstream.show.plots import line_formats, new_figure, save
from sinkstream.show.table import EMPTY, Table
from sinkstream.studies.facts.record import accuracy, accuracy_text, held_text
from sinkstream.studies.streameval.reply import ReplyRecord

#: Distances in tokens that the table has a column for: up to each of these, times the cap; then all others.
BANDS = (16.0, 256.0)
MIB = 2**20


def reply_table(records: Sequence[ReplyRecord], title: str | None = None) -> Table:
    """One row a policy."""
    rows, several = [], len(by_card(records)) > 1
    for record in records:
        answers, cap = record.answers, record.protocol["cap"]
        edges = [0.0, *(cap * band for band in BANDS), np.inf]
        bands = [(answers["distance"] >= low) & (answers["distance"] < high) for low, high in pairwise(edges)]
        shares = [accuracy_text(accuracy(answers, band)) for band in bands]
        everything = np.ones(len(answers["distance"]), dtype=bool)
        first, last = (record.samples[i] if record.samples else {} for i in (0, -1))
        cells = [accuracy_text(accuracy(answers)), *shares, held_text(answers, everything)]
        on = [cards_text([record])] if several else []
        rows.append([record.label, *cells, *_times(record), _bytes(first, last), _host_bytes(last), *on])
    bands_named = [*(f"up to {band:g} ×" for band in BANDS), "beyond"]
    header = ["Policy", "Right answers", *bands_named, "Brought back", "TPOT first / last (ms)"]
    header += ["ratio of means; of medians", "Frames set first / last"]
    header += ["Cache first / last (MiB)", "Archive (bytes per token)", *(["On"] if several else [])]
    return Table(header, rows, title, [footnote(records)])


def tpot_ratio(record: ReplyRecord, figure: str = "mean") -> float | None:
    """Mean time per token in the last timed window over that in the first, or the median ("p50"); None without both."""
    windows = [window[figure] for window in record.windows]
    return windows[-1] / windows[0] if len(windows) > 1 and None not in (windows[0], windows[-1]) else None


def _times(record: ReplyRecord) -> list[str]:
    ratio, median = tpot_ratio(record), tpot_ratio(record, "p50")
    if ratio is None or median is None:
        return [EMPTY, EMPTY, EMPTY]
    first, last = record.windows[0], record.windows[-1]
    frames = EMPTY if first.get("frames") is None else f"{first['frames']} / {last['frames']}"
    return [f"{first['mean']:.2f} / {last['mean']:.2f}", f"{ratio:.3f}; {median:.3f}", frames]


def _bytes(first: dict, last: dict) -> str:
    if not first or first["cache_bytes"] is None or last["cache_bytes"] is None:
        return EMPTY
    return f"{first['cache_bytes'] / MIB:.1f} / {last['cache_bytes'] / MIB:.1f}"


def _host_bytes(last: dict) -> str:
    if not last or not last["archived"]:
        return EMPTY
    return f"{(last['archive_bytes'] + (last['archive_file_bytes'] or 0)) / last['archived']:,.0f}"


def footnote(records: Sequence[ReplyRecord]) -> str:
    """What a reader must know to read the table."""
    protocol, data = records[0].protocol, records[0].data
    windows = records[0].windows
    tokens = windows[0]["tokens"] if windows else 0
    return (
        f"One reply of {data['tokens']:,} tokens ({data['source']}), given and not drawn; each fact is said once and"
        f" asked once, at a distance of {protocol['cap']:,} tokens (the cap) or more. Right answers: the likeliest of"
        " ten, with the 95 % Wilson interval, by the distance in multiples of the cap. TPOT: mean of"
        f" {tokens:,} tokens decoded one by one, after {windows[0]['first'] if windows else 0:,} tokens and at the end;"
        " frames: how often recalled tokens were exchanged meanwhile."
    )


def draw_reply(records: Sequence[ReplyRecord], path: Path | str, *, title: str | None = None) -> Path:
    """Draw the memory held on the device and the time per token along the reply; writes a PNG atomically.

    Raises ValueError: no records. Raises ImportError: matplotlib is not installed.
    """
    if not records:
        raise ValueError("no reply records to draw")
    figure, (above, below) = new_figure(2)
    for record, style in zip(records, line_formats()):
        above.plot([s["token"] for s in record.samples], [s["device_mb"] for s in record.samples],
                   label=record.label, **style)  # fmt: skip
        timed = [w for w in record.windows if w["mean"] is not None]
        at = [w["first"] for w in timed]
        below.plot(at, [w["mean"] for w in timed], marker="o", **style)
        below.plot(at, [w["p50"] for w in timed], marker="x", linestyle="none", color=style["color"])
    above.set_ylabel("held on the device (MB)")
    below.set_ylabel("time per token (ms): ● mean, × median")
    for axis in (above, below):
        top = max((max(line.get_ydata()) for line in axis.lines if len(line.get_ydata())), default=0)
        axis.set_ylim(0, 1.08 * top or None)  # the highest marker whole; a reply cut short has none
        axis.xaxis.set_major_formatter("{x:,.0f}")
    below.set_xlabel("token of the reply")
    above.set_title(
        title or f"{records[0].model['name']}, one reply of {records[0].data['tokens']:,} tokens", loc="left"
    )
    figure.legend(loc="outside right upper", frameon=False, handlelength=4)
    return save(figure, path)


def select_replies(records: Sequence[ReplyRecord], *, model: str) -> list[ReplyRecord]:
    """The newest complete record of each policy of a model, on the reply of the newest."""
    runs = [record for record in records if record.status == "complete" and has_model(record, model)]
    return list({r.policy["label"]: r for r in runs if r.data["sha256"] == runs[-1].data["sha256"]}.values())
