"""The questions that points are measured for, answered in figures that records give."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from sinkstream.matrix.record import PointRecord
from sinkstream.records.cards import by_card
from sinkstream.records.selection import DIAGNOSED_TEXTS
from sinkstream.report.criteria import Evidence
from sinkstream.report.verdicts import Compared, baseline, compared, groups, named, time_over
from sinkstream.show.table import EMPTY, NONE_YET, Table, with_interval
from sinkstream.studies.recall.record import RecallRecord
from sinkstream.studies.recall.tables import recall_curve
from sinkstream.studies.rivals.compare import Comparison
from sinkstream.studies.rivals.tables import delta_ppl_strict_vs_kvpress_snapkv

SNAPKV_LIKE = "refresh-window-attention"
LAZY = "lazy R=64"
INSIDE, BEYOND = 0.5, 2.0  # distances of a passage in caps: surely inside the window, surely behind it


@dataclass(frozen=True)
class Answer:
    """A question and its answer, in a sentence or two."""

    question: str
    answer: str


@dataclass(frozen=True)
class _Group:
    """Comparable points beside strict streaming: one model, one text, one number of slots."""

    strict: PointRecord
    points: list[PointRecord]

    @property
    def where(self) -> str:
        """Model and slots, in words."""
        return f"{self.strict.model['name']}, {self.strict.protocol['cap']:,} slots"

    def compared(self, points: Iterable[PointRecord]) -> list[Compared]:
        """The newest point of each label beside strict."""
        newest = {point.label: point for point in points}
        found = (compared(point, self.strict) for point in newest.values())
        return [one for one in found if one is not None and one.delta.delta_percent is not None]

    def lowered(self) -> list[Compared]:
        """The policies, plain lazy left out, whose interval is below that of strict; the surest first."""
        found = (one for one in self.compared(named(self.points, None)) if one.high < 0)
        return sorted(found, key=lambda one: one.high)


def answers(
    points: Sequence[PointRecord], recalls: Sequence[RecallRecord], rivals: Sequence[Comparison]
) -> list[Answer]:
    """All questions that the records answer.

    Parameters
    ----------
    points, recalls : sequence
        Oldest first; only complete ones count.
    rivals : sequence
        Rivals beside runs of ours, as `comparisons` gives them.
    """
    points = [point for point in points if point.status == "complete"]
    by_text = {text: found for text in DIAGNOSED_TEXTS if (found := _groups(points, text))}
    parts: list[tuple[str, Callable[[], str]]] = [
        ("What to choose?", lambda: _choice(by_text)),
        (
            "Does any policy lose less than strict (sinks and window, the oldest token dropped at every step) in as"
            " many slots?",
            lambda: _beaten(by_text),
        ),
        ("Does any policy remember a passage that has left the window?", lambda: _remembered(recalls)),
        ("Is it worth dropping rarely, many tokens at once (lazy)?", lambda: _lazy(by_text)),
        ("Is strict as good as SnapKV-class methods on PG19?", lambda: _snapkv(by_text.get("PG19", []), rivals)),
    ]
    return [Answer(question, said) for question, say in parts if (said := say())]


def answer_table(points: Sequence[PointRecord], recalls: Sequence[RecallRecord], rivals: Sequence[Comparison]) -> str:
    """The answers in Markdown."""
    rows = [[one.question, one.answer] for one in answers(points, recalls, rivals)]
    return Table(["question", "what the records say"], rows, left=2).markdown() if rows else NONE_YET


def _groups(points: Sequence[PointRecord], text: str) -> list[_Group]:
    found = [group for of_model in groups(Evidence(list(points), [], []), text).values() for group in of_model]
    strict = [(baseline([p for p in group if p.ppl is not None], "strict"), group) for group in found]
    return [_Group(point, group) for point, group in strict if point is not None]


def _figure(one: Compared) -> str:
    """ΔPPL in percent with its interval."""
    return with_interval(one.delta.delta_percent, one.delta.low, one.delta.high, 2, unit=" %")


def _beaten(by_text: dict[str, list[_Group]]) -> str:
    parts = []
    for text, of_text in by_text.items():
        tried = sum(len(group.compared(named(group.points, None))) for group in of_text)
        better = [(one, group.where) for group in of_text for one in group.lowered()]
        if not tried:
            continue
        said = f"{text}: perplexity is lower by its 95 % interval in {len(better)} of {tried} trials"
        if better:
            best, where = min(better, key=lambda pair: pair[0].high)
            said += f", most clearly with {best.point.label} ({where}): {_figure(best)}"
        parts.append(said)
    said = "A trial is a policy on one model and number of slots; by chance alone one in forty would be lower"
    return f"{'. '.join(parts)}. {said}." if parts else ""


def _remembered(recalls: Sequence[RecallRecord]) -> str:
    """The share of a passage's gain that the best policy keeps behind the window, and what recall keeps."""
    kept: dict[bool, list[tuple[float, float, RecallRecord]]] = {False: [], True: []}  # share, farthest distance
    for record in (r for r in recalls if r.status == "complete" and r.policy["name"] != "full"):
        curve = {point.ratio: point.gain.value for point in recall_curve(record)}
        far = [gain for ratio, gain in curve.items() if ratio >= BEYOND and gain is not None]
        inside, method = curve.get(INSIDE), record.policy["options"].get("recall")
        if not far or not inside:
            continue
        if method is None:
            kept[False].append((max(far) / inside, max(curve), record))
        elif method == "lexical":
            kept[True].append((min(far) / inside, max(curve), record))
    parts = []
    if kept[False]:
        share, _, record = max(kept[False], key=lambda found: found[0])
        parts.append(
            "A passage that comes again while it is in the window is easier to predict. Two windows back or farther"
            f" at most {100 * share:.0f} % of that is left with any policy ({record.label}; {_of(record)})"
        )
    if kept[True]:
        share, ratio, record = max(kept[True], key=lambda found: found[1])
        parts.append(f"Recall, switched on, keeps {100 * share:.0f} % up to {ratio:g} windows back ({_of(record)})")
    return f"{'. '.join(parts)}." if parts else ""


def _of(record: RecallRecord) -> str:
    return f"{record.model['name']} on {record.data['name']}, {record.protocol['cap']:,} slots"


def _lazy(by_text: dict[str, list[_Group]]) -> str:
    found, ratios = [], []
    for group in (group for of_text in by_text.values() for group in of_text):
        lazy = baseline(group.points, LAZY)
        found += group.compared([lazy] if lazy is not None else [])
        ratio = time_over(_labelled(group.points, LAZY), _labelled(group.points, "strict"))
        ratios += [] if ratio is None else [ratio]
    if not found:
        return ""
    deltas = sorted(one.delta.delta_percent or 0.0 for one in found)
    below = sum(one.high < 0 for one in found)
    said = (
        f"{LAZY} against strict, {len(found)} pairs of model, text and slots: perplexity {deltas[0]:+.2f} to"
        f" {deltas[-1]:+.2f} %, lower by its interval in {below}"
    )
    times = f"; time per token {min(ratios):.3f} to {max(ratios):.3f} × that of strict" if ratios else ""
    return f"{said}{times}."


def _labelled(points: Iterable[PointRecord], label: str) -> list[PointRecord]:
    return [p for p in points if p.label == label]


def _snapkv(of_text: list[_Group], rivals: Sequence[Comparison]) -> str:
    found = []
    for group in of_text:
        like = [p for p in named(group.points, [SNAPKV_LIKE]) if p.ppl is not None]
        if like and (one := compared(group.strict, min(like, key=lambda p: p.ppl or 0.0))) is not None:
            found.append((one, group.where))
    parts = []
    if found:
        below, above = (sum(test(one) for one, _ in found) for test in (_is_below, _is_above))
        worst, where = max(found, key=lambda pair: pair[0].high)
        parts.append(
            f"Against our own refresh by window attention, the best of each of {len(found)} pairs of model and slots:"
            f" strict has the lower perplexity by its interval in {below}, the higher in {above}; at worst"
            f" {_figure(worst)} ({where})"
        )
    theirs = delta_ppl_strict_vs_kvpress_snapkv(rivals)
    if theirs is not None:
        figure = with_interval(theirs.value, theirs.low, theirs.high, 2, unit=" %")
        parts.append(f"Against kvpress' SnapKV, where all slots compete (SmolLM2-135M, 512 slots): {figure}")
    return f"{'. '.join(parts)}." if parts else ""


def _is_below(one: Compared) -> bool:
    return one.high < 0


def _is_above(one: Compared) -> bool:
    return one.delta.low is not None and one.delta.low > 0


def _choice(by_text: dict[str, list[_Group]]) -> str:
    parts = []
    for text, of_text in by_text.items():
        tried = [group for group in of_text if group.compared(named(group.points, None))]
        beaten = [(group, lowered[0]) for group in tried if (lowered := group.lowered())]
        if not tried:
            continue
        unbeaten = len(tried) - len(beaten)
        choice = "strict" if unbeaten >= len(beaten) else "not strict"
        said = f"{text}: {choice}. At {unbeaten} of {len(tried)} pairs of model and slots no policy is better by its"
        said += " interval"
        others = [f"{one.point.label} ({group.where}, {_figure(one)})" for group, one in beaten]
        parts.append(said + (f"; elsewhere the clearest are {', '.join(others)}" if others else ""))
    return f"{'. '.join(parts)}." if parts else ""


# ---- speed without quality ----


def speed_tables(points: Sequence[PointRecord]) -> list[tuple[list[PointRecord], Table]]:
    """Time per output token and peak memory of every policy whose quality is not measured: points and table by card."""
    timed = [point for point in points if point.quality is None and point.speed is not None]
    return [(of_card, _speed_table(of_card)) for of_card in by_card(timed).values()]


def _speed_table(timed: Sequence[PointRecord]) -> Table:
    """One row a policy, a column a cap."""
    caps = sorted({point.protocol["cap"] for point in timed})
    newest = {(_kind(point), point.protocol["cap"]): point for point in timed}
    strict = {cap: newest.get(("strict", cap)) for cap in caps}
    rows = []
    for kind in dict.fromkeys(_kind(point) for point in timed):
        of_kind = [newest.get((kind, cap)) for cap in caps]
        rows.append([kind, *(_time(p, strict[cap]) for p, cap in zip(of_kind, caps)), *map(_memory, of_kind)])
    header = [*(f"ms per token (÷ strict), {cap:,} slots" for cap in caps), *(f"peak MB, {cap:,}" for cap in caps)]
    return Table(["policy", *header], rows)


def _kind(point: PointRecord) -> str:
    """The label without the budget of pinned tokens, which grows with the cap."""
    budget = point.policy["options"].get("refresh")
    return point.label.replace(f" B={budget}", "") if budget else point.label


def _time(point: PointRecord | None, strict: PointRecord | None) -> str:
    if point is None or point.tpot_ms is None:
        return EMPTY
    ratio = time_over([point], [strict] if strict is not None else [])
    return f"{point.tpot_ms:.3f}" + ("" if ratio is None else f" ({ratio:.2f})")


def _memory(point: PointRecord | None) -> str:
    return EMPTY if point is None or point.peak_mb is None else f"{point.peak_mb:,.0f}"
