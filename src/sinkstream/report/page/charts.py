"""The charts of the page: Vega-Lite specifications made by Altair, with their data inside."""

from collections.abc import Sequence
from functools import lru_cache
from math import inf
from statistics import median
from typing import Any

from sinkstream.report.page.groups import Dot, Group, frontier

BLUE, RED, GREY, GREEN = "#0b63a5", "#c8452e", "#6b7280", "#1f7a4d"
KINDS = {  # first word of a policy's name -> kind and colour
    "recompute": ("recompute (baseline)", "#111827"),
    "full": ("full cache", "#6b7280"),
    "strict": ("strict", BLUE),
    "lazy": ("lazy", "#e08a00"),
    "max": ("staged drops", "#8d5fd3"),
    "overlap": ("overlap", "#7a5230"),
    "slack": ("slack", GREEN),
    "adaptive": ("adaptive", "#d1438a"),
    "refresh": ("refresh (pinned tokens)", RED),
    "window": ("no sinks (control)", "#9ca3af"),
}
#: A point that loses so many times the median loss, or takes so many times the median time, is off the chart until
#: asked for: it would press all others into one corner.
FAR_LOSS, FAR_TIME = 8.0, 3.0
NAME_WIDTH, NAME_HEIGHT = 0.4, 0.06  # what a name of a point covers, as shares of the chart
FIGURE_PX = 45  # what the figure behind the longest bar takes
PER_TOKEN, TOTAL = "time per token, ms", "time for the whole text, s"


def library() -> Any:
    """Altair. Raises ImportError: it is not installed."""
    try:
        import altair
    except ImportError as error:
        raise ImportError("the page needs altair; install it with: pip install 'sinkstream[report]'") from error
    return altair


def bundle() -> str:
    """The JavaScript of Vega, Vega-Lite and vega-embed, for a page without a network.

    Raises ImportError: vl-convert is not installed.
    """
    try:
        import vl_convert
    except ImportError as error:
        message = "the page needs vl-convert-python; install it with: pip install 'sinkstream[report]'"
        raise ImportError(message) from error
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")


def kind(name: str) -> str:
    """The kind of a policy, for the legend."""
    first = name.partition("-")[0]
    return KINDS[first][0] if first in KINDS else name


def colours(values: Sequence[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """Kinds that occur, in the order of `KINDS`, and their colours."""
    there = {value["kind"] for value in values}
    pairs = [pair for pair in KINDS.values() if pair[0] in there]
    return [name for name, _ in pairs], [colour for _, colour in pairs]


def pareto_values(group: Group, *, by_time: bool = True) -> list[dict[str, Any]]:
    """One entry a point that has both quality and speed; whether a frontier holds it, and whether it is an outlier.

    `by_time`: whether a point may be an outlier by its time, which a picture without times does not ask.
    """
    dots = [dot for dot in group.dots() if dot.point.speed is not None]
    losses = [abs(dot.y) for dot in dots if dot.delta is not None]
    loss = FAR_LOSS * max(0.5, median(losses)) if losses else inf
    times = [dot.point.speed["tpot_ms"] for dot in dots if dot.point.speed]
    time = FAR_TIME * median(times) if times and by_time else inf
    values = [_value(dot, loss, time) for dot in dots]
    for x in ("tpot", "total", "memory"):
        known = [value for value in values if value[x] is not None]
        for value, best in zip(known, frontier([v[x] for v in known], [v["y"] for v in known])):
            value[f"front_{x}"] = bool(best)
        shown = [value for value in known if not value["outlier"]]
        for value in _apart(shown, x):
            value[f"named_{x}"] = "below" if _fewer_below(value, shown, x) else "above"
    return values


def _fewer_below(value: dict[str, Any], shown: Sequence[dict[str, Any]], x: str) -> bool:
    """Whether a name below its point, towards the middle of the chart, covers fewer points than one above it."""
    width, height = _name_size(shown, x)
    least, most = (end(v[x] for v in shown) for end in (min, max))
    inwards = 1 if value[x] <= (least + most) / 2 else -1
    beside = [v["y"] - value["y"] for v in shown if v is not value and 0 <= inwards * (v[x] - value[x]) < width]
    return sum(-2 * height < up < 0 for up in beside) < sum(0 <= up < 2 * height for up in beside)


def _name_size(values: Sequence[dict[str, Any]], x: str) -> tuple[float, float]:
    """What a name covers, in the units of both axes; the upright one holds the intervals too."""
    ends = [end for v in values for end in (v["y"], v.get("low"), v.get("high")) if end is not None]
    across = max(v[x] for v in values) - min(v[x] for v in values)
    return NAME_WIDTH * across, NAME_HEIGHT * (max(ends) - min(ends))


def _apart(values: Sequence[dict[str, Any]], x: str) -> list[dict[str, Any]]:
    """Those of the frontier, the best first, whose names do not cover each other."""
    if not values:
        return []
    near = dict(zip((x, "y"), _name_size(values, x)))
    named: list[dict[str, Any]] = []
    for value in sorted((v for v in values if v[f"front_{x}"]), key=lambda v: v["y"]):
        if not any(all(abs(value[of] - other[of]) < most for of, most in near.items()) for other in named):
            named.append(value)
    return named


def hidden(values: Sequence[dict[str, Any]]) -> str:
    """The points that are off the chart until asked for, in words."""
    far = [f"{value['label']} ({value['tpot']:.3g} ms, {value['y']:+.3g} %)" for value in values if value["outlier"]]
    return f". Far off, shown on request: {'; '.join(far)}" if far else ""


def _value(dot: Dot, most_loss: float, most_time: float) -> dict[str, Any]:
    point, speed = dot.point, dot.point.speed
    assert speed is not None, "only timed points are drawn"
    latency, low, high = speed["latency_ms"], *((dot.delta.low, dot.delta.high) if dot.delta else (None, None))
    interval = "baseline" if dot.delta is None else ("no interval" if low is None else f"{low:+.2f} to {high:+.2f} %")
    return {
        "label": point.label,
        "kind": kind(point.policy["name"]),
        "y": round(dot.y, 4),
        "low": low,
        "high": high,
        "interval": interval,
        "ppl": point.ppl,
        "tpot": speed["tpot_ms"],
        "total": dot.total_seconds(),
        "memory": point.peak_mb,
        **{name: latency[name] for name in ("p50", "p90", "p99")},
        "configuration": configuration(point.policy["options"]),
        "backends": f"quality {point.quality['backend']}, speed {speed['backend']}" if point.quality else "",
        "record": point.id,
        "outlier": abs(dot.y) > most_loss or speed["tpot_ms"] > most_time,
        **{f"{what}_{x}": False for what in ("front", "named") for x in ("tpot", "total", "memory")},
    }


def _slim(value: dict[str, Any]) -> dict[str, Any]:
    """Six digits of every number, and nothing that is null or false, which charts read as they read what is absent."""
    known = {name: one for name, one in value.items() if one is not None and one is not False}
    return {name: float(f"{one:.6g}") if isinstance(one, float) else one for name, one in known.items()}


def configuration(options: dict[str, Any]) -> str:
    """The options of a policy that are on, in one line."""
    return ", ".join(f"{name}={value}" for name, value in options.items() if value not in (None, 0, False)) or "none"


def tooltip(alt: Any, *, memory: bool) -> list[Any]:
    """What a point says when the pointer is on it; its memory where that is known."""
    shown = [
        alt.Tooltip("label:N", title="policy"),
        alt.Tooltip("configuration:N", title="options"),
        alt.Tooltip("y:Q", title="ΔPPL %", format="+.3f"),
        alt.Tooltip("interval:N", title="95 % interval"),
        alt.Tooltip("ppl:Q", title="perplexity", format=".3f"),
        alt.Tooltip("tpot:Q", title="ms per token", format=".4f"),
        alt.Tooltip("p50:Q", title="P50 ms", format=".4f"),
        alt.Tooltip("p90:Q", title="P90 ms", format=".4f"),
        alt.Tooltip("p99:Q", title="P99 ms", format=".4f"),
        alt.Tooltip("total:Q", title="whole text, s", format=".1f"),
        alt.Tooltip("memory:Q", title="peak memory, MB", format=",.0f"),
        alt.Tooltip("backends:N", title="measured with"),
        alt.Tooltip("record:N", title="record"),
    ]
    return [one for one in shown if memory or one.shorthand != "memory:Q"]


def pareto(values: Sequence[dict[str, Any]], baseline: str, *, x: str | None = None) -> dict[str, Any]:
    """ΔPPL against time, or against the field `x`; with the frontier and every interval."""
    names, shades = colours(values)
    spec = _pareto(
        tuple(names),
        tuple(shades),
        baseline,
        x,
        far=any(value["outlier"] for value in values),
        remembered=any(value["memory"] is not None for value in values),
        intervals=has_intervals(values),
    )
    return spec | {"data": library().Data(values=[_slim(value) for value in values]).to_dict(validate=False)}


@lru_cache(maxsize=256)
def _pareto(
    names: tuple[str, ...],
    shades: tuple[str, ...],
    baseline: str,
    x: str | None,
    *,
    far: bool,
    remembered: bool,
    intervals: bool,
) -> dict[str, Any]:
    """The chart of `pareto` without its data, which Altair takes its time to make: most groups have the same one.

    `names`, `shades`: the legend. `far`: whether a point is off the chart. `remembered`, `intervals`: whether memory,
    and an interval of any point, are known.
    """
    alt = library()
    params, chart = [], alt.Chart(alt.Data(values=[]))
    if far:
        shown = alt.param("controls", value=False, bind=alt.binding_checkbox(name="show those that are far off "))
        params.append(shown)
        chart = chart.transform_filter("controls || !datum.outlier")
    if x is None:
        axis = alt.param("axis", value=PER_TOKEN, bind=alt.binding_radio(options=[PER_TOKEN, TOTAL], name="across: "))
        params.append(axis)
        per_token = f"axis == '{PER_TOKEN}'"
        chart = chart.transform_calculate(
            x=f"{per_token} ? datum.tpot : datum.total",
            front=f"{per_token} ? datum.front_tpot : datum.front_total",
            named=f"{per_token} ? datum.named_tpot : datum.named_total",
        )
        title: Any = alt.TitleParams(text=alt.expr("axis"), orient="bottom", fontWeight="normal", fontSize=13)
    else:
        chart = chart.transform_calculate(x=f"datum.{x}", front=f"datum.front_{x}", named=f"datum.named_{x}")
        title = alt.TitleParams(text="peak memory, MB", orient="bottom", fontWeight="normal", fontSize=13)
    chart = chart.transform_filter("isValid(datum.x)")
    across = alt.X("x:Q", title=None, scale=alt.Scale(zero=False, padding=24), axis=alt.Axis(tickCount=7))
    up = alt.Y("y:Q", title=f"ΔPPL, % against {baseline}", scale=alt.Scale(zero=False, padding=12))
    colour = alt.Color(
        "kind:N",
        title=None,
        scale=alt.Scale(domain=list(names), range=list(shades)),
        legend=alt.Legend(orient="top", columns=legend_columns(alt), symbolOpacity=1),
    )
    line = chart.transform_filter("datum.front").mark_line(interpolate="step-after", color=GREY, strokeDash=[5, 4])
    bars = chart.mark_rule(strokeWidth=2, opacity=0.45).encode(x=across, y="low:Q", y2="high:Q", color=colour)
    dots = chart.mark_circle(size=110, opacity=1, stroke="white", strokeWidth=1)
    zero = level(chart).mark_rule(color="#111827", strokeWidth=1).encode(y=alt.datum(0))
    layered = alt.layer(
        zero,
        line.encode(x=across, y=up, order="x:Q"),
        *([bars] if intervals else []),
        dots.encode(x=across, y=up, color=colour, tooltip=tooltip(alt, memory=remembered)),
        point_names(alt, chart, "named").encode(x=across, y=up, text="label:N"),
    )
    return _finished(layered.add_params(*params).properties(title=title), height=340)


def level(chart: Any) -> Any:
    """A chart of one row of `chart`'s data, for a line at a level: layers that share their data keep it once."""
    return chart.transform_window(row="row_number()").transform_filter("datum.row == 1")


def legend_columns(alt: Any) -> Any:
    """One column on a narrow page."""
    return alt.expr("containerSize()[0] < 500 ? 1 : 3")


def point_names(alt: Any, chart: Any, field: str) -> Any:
    """The names of the points of `chart` whose `field` is true or "above", or "below": above or below the point.

    A name goes towards the middle of the chart. On a narrow page a long one ends with an ellipsis; the frame would cut
    it in the middle of a letter. All are one layer: the axes of a layer without points have no extent.
    """
    named = chart.transform_joinaggregate(least="min(x)", most="max(x)").transform_filter(f"datum.{field}")
    leftwards = "datum.x > datum.least + 0.5 * (datum.most - datum.least)"
    return named.mark_text(
        align=alt.expr(f"{leftwards} ? 'right' : 'left'"),
        dx=alt.expr(f"{leftwards} ? -9 : 9"),
        dy=alt.expr(f"datum.{field} == 'below' ? 13 : -9"),
        fontSize=12,
        clip=True,
        limit=alt.expr("containerSize()[0] < 500 ? 85 : 320"),
    )


def has_intervals(values: Sequence[dict[str, Any]]) -> bool:
    """Whether there is an interval to draw: the axes of a layer without one have no extent."""
    return any(value.get("low") is not None for value in values)


def row_names(alt: Any) -> Any:
    """The axis of rows that are named: long names are cut on a narrow page."""
    return alt.Axis(labelLimit=alt.expr("containerSize()[0] < 500 ? 130 : 320"), ticks=False)


def whiskers(values: Sequence[dict[str, Any]], title: str) -> dict[str, Any]:
    """One row a policy: ΔPPL with its interval; `values` have `label`, `kind`, `y`, `low`, `high`, `text`."""
    alt = library()
    names, shades = colours(values)
    chart = alt.Chart(alt.Data(values=list(values)))
    order = [value["label"] for value in values]
    rows = alt.Y("label:N", sort=order, title=None, axis=row_names(alt))
    across = alt.X("y:Q", title=title, scale=alt.Scale(zero=True, padding=10), axis=alt.Axis(tickCount=8))
    colour = alt.Color("kind:N", legend=None, scale=alt.Scale(domain=names, range=shades))
    zero = level(chart).mark_rule(color=GREY).encode(x=alt.datum(0))
    tips = [alt.Tooltip("label:N", title="policy"), alt.Tooltip("text:N", title="ΔPPL % [95 %]")]
    bars = chart.mark_rule(strokeWidth=3, opacity=0.5).encode(
        y=rows, x=alt.X("low:Q", title=title, axis=alt.Axis(tickCount=8)), x2="high:Q", color=colour
    )
    dots = chart.mark_circle(size=90, opacity=1).encode(y=rows, x=across, color=colour, tooltip=tips)
    layers = [zero, bars, dots] if has_intervals(values) else [zero, dots]
    return _finished(alt.layer(*layers), height=max(90, 24 * len(values)))


def ladder(values: Sequence[dict[str, Any]], floor_ms: float) -> dict[str, Any]:
    """Milliseconds a token of every way of decoding, beside the floor; `values` have `label`, `ms`, `over`."""
    alt = library()
    chart = alt.Chart(alt.Data(values=list(values)))
    order = [value["label"] for value in values]
    rows = alt.Y("label:N", sort=order, title=None, axis=row_names(alt))
    tips = [
        alt.Tooltip("label:N", title="way"),
        alt.Tooltip("ms:Q", title="ms per token", format=".3f"),
        alt.Tooltip("over:Q", title="times the floor", format=".2f"),
        alt.Tooltip("record:N", title="record"),
    ]
    longest = max(value["ms"] for value in values)
    most = alt.expr(f"{longest} * width / max(1, width - {FIGURE_PX})")
    across = alt.X("ms:Q", title="ms per token", scale=alt.Scale(domainMax=most))
    bars = chart.mark_bar(color=BLUE, height=15).encode(y=rows, x=across, tooltip=tips)
    text = chart.mark_text(align="left", dx=4, fontSize=12).encode(
        y=rows, x="ms:Q", text=alt.Text("ms:Q", format=".2f")
    )
    rule = level(chart).mark_rule(color=RED, strokeWidth=2).encode(x=alt.datum(floor_ms))
    return _finished(alt.layer(bars, text, rule), height=26 * len(values) + 20)


def lines(
    values: Sequence[dict[str, Any]], x: str, y: str, *, log: bool = False, y_title: str = "", x_title: str = ""
) -> dict[str, Any]:
    """Lines with bands: `values` have `line`, `x`, `y`, and `low` and `high` where there is an interval."""
    alt = library()
    chart = alt.Chart(alt.Data(values=list(values)))
    scale = alt.Scale(type="log", base=2) if log else alt.Scale(zero=False)
    ticks = sorted({value[x] for value in values})
    across = alt.X(f"{x}:Q", title=x_title, scale=scale, axis=alt.Axis(values=ticks))
    colour = alt.Color(
        "line:N",
        title=None,
        scale=alt.Scale(scheme="tableau20"),
        legend=alt.Legend(orient="top", columns=legend_columns(alt), labelLimit=260, symbolOpacity=1),
    )
    tips = [
        alt.Tooltip("line:N"),
        alt.Tooltip(f"{x}:Q", title=x_title),
        alt.Tooltip(f"{y}:Q", title=y_title, format=".3f"),
    ]
    band = chart.mark_rule(strokeWidth=3, opacity=0.35).encode(x=across, y="low:Q", y2="high:Q", color=colour)
    up = alt.Y(f"{y}:Q", title=y_title, scale=alt.Scale(zero=False))
    line = chart.mark_line(point=True).encode(x=across, y=up, color=colour, tooltip=tips)
    return _finished(alt.layer(*([band] if has_intervals(values) else []), line), height=280)


def recall_pareto(values: Sequence[dict[str, Any]], x_title: str, y_title: str) -> dict[str, Any]:
    """Recall against perplexity, the frontier joined; `values` have `label`, `kind`, `x`, `y`, `front`, `text`."""
    alt = library()
    names, shades = colours(values)
    chart = alt.Chart(alt.Data(values=list(values)))
    across = alt.X("x:Q", title=x_title, scale=alt.Scale(zero=False, padding=24), axis=alt.Axis(tickCount=7))
    up = alt.Y("y:Q", title=y_title, scale=alt.Scale(zero=False, padding=12))
    legend = alt.Legend(orient="top", columns=legend_columns(alt), symbolOpacity=1)
    colour = alt.Color("kind:N", title=None, scale=alt.Scale(domain=names, range=shades), legend=legend)
    best = chart.transform_filter("datum.front")
    line = best.mark_line(interpolate="step-before", color=GREY, strokeDash=[5, 4]).encode(x=across, y=up, order="x:Q")
    bars = chart.mark_rule(strokeWidth=2, opacity=0.45).encode(x=across, y="low:Q", y2="high:Q", color=colour)
    tips = [alt.Tooltip("label:N", title="policy"), alt.Tooltip("x:Q", title=x_title, format=".2f")]
    tips.append(alt.Tooltip("text:N", title=y_title))
    dots = chart.mark_circle(size=110, opacity=1, stroke="white", strokeWidth=1)
    names_shown = point_names(alt, chart, "front").encode(x=across, y=up, text="label:N")
    shown = dots.encode(x=across, y=up, color=colour, tooltip=tips)
    return _finished(alt.layer(line, *([bars] if has_intervals(values) else []), shown, names_shown), height=300)


def _finished(chart: Any, height: int) -> dict[str, Any]:
    """The specification, as wide as its place on the page, laid out anew when other points are shown."""
    sized = {"type": "fit-x", "contains": "padding", "resize": True}  # else titles stay where narrower labels put them
    styled = chart.properties(width="container", height=height, background="transparent", autosize=sized)
    font = "system-ui, -apple-system, Segoe UI, Roboto, sans-serif"
    configured = styled.configure(font=font).configure_view(stroke=None)
    configured = configured.configure_axis(
        gridColor="#e5e7eb", labelFontSize=12, titleFontSize=13, titleFontWeight="normal"
    )
    return configured.configure_legend(labelFontSize=12).to_dict(validate=False)  # half of the time; a test does it
