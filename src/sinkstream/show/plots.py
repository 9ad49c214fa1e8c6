"""Pictures from records, drawn without a display: colour-blind-safe, units on the axes, legend outside the data."""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sinkstream.records.blocks import Blocks
from sinkstream.records.files import write_atomically
from sinkstream.records.pairing import paired_blocks, paired_delta
from sinkstream.records.records import BLOCKED, Record
from sinkstream.show.comparison import display_name
from sinkstream.statistics import PairedDelta

#: Okabe and Ito's palette without its yellow, which is too faint on white.
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7")
LINE_STYLES = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (7, 2, 1.5, 2)), (0, (4, 1.5, 1.5, 1.5, 1.5, 1.5)))
GRID, SHADE, TINTS = "#dddddd", "#f2f2f2", 10
MOST_LINES = 5  # policies of a picture, the control not counted; the others are in the table
LINE_COLOURS = ("#009E73", "#56B4E9", "#0072B2", "#E69F00", "#D55E00")  # from the lowest ΔPPL to the highest
OUTLIER = 6  # times the median ΔPPL: beyond, a line leaves the axis
ALIKE = 0.03  # of the axis of memory: lines that end nearer share a label
BAR_STEP = 0.006  # of the length of the text: the distance between the bars of two intervals
LABEL_HEIGHT = 0.075  # of the axis
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
MB = 1 << 20


def line_formats() -> Iterator[dict[str, Any]]:
    """Colour and line style of the first, second, ... line; colours and styles advance together, so 35 differ."""
    number = 0
    while True:
        yield {"color": COLOURS[number % len(COLOURS)], "linestyle": LINE_STYLES[number % len(LINE_STYLES)]}
        number += 1


def memory_and_quality(records: Sequence[Record], path: Path | str, *, title: str | None = None) -> Path:
    """Draw memory over the text and, below, ΔPPL so far against the first run, the control, as PNG.

    All runs are of one text and one model. Up to `MOST_LINES` policies are drawn, from the lowest ΔPPL to the highest;
    sampled runs are left to the table. The bar at the end of a line is its 95 % interval. A policy whose loss would
    flatten all others leaves the axis at the top, with its ΔPPL in the label. One record gives the upper panel only.

    Raises ValueError: no records, a record without tokens, or records that can not be paired with the control; or the
    arrays of an older record are absent. Raises ImportError: matplotlib is not installed.
    """
    if not records:
        raise ValueError("no records to draw")
    control = records[0]
    lines = _lines(records, control)
    figure, axes = new_figure(2 if lines else 1)
    _draw_memory(axes[0], control, lines)
    if lines:
        _draw_quality(axes[1], control, lines, others=len(records) - 1 - len(lines))
    axes[0].set_title(title or f"{control.model['name']} on {control.data['name']}", loc="left")
    axes[-1].set_xlabel("token of the text")
    axes[-1].xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    return save(figure, path)


@dataclass(frozen=True)
class _Line:
    """A policy of the picture: record, ΔPPL at the end and so far (at the centres of the blocks) in percent, colour."""

    record: Record
    delta: PairedDelta
    end: float
    so_far: np.ndarray
    colour: str = COLOURS[0]

    @property
    def percent(self) -> str:
        return f"{self.end:+.1f} %"


def _lines(records: Sequence[Record], control: Record) -> list[_Line]:
    """The policies to draw, the lowest ΔPPL first; of those that end alike one."""
    found = []
    for record in records:
        if record is control or not _blocks(control).pairs_with(_blocks(record)):
            continue
        sums, counts, _ = paired_blocks(record, control)
        with np.errstate(over="ignore"):
            so_far = 100 * np.expm1(np.cumsum(sums) / np.cumsum(counts))
        delta = paired_delta(record, control)
        if delta.delta_percent is not None:
            found.append(_Line(record, delta, delta.delta_percent, so_far))
    found.sort(key=lambda line: line.end)
    found = [line for at, line in enumerate(found) if at == 0 or line.percent != found[at - 1].percent]
    chosen = np.unique(np.linspace(0, len(found) - 1, min(MOST_LINES, len(found))).round().astype(int))
    return [replace(found[at], colour=colour) for at, colour in zip(chosen, LINE_COLOURS)]


def _draw_memory(axis: Any, control: Record, lines: Sequence[_Line]) -> None:
    """The most KV entries so far, in MB where the model's shape is known; lines that end alike share a label."""
    token_bytes = kv_token_bytes(control)
    scale, unit = (1, "entries") if token_bytes is None else (token_bytes / MB, "MB")
    axis.set_ylabel(f"KV cache, most so far ({unit})")
    runs = [(control, COLOURS[0]), *((line.record, line.colour) for line in lines)]
    held = [scale * np.maximum.accumulate(_kv(record)) for record, _ in runs]
    top = max(float(most[-1]) for most in held)
    groups: list[list[int]] = []
    for at, (most, (record, colour)) in enumerate(zip(held, runs)):
        axis.plot(_blocks(record).centres, most, color=colour, linewidth=2.2 if record is control else 1.6)
        alike = next((group for group in groups if abs(held[group[0]][-1] - most[-1]) <= ALIKE * top), None)
        groups.append([at]) if alike is None else alike.append(at)
    axis.set_ylim(0, 1.08 * top)
    labels = []
    for group in groups:
        name, colour = display_name(runs[group[0]][0]), runs[group[0]][1]
        end = max(float(held[at][-1]) for at in group)
        digits = 0 if end >= 100 or token_bytes is None else 1
        name, colour = (name, colour) if len(group) == 1 else (f"{len(group)} policies", "#444444")
        labels.append((end, f"{name}: {end:,.{digits}f} {unit}", colour))
    _label_ends(axis, labels)


def _draw_quality(axis: Any, control: Record, lines: Sequence[_Line], others: int) -> None:
    """ΔPPL so far, on a linear axis that the lines of ordinary size fill."""
    sizes = sorted(abs(line.end) for line in lines)
    usual = [size for size in sizes if size <= OUTLIER * max(1.0, float(np.median(sizes)))]
    inside = [line for line in lines if abs(line.end) in usual]
    skipped = max(1, len(_blocks(control).sums) // 20)  # the first means are of few tokens
    reach = np.concatenate(
        [np.r_[0.0, line.so_far[3 * skipped :], line.delta.low or 0, line.delta.high or 0] for line in inside]
    )
    reach = reach[np.isfinite(reach)]
    low, high = min(reach.min(), -0.5), max(reach.max(), 0.5)
    margin = 0.12 * (high - low)
    axis.set_ylim(low - margin, high + margin)
    axis.axhline(0, color=COLOURS[0], linewidth=2.2)
    labels = [(0.0, display_name(control), COLOURS[0])]
    x = _blocks(control).centres
    for number, line in enumerate(lines):
        axis.plot(x[skipped:], line.so_far[skipped:], color=line.colour, linewidth=1.8)
        outside = line not in inside
        if line.delta.low is not None and not outside:
            at = x[-1] + (number + 1) * BAR_STEP * (x[-1] - x[0])
            axis.vlines(at, line.delta.low, line.delta.high, color=line.colour, linewidth=3, alpha=0.6)
        text = f"{display_name(line.record)}: {line.percent}" + (" (off the axis)" if outside else "")
        labels.append((float(np.clip(line.end, low - margin, high + margin)), text, line.colour))
    axis.set_ylabel("ΔPPL so far (%)")
    more = f"; {others} more in the table" if others else ""
    title = f"perplexity of all tokens so far against {display_name(control)}, same tokens; bars: 95 % intervals{more}"
    axis.set_title(title, fontsize="medium", loc="left")
    _label_ends(axis, labels)


def _label_ends(axis: Any, labels: Sequence[tuple[float, str, str]]) -> None:
    """Names at the right of the axis, each near its height, moved apart where they would touch."""
    low, high = axis.get_ylim()
    wanted = sorted(labels)
    heights = [(value - low) / (high - low) for value, _, _ in wanted]
    for _ in range(len(heights)):
        for at in range(1, len(heights)):
            heights[at] = max(heights[at], heights[at - 1] + LABEL_HEIGHT)
        excess = heights[-1] - 1
        heights = [height - max(0.0, excess) for height in heights] if excess > 0 else heights
    for height, (_, text, colour) in zip(heights, wanted):
        axis.annotate(
            text,
            (1, height),
            xycoords="axes fraction",
            xytext=(8, 0),
            textcoords="offset points",
            color=colour,
            va="center",
            fontweight="bold",
            annotation_clip=False,
        )


def _blocks(record: Record) -> Blocks:
    if record.blocks is None:
        raise ValueError(f"record {record.id!r} has no tokens: there is nothing to draw")
    return record.blocks


def _kv(record: Record) -> np.ndarray:
    """Most entries that a token of each block saw (blocks,)."""
    blocks = _blocks(record)
    if blocks.kv is None:  # an older record
        blocks = Blocks.of(*(record.arrays[name] for name in BLOCKED)) or blocks
    assert blocks.kv is not None, "blocks of arrays know their KV entries"
    return blocks.kv


def kv_token_bytes(record: Record) -> int | None:
    """Bytes of the keys and values of one token, all layers; None if the record does not say the model's shape."""
    shape = record.model.get("shape") or {}
    try:
        heads = shape["num_attention_heads"]
        kv_heads, width = shape.get("num_key_value_heads") or heads, shape["hidden_size"] // heads
        size = ITEM_BYTES[str(record.protocol["dtype"])]
        return 2 * shape["num_hidden_layers"] * kv_heads * width * size
    except (KeyError, TypeError):
        return None


def save(figure: Any, path: Path | str, dpi: int = 150) -> Path:
    """Write a figure as PNG, `dpi` dots per inch, atomically.

    The file has a fixed palette, at a quarter of the size of true colour: `COLOURS` as they are, and `TINTS` steps from
    each to white for soft edges and bands. (A palette chosen by frequency would give two thin lines one colour.)
    """
    from PIL import Image  # comes with matplotlib

    drawn, written = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi)
    palette = Image.new("P", (1, 1))
    palette.putpalette(_palette())
    picture = Image.open(drawn).convert("RGB").quantize(palette=palette, dither=Image.Dither.NONE)
    picture.save(written, format="PNG", optimize=True)
    return write_atomically(path, written.getvalue())


def _palette() -> bytes:
    """Red, green and blue of white, of the two light greys, and of every tint of every colour."""
    base = np.array([list(bytes.fromhex(colour[1:])) for colour in ("#ffffff", GRID, SHADE, *COLOURS)], dtype=np.uint8)
    strength = np.arange(1, TINTS + 1)[:, None, None] / TINTS
    tints = np.rint(255 - strength * (255.0 - base[3:])).astype(np.uint8)
    return base[:3].tobytes() + tints.tobytes()


def new_figure(n_panels: int, *, share_x: bool = True, height: float | None = None) -> tuple[Any, np.ndarray]:
    """A figure on matplotlib's Agg canvas with panels one above the other; `height` in inches, default 3.6 a panel.

    Raises ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib; install it with: pip install 'sinkstream[demo]'") from error
    figure = Figure(figsize=(11, height or 3.6 * n_panels), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(n_panels, 1, sharex=share_x, squeeze=False)[:, 0]
    for axis in axes:
        axis.grid(True, color=GRID, linewidth=0.7)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes
