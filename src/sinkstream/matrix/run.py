"""Running a matrix: what is done already, one point after the other, each written in one piece."""

import shlex
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from rich.console import Console

from sinkstream.evaluation.backends import BACKENDS, check_positions
from sinkstream.evaluation.runner import check_writable, save_or_rescue, uninterrupted
from sinkstream.matrix.estimate import Remaining, in_words
from sinkstream.matrix.file import Matrix
from sinkstream.matrix.measure import DeviceLost, Workbench
from sinkstream.matrix.point import Point
from sinkstream.matrix.record import PointRecord
from sinkstream.models import KnownModel, known_model
from sinkstream.show.progress import say
from sinkstream.show.table import counted

STATES = ("open", "failed", "complete")
#: Measures points in any order: yields (point, content of its record, seconds) as they end.
Measure = Callable[[Sequence[Point]], Iterator[tuple[Point, dict[str, Any], float]]]


def states(points: Iterable[Point], out: Path) -> dict[str, str]:
    """Id of every point -> "complete", "failed" or "open". Raises ValueError if a record is broken."""
    found = {}
    for point in points:
        path = out / f"{point.id}.json"
        found[point.id] = PointRecord.read(path).status if path.exists() else "open"
    return found


def selected(matrix: Matrix, only: Sequence[str]) -> list[Point]:
    """The points whose name holds all words of one of `only`, or whose id is one of them; all without any.

    Words are quoted as in a shell: ``"cap 128" lazy`` are two.

    Raises ValueError if one of `only` holds no word or selects no point, and for a model or text of theirs that has no
    place.
    """
    wanted = [_words(one) for one in only]
    for one, words in zip(only, wanted):
        if not any(_has(point, words) for point in matrix.points):
            shown, rest = "; ".join(p.name for p in matrix.points[:5]), " …" if len(matrix.points) > 5 else ""
            raise ValueError(f"--only {one!r}: no point has all these words; points are: {shown}{rest}")
    points = [p for p in matrix.points if not wanted or any(_has(p, words) for words in wanted)]
    for point in points:
        point.model.check_given()
        point.text.check_given()
    return points


def _words(text: str) -> list[str]:
    """The words of one ``--only``. Raises ValueError: no word, or a quotation that does not end."""
    try:
        words = shlex.split(text.lower())
    except ValueError as error:
        raise ValueError(f"--only {text!r}: {error}; accepted: words, those with blanks in quotation marks") from error
    if not words:
        raise ValueError(f"--only {text!r} holds no word; accepted: words of the names of points, or an id")
    return words


def _has(point: Point, words: Sequence[str]) -> bool:
    """Whether a point is meant by the words; its id is asked where its places are known, which the hash needs."""
    given = point.model.spec and point.text.spec
    return all(word in point.name.lower() for word in words) or bool(given and [point.id] == list(words))


def dry_run(matrix: Matrix, points: Sequence[Point], out: Path, console: Console) -> dict[str, str]:
    """List the points, their states, ids and estimated time, and what a run would refuse.

    Returns the id of every open point that would fail, and why. Raises ValueError as `run_points`; `out` is not made.
    """
    state, remaining = states(points, out), Remaining(points)
    check_writable(out, keep=False)
    unmeasured, known = [p for p in points if state[p.id] == "open"], cache(known_model)
    refused = {p.id: why for p in unmeasured if (why := refusal(p, known)) is not None}
    for point in points:
        about = "" if state[point.id] == "complete" else f", about {in_words(remaining.estimates[point.id])}"
        quality = f"quality {point.settings.backend} in {point.settings.evaluate}" if point.scored else "no quality"
        speed = f"speed {point.rung}" if point.speed else "no speed"
        say(console, f"{point.id}  {state[point.id]:8}  {point.name}: {quality}, {speed}{about}")
        if point.id in refused:
            say(console, f"{point.name} will fail: {refused[point.id]}", "yellow")
    for spec in dict.fromkeys(p.model.spec for p in unmeasured if p.id not in refused):
        model = known(spec)
        if model is None or model.trained_positions is None:
            say(console, f"model {spec!r}: its trained positions are not known before it is loaded", "yellow")
    for point in matrix.without_baseline():
        say(console, f"{point.name}: no strict or recompute point to be compared with", "yellow")
    counts = Counter(state.values())
    left = sum(remaining.estimates[p.id] for p in unmeasured if p.id not in refused)
    parts = ", ".join(f"{counts[name]} {name}" for name in STATES if counts[name])
    fail = f", {len(refused)} will fail" if refused else ""
    many = counted(len(points), "point")
    say(console, f"{many} ({parts}{fail}); about {in_words(left)} for the open ones, by formula")
    return refused


def refusal(point: Point, known: Callable[[str], KnownModel | None] = known_model) -> str | None:
    """Why a point would fail before its first token, as far as `known` says it of the model; None: nothing is known.

    What is checked: that there is a model, its trained positions, and whether a backend runs the policy.
    """
    try:
        model, tokens = known(point.model.spec), point.text.tokens
        if model is None:
            return None
        if point.scored:
            BACKENDS[point.settings.backend].check_settings(point.settings)
            check_positions(point.settings, model.trained_positions, model.name, tokens)
        if point.speed:
            config = point.bench_config(untrained=model.source == "random")
            BACKENDS[config.rung].check_settings(config.run)
            check_positions(config.run, model.trained_positions, model.name)
    except ValueError as error:
        return str(error)
    return None


def run_points(
    points: Sequence[Point], out: Path, measure: Measure, console: Console, *, retry_failed: bool = False
) -> Counter[str]:
    """Measure all points that have no record, with `retry_failed` also those that failed; returns counts by status.

    Every point is written when it ends, failed ones too. Raises ValueError if `out` cannot be written to or a record
    there is broken; WriteError if a record cannot be written; KeyboardInterrupt after Ctrl-C: nothing that has ended is
    lost then.
    """
    before = states(points, out)
    check_writable(out)
    todo = [p for p in points if before[p.id] == "open" or (retry_failed and before[p.id] == "failed")]
    counts = Counter(before[p.id] for p in points if p not in todo)
    remaining, done = Remaining(todo), len(points) - len(todo)
    if todo:
        left = f"about {in_words(remaining.seconds)} by formula"
        say(console, f"{len(todo)} of {counted(len(points), 'point')} to measure, {left}; records: {out}")
    for point, content, seconds in measure(todo):
        with uninterrupted():
            save_or_rescue(partial(PointRecord.write, content), out)
        remaining.done(point.id, seconds)
        done += 1
        counts[content["status"]] += 1
        left = f", about {in_words(remaining.seconds)} left" if done < len(points) else ""
        say(console, f"[{done}/{len(points)}] {point.name}: {_outcome(content)} in {in_words(seconds)}{left}")
    return counts


def one_by_one(matrix: Matrix, bench: Workbench) -> Measure:
    """Measures on this machine, in order; a lost device ends it, with the record of the point that found it lost."""

    def measure(points: Sequence[Point]) -> Iterator[tuple[Point, dict[str, Any], float]]:
        for point in points:
            start, lost = time.perf_counter(), None
            try:
                content = bench.measure(point, matrix.baselines(point))
            except DeviceLost as error:
                content, lost = error.content, error
            yield point, content, time.perf_counter() - start
            if lost is not None and point is not points[-1]:
                raise OSError(f"{lost}; call the command again for the other points") from lost

    return measure


def _outcome(content: dict[str, Any]) -> str:
    if content["status"] != "complete":
        return f"failed: {content['status_reason']}"
    quality, speed = content["quality"], content["speed"]
    ppl = quality and quality["summary"]["ppl"]
    figures = [f"PPL {ppl:,.3f}"] if ppl is not None else []
    figures += [f"{speed['tpot_ms']:,.3f} ms per token ({speed['backend']})"] if speed else []
    return ", ".join(figures)
