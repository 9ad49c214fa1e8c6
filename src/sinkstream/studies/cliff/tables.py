"""The cliff decomposed: hard eviction, and visible length past the trained positions. From run records alone.

With S strict streaming, I lazy with growth inside the cap and O lazy with growth outside it, all of one cap, R and
text, the mean over the n tokens that all three have scored splits exactly:

    mean(O - S) = mean(I - S) + sum over visible(O) <= T of (O - I) / n + sum over visible(O) > T of (O - I) / n
    total       = eviction    + length within the trained positions     + length past the trained positions

I and S never see more than the cap; I drops R tokens at once as O does, so the first part is what hard eviction (and
seeing fewer tokens at times) costs. O drops the same tokens at the same steps and only sees more of them: the rest is
visible length, split by whether a token attended to more than the T trained positions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sinkstream.records.blocks import DIGITS, Blocks
from sinkstream.records.cards import arithmetic
from sinkstream.records.headline import Headline
from sinkstream.records.pairing import common_tokens, paired_delta, same_text_and_model
from sinkstream.records.records import Record
from sinkstream.records.schema import check_keys
from sinkstream.records.selection import has_model
from sinkstream.show.plots import COLOURS, new_figure, save
from sinkstream.show.table import EMPTY, Table, plus_minus
from sinkstream.statistics import (
    Estimate,
    PairedDelta,
    block_sums,
    mean_interval,
    mean_of_blocks,
    share_of_blocks,
)

BINS = 8
_STYLES = {"strict": "-", "peak": (0, (2, 1.5)), "published": (0, (6, 2))}
_COLOUR_ORDER = (0, 5, 4, 3, 1, 6, 2)  # strict black, then blue, vermilion, ...
_GROWTH = {"peak": "inside cap", "published": "outside cap"}


@dataclass(frozen=True)
class CliffRun:
    """One run of the grid."""

    record: Record
    positions: str  # {"cache", "original"}
    cap: int
    stride: int  # R; 1 for strict
    accounting: str  # {"peak", "published"}: whether growth is inside or outside the cap; "peak" for strict

    @classmethod
    def of(cls, record: Record) -> "CliffRun":
        """Read a record of a strict or lazy run. Raises ValueError, naming the field, if it does not say enough."""
        options, protocol = record.policy["options"], record.protocol
        check_keys(options, dict.fromkeys(("compress_every", "positions")), str(record.path), "policy.options.")
        check_keys(protocol, dict.fromkeys(("cap_accounting",)), str(record.path), "protocol.")
        stride = options["compress_every"]
        accounting = protocol["cap_accounting"] if stride > 1 else "peak"
        return cls(record, options["positions"], protocol["cap"], stride, accounting)

    @property
    def peak(self) -> int:
        """The most entries that a token saw."""
        return self.record.summary["kv_length"]["max"]

    @property
    def line(self) -> str:
        """The kind of run, which lines of the picture join over caps."""
        return "strict (R = 1)" if self.stride == 1 else f"R = {self.stride:,}, growth {_GROWTH[self.accounting]}"


@dataclass(frozen=True)
class CliffShares:
    """The decomposed loss of one run with growth outside the cap, in nats per token; see the module."""

    # total, eviction, within, past: their means; the last three add up to the first
    total: Estimate
    eviction: Estimate
    within: Estimate
    past: Estimate
    share_past: Estimate  # past / total; no value unless the total is above zero by its interval
    n_tokens: int


def grid(records: Sequence[Record]) -> list[CliffRun]:
    """The runs of the newest grid among complete records, ordered by positions, cap, R and growth.

    A grid is what ``sinkstream cliff`` ran on one model and text, on machines of one arithmetic, in one precision and
    with one prefill; of equal runs the newest counts. `records` are in the order in which they were made.
    """
    complete = [r for r in records if r.status == "complete" and "cliff" in r.command[:3]]
    alike = [r for r in complete if same_text_and_model(r, complete[-1]) and _protocol(r) == _protocol(complete[-1])]
    runs = {(r.positions, r.cap, r.stride, r.accounting): r for r in map(CliffRun.of, alike)}
    return [runs[key] for key in sorted(runs)]


def _protocol(record: Record) -> tuple[Any, ...]:
    return arithmetic(record), *(record.protocol[name] for name in ("prefill_tokens", "dtype", "device", "backend"))


def decompose(strict: Record, inside: Record, outside: Record) -> CliffShares:
    """Split the mean NLL difference of `outside` from `strict`, as the module says, with block-bootstrap intervals.

    The records are strict, and lazy with growth inside and outside the cap, of one cap and R. Raises ValueError unless
    all three score the same tokens, of one text and under one model.
    """
    base, lazy, grown = (record.blocks for record in (strict, inside, outside))
    ids = f"records {strict.id!r}, {inside.id!r} and {outside.id!r}"
    if not (same_text_and_model(inside, strict) and same_text_and_model(outside, strict)):
        raise ValueError(f"{ids} are of several texts or models")
    if not (base and lazy and grown and lazy.pairs_with(base) and grown.pairs_with(base)):
        raise ValueError(f"{ids} do not score the same tokens; accepted: runs of one grid")
    total, eviction, past = grown.sums - base.sums, lazy.sums - base.sums, _past_trained(inside, outside, grown)
    parts = (total, eviction, total - eviction - past, past)
    whole, hard, near, far = (mean_of_blocks(sums, base.counts, base.tokens) for sums in parts)
    share = Estimate(reason="no loss")
    if whole.above_zero:
        share = share_of_blocks(past, total, base.counts, base.tokens)
    return CliffShares(whole, hard, near, far, share, int(base.counts.sum()))


def _past_trained(inside: Record, outside: Record, blocks: Blocks) -> np.ndarray:
    """Sums (blocks,) of the NLL difference at tokens that attended to more than the trained positions."""
    trained = outside.model["trained_positions"]
    if outside.summary["kv_length"]["max"] <= trained:
        return np.zeros_like(blocks.sums)

    def compute() -> list[float]:
        difference = outside.arrays["nll"].astype(np.float64) - inside.arrays["nll"]
        past = np.where(outside.arrays["kv_length"] > trained, difference, 0.0)
        return np.round(block_sums(past, outside.arrays["index"], blocks.tokens)[1], DIGITS).tolist()

    return np.array(outside.pairs.figure("length past trained", (inside, outside), compute))


def shares(runs: Sequence[CliffRun]) -> Iterator[tuple[CliffRun, CliffShares]]:
    """Every run with growth outside the cap that has both its controls, decomposed."""
    found = {(r.positions, r.cap, r.stride, r.accounting): r for r in runs}
    for run in runs:
        strict, inside = (found.get((run.positions, run.cap, stride, "peak")) for stride in (1, run.stride))
        if run.accounting == "published" and strict is not None and inside is not None:
            yield run, decompose(strict.record, inside.record, run.record)


def share_past_trained(records: Sequence[Record], *, model: str) -> Headline | None:
    """Share of visible length past the trained positions in the loss at the largest R, at the cap that equals them.

    Of the newest grid of that model, positions inside the cache; None if it has no such runs, or no loss.
    """
    runs = grid([record for record in records if has_model(record, model)])
    at_trained = [
        (run, parts)
        for run, parts in shares(runs)
        if run.cap == run.record.model["trained_positions"] and run.positions == "cache"
    ]
    if not at_trained:
        return None
    run, parts = max(at_trained, key=lambda pair: pair[0].stride)
    return None if parts.share_past.value is None else Headline(parts.share_past.value, run.record.id)


@dataclass(frozen=True)
class CliffLine:
    """A run of the newest grid with its ΔPPL and, with growth outside the cap, the decomposition of its loss."""

    run: CliffRun
    # against strict at the same cap and positions, of strict itself with positions in the cache; None for that, or
    # without a control
    delta: PairedDelta | None
    is_control: bool
    shares: CliffShares | None

    @property
    def delta_text(self) -> str:
        """ΔPPL in percent, ± half of its interval."""
        if self.delta is None:
            return "control" if self.is_control else EMPTY
        return plus_minus(self.delta.delta_percent, self.delta.low, self.delta.high, 2)

    @property
    def parts_text(self) -> list[str]:
        """Eviction, length up to and past the trained positions, share of the last: four cells."""
        if self.shares is None:
            return [EMPTY] * 4
        parts = (self.shares.eviction, self.shares.within, self.shares.past)
        nats = [plus_minus(part.value, part.low, part.high, 4) for part in parts]
        share = self.shares.share_past
        if share.value is None:
            return [*nats, EMPTY]
        assert share.low is not None and share.high is not None, "a share has an interval"
        return [*nats, f"{100 * share.value:.0f} % ±{50 * (share.high - share.low):.0f}"]


def cliff_lines(records: Sequence[Record]) -> list[CliffLine]:
    """One line a run of the newest grid."""
    runs = grid(records)
    strict = {(run.positions, run.cap): run.record for run in runs if run.stride == 1}
    decomposed = {run.record.id: parts for run, parts in shares(runs)}
    lines = []
    for run in runs:
        control = strict.get(("cache" if run.stride == 1 else run.positions, run.cap))
        is_control = control is run.record
        delta = None if control is None or is_control else paired_delta(run.record, control)
        lines.append(CliffLine(run, delta, is_control, decomposed.get(run.record.id)))
    return lines


#: Header, and the cell of a line.
COLUMNS = [
    ("Positions", lambda line: line.run.positions),
    ("Cap", lambda line: f"{line.run.cap:,}"),
    ("R", lambda line: str(line.run.stride)),
    ("Growth", lambda line: _GROWTH[line.run.accounting] if line.run.stride > 1 else EMPTY),
    ("KV min – max", lambda line: "{min:,} – {max:,}".format(**line.run.record.summary["kv_length"])),
    ("PPL", lambda line: f"{line.run.record.summary['ppl']:,.2f}"),
    ("ΔPPL %", lambda line: line.delta_text),
    ("Eviction (nats)", lambda line: line.parts_text[0]),
    ("Length ≤ T (nats)", lambda line: line.parts_text[1]),
    ("Length > T (nats)", lambda line: line.parts_text[2]),
    ("Share of length > T", lambda line: line.parts_text[3]),
]


def cliff_table(records: Sequence[Record], title: str | None = None) -> Table:
    """The newest grid, one row a run."""
    return Table.of(cliff_lines(records), COLUMNS, title=title, notes=[footnote(records)])


def footnote(records: Sequence[Record]) -> str:
    """What a reader must know to read the table."""
    newest = grid(records)[-1].record
    trained, scored = newest.model["trained_positions"], newest.summary["scored_tokens"]
    return (
        f"T = {trained:,} trained positions; all runs score the same {scored:,} tokens. ΔPPL is against strict (R = 1)"
        " at the same cap and positions; for strict with original positions, against strict with cache positions (the"
        " same tokens seen, but the sinks as far back as the text is long). ln(1 + ΔPPL) of growth outside the cap ="
        " eviction (the same R with growth inside the cap, less strict) + length (outside less inside) at tokens that"
        " see at most T entries + length at tokens that see more. ± is half of the 95 % block-bootstrap interval. No"
        " share is given where there is no loss."
    )


def draw_cliff(records: Sequence[Record], path: Path | str, *, title: str | None = None) -> Path:
    """Draw the newest grid as PNG: PPL over peak visible length, a panel a position mode; NLL over visible length.

    The lowest panel has, for the largest R and the cap nearest the trained positions, the paired NLL difference from
    strict streaming by the visible length of the token, with its 95 % band.

    Raises ValueError: no complete record of ``sinkstream cliff``. Raises ImportError: matplotlib is not installed.
    """
    runs = grid(records)
    if not runs:
        raise ValueError("no complete records of sinkstream cliff to draw")
    modes = sorted({run.positions for run in runs})
    trained = runs[0].record.model["trained_positions"]
    strides = sorted({run.stride for run in runs})
    figure, axes = new_figure(len(modes) + 1)
    for axis, mode in zip(axes, modes):
        _draw_ppl(axis, [run for run in runs if run.positions == mode], strides)
        axis.set_title(f"positions: {mode}", fontsize="medium")
    _draw_lengths(axes[-1], [run for run in runs if run.positions == modes[0]], strides, trained)
    for axis in axes:
        axis.axvline(trained, color="#777777", linewidth=1.2, linestyle=":")
    note = {"textcoords": "offset points", "fontsize": "small", "color": "#555555"}
    axes[0].annotate(f"trained: {trained:,}", (trained, 1), xycoords=("data", "axes fraction"), xytext=(4, -10), **note)
    axes[-1].set_xscale("log", base=2)
    ticks = [trained // 8, trained // 4, trained // 2, trained, 2 * trained]
    low, high = axes[-1].get_xlim()
    shown = [tick for tick in ticks if low <= tick <= high]
    axes[-1].set_xticks(shown, [f"{tick:,}" for tick in shown])
    axes[-1].set_xlabel("visible length: KV entries (above, the most of a run; below, those that a token saw)")
    newest = runs[-1].record
    figure.suptitle(title or f"{newest.model['name']} on {newest.data['name']}")
    handles = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", frameon=False, handlelength=4)
    return save(figure, path)


def _draw_ppl(axis: Any, runs: Sequence[CliffRun], strides: Sequence[int]) -> None:
    for line in dict.fromkeys(run.line for run in sorted(runs, key=lambda r: (r.stride, r.accounting))):
        joined = sorted((run for run in runs if run.line == line), key=lambda run: run.peak)
        ppl = [run.record.summary["ppl"] for run in joined]
        axis.plot([run.peak for run in joined], ppl, label=line, **_style(joined[0], strides))
    axis.set_yscale("log")
    for ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
        ticks(lambda value, _: f"{value:,.4g}")
    axis.set_ylabel("PPL (log scale)")


def _style(run: CliffRun, strides: Sequence[int]) -> dict[str, Any]:
    """Colour: R; line style: growth."""
    colour = COLOURS[_COLOUR_ORDER[strides.index(run.stride) % len(_COLOUR_ORDER)]]
    line = _STYLES["strict" if run.stride == 1 else run.accounting]
    return {"color": colour, "linestyle": line, "marker": "o", "markersize": 4}


def _draw_lengths(axis: Any, runs: Sequence[CliffRun], strides: Sequence[int], trained: int) -> None:
    lazy = [run for run in runs if run.stride > 1]
    axis.axhline(0, color=COLOURS[0], linewidth=1)
    axis.set_ylabel("NLL difference from strict\n(nats per token)")
    if not lazy:
        return
    largest = max(run.stride for run in lazy)
    cap = min((run.cap for run in lazy if run.stride == largest), key=lambda cap: abs(cap - trained))
    control = next((run.record for run in runs if (run.cap, run.stride) == (cap, 1)), None)
    axis.set_title(f"tokens of R = {largest:,} at cap {cap:,}, by what they saw", fontsize="medium")
    for run in lazy:
        if (run.cap, run.stride) == (cap, largest) and control is not None:
            centres, curve = _by_length(run.record, control)
            style = _style(run, strides)
            axis.plot(centres, [e.value for e in curve], **style)
            banded = [(centre, e.low, e.high) for centre, e in zip(centres, curve) if e.low is not None]
            if banded:
                axis.fill_between(*zip(*banded), color=style["color"], alpha=0.15, linewidth=0)


def _by_length(record: Record, control: Record) -> tuple[list[float], list[Estimate]]:
    """NLL difference from the control in `BINS` equal ranges of visible length: their centres, and the means."""
    index, nll, control_nll = common_tokens(record, control)
    difference, lengths = nll - control_nll, _at(record, "kv_length", index)
    edges = np.linspace(lengths.min(), lengths.max() + 1, BINS + 1)
    bins = np.digitize(lengths, edges) - 1
    present = [b for b in range(BINS) if (bins == b).any()]
    curve = [mean_interval(difference[bins == b], positions=index[bins == b]) for b in present]
    return [float((edges[b] + edges[b + 1]) / 2) for b in present], curve


def _at(record: Record, name: str, index: np.ndarray) -> np.ndarray:
    """A per-token array at these token indices, all of which the record has."""
    return record.arrays[name][np.searchsorted(record.arrays["index"], index)]
