"""How criteria are judged: quality from points, by paired intervals; speed from points and from timings in turns.

"At most" is met where the upper end of the interval meets it: a figure whose interval straddles the limit is a no-go.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from sinkstream.bench.record import BenchRecord
from sinkstream.bench.selection import LADDER_SHAPE, LEAST_TOKENS, fastest_rung, newest, pairs, select
from sinkstream.bench.selection import conditions as speed_conditions
from sinkstream.matrix.record import PointRecord, point_delta
from sinkstream.measure.environment import hardware
from sinkstream.records.cards import arithmetic, of_one_card
from sinkstream.records.selection import has_text
from sinkstream.report.criteria import GO, KINDS, NO_GO, STOP_LOSS, Criterion, Evidence, Verdict
from sinkstream.show.table import counted
from sinkstream.statistics import PairedDelta
from sinkstream.statistics.comparison import Ratio, ratio_of_times

BASELINES = ("recompute", "strict", "full", "window-only")
FASTEST = "fused"
LADDER_CAP = 2052


class Compared(NamedTuple):
    """A point beside what it is compared with."""

    point: PointRecord
    other: PointRecord
    delta: PairedDelta

    @property
    def high(self) -> float:
        """Upper end of the interval of ΔPPL in percent; infinite without one."""
        return float("inf") if self.delta.high is None else self.delta.high

    def __str__(self) -> str:
        low, high = (f"{x:+.2f}" if x is not None else "–" for x in (self.delta.low, self.delta.high))
        value = "–" if self.delta.delta_percent is None else f"{self.delta.delta_percent:+.2f}"
        cap = f"cap {self.point.protocol['cap']:,}"
        return f"{self.point.label} at {cap}: ΔPPL {value} % [{low}, {high}] against {self.other.label}"


def compared(point: PointRecord, other: PointRecord | None) -> Compared | None:
    """The two with ΔPPL; None where they cannot be paired."""
    if other is None:
        return None
    try:
        return Compared(point, other, point_delta(point, other))
    except ValueError:
        return None


# ---- groups of points ----


def conditions(point: PointRecord) -> tuple[object, ...]:
    """What compared points share: model, text, cap and its accounting, prefill, precision, arithmetic of the GPU.

    Times are compared on one GPU (`timed_beside`).
    """
    keys = ("cap", "cap_accounting", "prefill_tokens", "dtype", "device")
    return (point.model["hash"], point.data["sha256"], arithmetic(point), *(point.protocol[key] for key in keys))


def groups(evidence: Evidence, text: str | None = None) -> dict[str, list[list[PointRecord]]]:
    """Model name -> groups of comparable points, growth inside the cap, by cap; `text` as in `has_text`."""
    found: dict[tuple[object, ...], list[PointRecord]] = defaultdict(list)
    for point in evidence.points:
        if point.protocol["cap_accounting"] == "peak" and (text is None or has_text(point, text)):
            found[conditions(point)].append(point)
    models: dict[str, list[list[PointRecord]]] = defaultdict(list)
    for group in sorted(found.values(), key=lambda g: (g[0].model["name"], g[0].protocol["cap"], g[0].created)):
        models[group[0].model["name"]].append(group)
    return models


def is_lazy(point: PointRecord) -> bool:
    """Whether the policy is lazy and nothing else."""
    return point.policy["name"] == "lazy" and point.policy["label"].startswith("lazy R=") and " " not in point.label[5:]


def is_strict(point: PointRecord) -> bool:
    """Whether the point is strict streaming: by name, or pruned past a slack of no token."""
    policy = point.policy
    return policy["name"] == "strict" or (policy["name"] == "slack" and not policy["options"].get("slack"))


def is_tried(point: PointRecord) -> bool:
    """Whether the point is a policy that is compared with strict streaming: no baseline, and not strict itself."""
    return point.policy["name"] not in BASELINES and not is_strict(point)


def named(group: Iterable[PointRecord], policies: Sequence[str] | None) -> list[PointRecord]:
    """The points of these policies; without names, of controlled policies: all but baselines, plain lazy, and strict.

    Points with sinks or a window of their own belong to a sweep, and are left out.
    """
    group = [p for p in group if not {"sink", "window"} & p.configuration["policy"]["options"].keys()]
    if policies is not None:
        return [p for p in group if p.policy["name"] in policies]
    return [p for p in group if is_tried(p) and not is_lazy(p)]


def once(points: Iterable[PointRecord]) -> list[PointRecord]:
    """The newest of each id: quality is the same on every machine of a group, and is judged once."""
    return list({point.id: point for point in points}.values())


def baseline(group: Iterable[PointRecord], name: str) -> PointRecord | None:
    """The newest point of a baseline without further options in its label."""
    return next((p for p in reversed(list(group)) if p.label == name), None)


def timed_beside(point: PointRecord, group: Iterable[PointRecord]) -> list[PointRecord]:
    """The points timed with the same code on the same hardware, so that a ratio of times is one of policies."""
    here = _code_and_hardware(point)
    return [p for p in group if p.tpot_ms and _code_and_hardware(p) == here]


def most_timed(points: Iterable[PointRecord]) -> PointRecord | None:
    """The point that was timed most often, the newest of these: one timing of a step of 0.1 ms may hold a stop."""
    timed = [(len(p.speed["repeats"]), p.created, p) for p in points if p.speed and p.tpot_ms]
    return max(timed, key=lambda found: found[:2])[2] if timed else None


def time_over(points: Iterable[PointRecord], others: Iterable[PointRecord]) -> float | None:
    """TPOT of the most timed point over that of the most timed other one of the same code and hardware."""
    point = most_timed(points)
    other = most_timed(timed_beside(point, others)) if point is not None else None
    return point.tpot_ms / other.tpot_ms if point and other and point.tpot_ms and other.tpot_ms else None


def _code_and_hardware(point: PointRecord) -> tuple[str | None, str]:
    return point.environment["git"]["commit"], hardware(point.environment)


def against(points: Iterable[PointRecord], group: Iterable[PointRecord], name: str) -> Compared | None:
    """The pair of one of some points and a baseline of that name which has the most tokens in common; the newest then.

    Several matrices may hold the same baseline, recompute scored at every second token in one and at every fourth in
    another.
    """
    baselines = [p for p in group if p.label == name]
    found = [c for point in points for other in baselines if (c := compared(point, other)) is not None]
    return max(found, key=lambda c: (c.delta.n_tokens, c.point.created, c.other.created), default=None)


def by_model(
    criterion: Criterion,
    models: dict[str, list[list[PointRecord]]],
    judge: Callable[[list[PointRecord]], Verdict | None],
) -> list[Verdict]:
    """One verdict a model: the first no-go of its caps if there is one, with how many caps meet the criterion."""
    verdicts = []
    for model, of_model in models.items():
        found = [v for v in map(judge, of_model) if v is not None]
        if not found:
            continue
        decisive = next((v for v in found if v.outcome != GO), found[-1])
        met = sum(v.outcome == GO for v in found)
        figures = f"{decisive.figures}; met at {met} of {len(found)} caps"
        verdicts.append(Verdict(criterion.id, model, decisive.outcome, figures, decisive.records))
    return verdicts


# ---- quality ----


@KINDS.register("quality")
def quality(
    evidence: Evidence,
    criterion: Criterion,
    *,
    text: str,
    baseline: str,
    limit: float,
    policies: list[str] | None = None,
) -> list[Verdict]:
    """ΔPPL of the best of some policies (default: controlled ones) against a baseline is at most `limit` percent."""

    def judge(group: list[PointRecord]) -> Verdict | None:
        best = _best(once(named(group, policies)), group, baseline)
        if best is None:
            return None
        outcome = GO if best.high <= limit else NO_GO
        return Verdict(criterion.id, "", outcome, str(best), (best.point.id, best.other.id))

    return by_model(criterion, groups(evidence, text), judge)


@KINDS.register("quality-and-speed")
def quality_and_speed(
    evidence: Evidence, criterion: Criterion, *, text: str, limit: float, tpot_limit: float
) -> list[Verdict]:
    """A controlled policy has ΔPPL of at most `limit` percent against recompute and TPOT of at most the best lazy's."""

    def judge(group: list[PointRecord]) -> Verdict | None:
        found = []
        for point in named(group, None):
            beside = [p for p in timed_beside(point, group) if is_lazy(p)]
            lazy = min(beside, key=lambda p: p.tpot_ms or 0, default=None)
            against_recompute = against([point], group, "recompute")
            if lazy and lazy.tpot_ms and point.tpot_ms and against_recompute:
                found.append((against_recompute, point.tpot_ms / lazy.tpot_ms, lazy))
        if not found:
            return None
        fast = [one for one in found if one[1] <= tpot_limit]
        best, ratio, lazy = min(fast or found, key=lambda one: one[0].high)
        outcome = GO if fast and best.high <= limit else NO_GO
        figures = f"{best}, TPOT {ratio:.3f} × {lazy.label}"
        return Verdict(criterion.id, "", outcome, figures, (best.point.id, best.other.id, lazy.id))

    return by_model(criterion, groups(evidence, text), judge)


@KINDS.register("not-worse")
def not_worse(
    evidence: Evidence, criterion: Criterion, *, text: str, policies: list[str], rivals: list[str], margin: float
) -> list[Verdict]:
    """The best of some policies has at most `margin` percent more perplexity than the best rival, token by token."""

    def judge(group: list[PointRecord]) -> Verdict | None:
        strict = baseline(group, "strict")
        rival = _lowest(once(named(group, rivals)))
        own = _lowest(once(named(group, policies)))
        found = compared(own, rival) if own and rival and strict else None
        if found is None:
            return None
        outcome = GO if found.high <= margin else NO_GO
        return Verdict(criterion.id, "", outcome, str(found), (found.point.id, found.other.id))

    return by_model(criterion, groups(evidence, text), judge)


@KINDS.register("improves")
def improves(
    evidence: Evidence, criterion: Criterion, *, policies: list[str], noise: float = 1.0, rounds: int = 2
) -> list[Verdict]:
    """A step improves ΔPPL and TPOT of lazy with the same R (or the fastest lazy), both beyond `noise` percent.

    TPOT must also improve by more than the repeated timings of the two points differ among themselves.

    A round is a model, text and cap. Stop-loss where none of at least `rounds` rounds improves both.
    """
    seen: list[tuple[bool, Compared, float]] = []
    for of_model in groups(evidence).values():
        for group in of_model:
            tried = [t for p in named(group, policies) if (t := _against_lazy(p, group, noise)) is not None]
            if tried:
                seen.append(min(tried, key=lambda t: (not t[0], t[1].high)))
    if len(seen) < rounds:
        return []
    good = [one for one in seen if one[0]]
    both, best, ratio = min(good or seen, key=lambda t: t[1].high)
    name = f"{best.point.model['name']} on {best.point.data['name']}"
    figures = f"both improve in {len(good)} of {len(seen)} rounds; {name}, {best}, TPOT {ratio:.3f} ×"
    return [Verdict(criterion.id, "", GO if both else STOP_LOSS, figures, (best.point.id, best.other.id))]


def _against_lazy(point: PointRecord, group: list[PointRecord], noise: float) -> tuple[bool, Compared, float] | None:
    lazies = [p for p in timed_beside(point, group) if is_lazy(p)]
    every = point.policy["options"].get("compress_every")
    same = [p for p in lazies if p.policy["options"].get("compress_every") == every] or lazies
    other = min(same, key=lambda p: p.tpot_ms or 0, default=None)
    found = compared(point, other)
    if found is None or other is None or not point.tpot_ms or not other.tpot_ms:
        return None
    ratio = point.tpot_ms / other.tpot_ms
    repeated = max(_spread(point), _spread(other))
    return found.high < -noise and ratio < min(1 - noise / 100, 1 / repeated), found, ratio


def _spread(point: PointRecord) -> float:
    """Largest over smallest TPOT of a point's repeated timings; 1 without a repetition."""
    low, high = point.speed["tpot_ms_range"] if point.speed else (1.0, 1.0)
    return float(high / low)


def _best(points: Iterable[PointRecord], group: Iterable[PointRecord], baseline: str) -> Compared | None:
    found = [c for p in points if (c := against([p], group, baseline)) is not None]
    return min(found, key=lambda c: c.high, default=None)


def _lowest(points: Iterable[PointRecord]) -> PointRecord | None:
    return min((p for p in points if p.ppl is not None), key=lambda p: p.ppl or 0, default=None)


# ---- stop-loss of every direction ----


@KINDS.register("finite")
def finite(evidence: Evidence, criterion: Criterion) -> list[Verdict]:
    """No point failed with logits that are not finite."""
    bad = [p for p in evidence.failed if "not finite" in (p.status_reason or "")]
    scored = [p for p in evidence.points if p.quality]
    if not bad and not scored:
        return []
    figures = f"{len(bad)} of {len(scored) + len(bad)} scored points"
    return [Verdict(criterion.id, "", STOP_LOSS if bad else GO, figures, tuple(p.id for p in bad or scored[-1:]))]


@KINDS.register("reproducible")
def reproducible(evidence: Evidence, criterion: Criterion, *, limit: float) -> list[Verdict]:
    """Largest over smallest TPOT of the repeats of a point is at most `limit`, on the engine's fastest rung."""
    spreads = []
    for point in evidence.points:
        speed = point.speed
        if speed and len(speed["repeats"]) > 1 and speed["backend"] == FASTEST:
            low, high = speed["tpot_ms_range"]
            spreads.append((high / low, point))
    if not spreads:
        return []
    worst, point = max(spreads, key=lambda one: one[0])
    met = sum(spread <= limit for spread, _ in spreads)
    figures = f"worst {worst:.4f} ({point.name}); within the limit at {met} of {len(spreads)} points"
    return [Verdict(criterion.id, "", GO if worst <= limit else STOP_LOSS, figures, (point.id,))]


@KINDS.register("same-attention")
def same_attention(evidence: Evidence, criterion: Criterion) -> list[Verdict]:
    """Every scored point ran under transformers' own attention, SDPA or eager."""
    scored = [p for p in evidence.points if p.quality and p.quality["backend"] == "hf"]
    if not scored:
        return []
    used = sorted({str(p.model["attn_implementation"]) for p in scored})
    outcome = GO if set(used) <= {"sdpa", "eager"} else STOP_LOSS
    return [Verdict(criterion.id, "", outcome, f"{counted(len(scored), 'point')}: {', '.join(used)}", (scored[-1].id,))]


# ---- speed ----


@KINDS.register("tpot-ratio")
def tpot_ratio(
    evidence: Evidence,
    criterion: Criterion,
    *,
    rung: str,
    against: str,
    limit: float,
    policy: str = "strict",
    against_policy: str = "strict",
    shape: str = LADDER_SHAPE,
    otherwise: str = NO_GO,
) -> list[Verdict]:
    """TPOT of a rung over another's is at most `limit`: newest timings of one card, in turns, or of one command.

    Turns too short for an interval count only where there are no longer ones.
    """
    of = {"model": shape, "short": True}
    own = select(evidence.bench, rung=rung, policy=policy, **of)  # type: ignore[arg-type]
    others = select(evidence.bench, rung=against, policy=against_policy, **of)  # type: ignore[arg-type]
    turns = [(a, b) for a, b in _in_turns(evidence.bench) if a in own and b in others]
    beside = [(a, b) for a in own for b in others if a.session == b.session and _alike(a, b)]
    if not turns and not beside:
        return []
    owns = of_one_card([a for a, _ in turns or beside])
    on_card = [pair for pair in turns or beside if any(pair[0] is own for own in owns)]
    sure = [pair for pair in on_card if turns and _ratio(*pair).high is not None]
    a, b = max(sure or on_card, key=lambda pair: pair[0].created)
    ratio, interval, high = a.steady["tpot_ms"] / b.steady["tpot_ms"], "one command, no interval", None
    if turns:
        found = _ratio(a, b)
        ratio, high, interval = found.value, found.high, f"{found}, in turns"
    outcome = GO if (ratio if high is None else high) <= limit else otherwise
    tpots = f"{a.steady['tpot_ms']:.3f} against {b.steady['tpot_ms']:.3f} ms on an {a.hardware}"
    figures = f"{ratio:.3f} × ({tpots}; {interval})"
    return [Verdict(criterion.id, a.model["name"], outcome, figures, (a.id, b.id))]


def _ratio(a: BenchRecord, b: BenchRecord) -> Ratio:
    return ratio_of_times(a.chunks["seconds"], b.chunks["seconds"])


def _in_turns(records: Sequence[BenchRecord]) -> list[tuple[BenchRecord, BenchRecord]]:
    """Pairs that took turns, either way round."""
    found = pairs(records)
    return [*found, *((b, a) for a, b in found)]


def _alike(a: BenchRecord, b: BenchRecord) -> bool:
    same = [(r.protocol["cap"], r.protocol["streams"], speed_conditions(r)) for r in (a, b)]
    return same[0] == same[1]


@KINDS.register("tail")
def tail(evidence: Evidence, criterion: Criterion, *, limit: float, tokens: int) -> list[Verdict]:
    """P99 over P50 of the time between tokens is at most `limit`: fastest rung, newest timing of at least `tokens`.

    Of a model, on one card.
    """
    rung = fastest_rung(evidence.bench)
    found = newest([r for r in select(evidence.bench, rung=rung) if r.steady["tokens"] >= tokens])
    return _worst(
        criterion, found, limit, "P99 / P50", lambda r: r.latency_ms["all"]["p99"] / r.latency_ms["all"]["p50"]
    )


@KINDS.register("floor")
def floor(evidence: Evidence, criterion: Criterion, *, limit: float) -> list[Verdict]:
    """TPOT over the byte floor is at most `limit`: fastest rung, strict, 2,052 slots, one stream, random shapes.

    Of a model, on one card.
    """
    rung = fastest_rung(evidence.bench)
    timed = select(evidence.bench, rung=rung, policy="strict", cap=LADDER_CAP, streams=1, short=True)
    found = newest([r for r in timed if r.steady["tokens"] >= LEAST_TOKENS])
    return _worst(criterion, found, limit, "× the byte floor", lambda r: r.steady["over_floor"])


def _worst(
    criterion: Criterion, found: Sequence[BenchRecord], limit: float, what: str, figure: Callable[[BenchRecord], float]
) -> list[Verdict]:
    """One verdict a model, by its worst record of one card."""
    of_model: dict[str, list[BenchRecord]] = defaultdict(list)
    for record in found:
        of_model[record.model["name"]].append(record)
    worst = {name: max(of_one_card(records), key=figure) for name, records in sorted(of_model.items())}
    return [
        Verdict(
            criterion.id, name, GO if figure(r) <= limit else NO_GO, f"{figure(r):.4f} {what} ({r.hardware})", (r.id,)
        )
        for name, r in worst.items()
    ]
