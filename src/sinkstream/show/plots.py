"""Pictures from records, drawn without a display: colour-blind-safe, units on the axes, legend outside the data."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sinkstream.records.files import write_atomically
from sinkstream.records.pairing import common_tokens
from sinkstream.records.records import Record
from sinkstream.show.comparison import display_name, find_control
from sinkstream.statistics import BLOCK_TOKENS, block_sums

#: Okabe and Ito's palette without its yellow, which is too faint on white.
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7")
LINE_STYLES = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (7, 2, 1.5, 2)), (0, (4, 1.5, 1.5, 1.5, 1.5, 1.5)))
GRID, SHADE, TINTS = "#dddddd", "#f2f2f2", 10
DIFFERENCE_TICKS = (-10, -5, -2, -1, -0.5, -0.2, -0.1, -0.05, 0, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)


def line_formats() -> Iterator[dict[str, Any]]:
    """Colour and line style of the first, second, ... line; colours and styles advance together, so 35 differ."""
    number = 0
    while True:
        yield {"color": COLOURS[number % len(COLOURS)], "linestyle": LINE_STYLES[number % len(LINE_STYLES)]}
        number += 1


def nll_over_tokens(
    records: Sequence[Record],
    path: Path | str,
    block_tokens: int = BLOCK_TOKENS,
    *,
    control_id: str | None = None,
    title: str | None = None,
) -> Path:
    """Draw block-averaged NLL over the token index, one line a record, and below it the difference from a control.

    Parameters
    ----------
    records : sequence of Record
        All of one text and one model.
    path : path
        PNG file to write, atomically.
    block_tokens : int, default=64
        Tokens that one point averages over.
    control_id : str, optional
        Record that the lower panel subtracts token by token; default the first one. With one record there is no lower
        panel. Its axis is linear up to 0.2 nats and logarithmic beyond, so that a collapse does not hide the rest.

    Raises
    ------
    ValueError
        No records, an unknown control, or records that can not be paired with it.
    ImportError
        matplotlib is not installed.
    """
    control = find_control(records, control_id)
    figure, axes = new_figure(2 if len(records) > 1 else 1)
    for record, style in zip(records, line_formats()):
        starts, sums, counts = block_sums(record.arrays["nll"], record.arrays["index"], block_tokens)
        axes[0].plot(starts + block_tokens / 2, sums / counts, label=display_name(record), linewidth=1.6, **style)
        if len(axes) > 1 and record is not control:
            index, nll, control_nll = common_tokens(record, control)
            starts, sums, counts = block_sums(nll.astype(np.float64) - control_nll, index, block_tokens)
            axes[1].plot(starts + block_tokens / 2, sums / counts, linewidth=1.6, **style)
    axes[0].set_ylabel("NLL (nats per token)")
    if len(axes) > 1:
        axes[1].axhline(0, color=COLOURS[0], linewidth=1)
        axes[1].set_yscale("symlog", linthresh=0.2, linscale=1.5)
        axes[1].set_yticks(DIFFERENCE_TICKS, [f"{tick:+g}" if tick else "0" for tick in DIFFERENCE_TICKS])
        axes[1].set_ylim(*_limits(axes[1]))
        axes[1].set_ylabel("NLL difference (nats per token)")
        axes[1].set_title(f"difference from {display_name(control)} on the same tokens", fontsize="medium")
    axes[-1].set_xlabel(f"token index in the text (points average {block_tokens} tokens)")
    axes[0].set_title(title or f"{control.model['name']} on {control.data['name']}")
    figure.legend(loc="outside right upper", frameon=False, handlelength=4)
    return save(figure, path)


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


def _limits(axis: Any) -> tuple[float, float]:
    """Limits just outside the drawn lines, at least ±0.1, for an axis whose automatic margins are too wide."""
    drawn = np.concatenate([np.asarray(line.get_ydata(), dtype=np.float64) for line in axis.get_lines()])
    return min(-0.1, 1.2 * np.nanmin(drawn)), max(0.1, 1.2 * np.nanmax(drawn))


def new_figure(n_panels: int, *, share_x: bool = True, height: float | None = None) -> tuple[Any, np.ndarray]:
    """A figure on matplotlib's Agg canvas with panels one above the other; `height` in inches, default 3.6 a panel.

    Raises
    ------
    ImportError
        matplotlib is not installed.
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
