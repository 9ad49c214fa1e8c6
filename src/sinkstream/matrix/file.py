"""Matrix files: TOML in, checked points out, baselines linked."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sinkstream.evaluation.backends import BACKENDS, evaluation_backends
from sinkstream.evaluation.settings import BASELINES, EVALUATE, method_names
from sinkstream.matrix.point import AUTO, NONE, Origin, Point, make_point
from sinkstream.models.placement import DTYPES
from sinkstream.policies import CAP_ACCOUNTING, option_specs
from sinkstream.records.toml_files import read_toml
from sinkstream.registry import did_you_mean

TABLES = ("name", "description", "models", "texts", "defaults", "grid", "point")
#: Key of a point -> (type, accepted names or None). Keys of policies come from the registries.
KEYS: dict[str, tuple[type, Sequence[str] | None]] = {
    "model": (str, None),
    "text": (str, None),
    "policy": (str, None),
    "cap": (int, None),
    "cap_accounting": (str, CAP_ACCOUNTING.names()),
    "positions": (str, ("cache", "original")),
    "allow_untrained_positions": (bool, None),
    "prefill": (int, None),
    "quality_backend": (str, [*evaluation_backends(), NONE]),
    "evaluate": (str, list(EVALUATE)),
    "block_tokens": (int, None),
    "sample_every": (int, None),
    "speed_backend": (str, [AUTO, *BACKENDS, NONE]),
    "steady_tokens": (int, None),
    "warmup_tokens": (int, None),
    "repeats": (int, None),
    "dtype": (str, list(DTYPES)),
    "seed": (int, None),
}
WORDS = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
BASELINE_NAMES = ("recompute", "strict", "full")


def policy_keys() -> dict[str, type]:
    """Every policy option and its type."""
    return {spec.name: spec.type for spec in option_specs()} | {"scorer": str}


@dataclass(frozen=True)
class Matrix:
    """The points of a file, each once, in the order in which they run."""

    name: str
    path: Path
    points: list[Point]

    def baselines(self, point: Point) -> dict[str, Point | None]:
        """Of every kind of baseline the point that `point` is compared with; None where the matrix has none.

        Model, text, prefill, precision, device and seed are the same. Of several, the one of the same cap, else of the
        largest cap below; strict streaming without further options first. A point is no baseline of its own.
        """
        same = [other for other in self.points if other.group == point.group and other.scored and other != point]
        found: dict[str, Point | None] = {}
        for name in BASELINE_NAMES:
            ranked = sorted((r, i) for i, other in enumerate(same) if (r := _rank(other, point, name)) is not None)
            found[name] = same[ranked[0][1]] if ranked else None
        return found

    def without_baseline(self) -> list[Point]:
        """Scored points of eviction policies that have neither strict streaming nor recompute to be compared with."""
        scored = [p for p in self.points if p.scored and p.settings.method not in (*BASELINES, "strict")]
        return [p for p in scored if not any(self.baselines(p)[name] for name in ("strict", "recompute"))]


def read_matrix(
    path: Path,
    models: Sequence[str] = (),
    texts: Sequence[str] = (),
    device: str | None = None,
    dtype: str | None = None,
) -> Matrix:
    """The points of a TOML file.

    Parameters
    ----------
    path : Path
    models, texts : sequence of str
        Places that replace those of the file, as ``NAME=PATH``; without a name if the file has one only, whose points
        are then called after the place.
    device, dtype : str or None
        As typed; default as for ``sinkstream eval``.

    Raises ValueError, naming the file and the line, table, key or value: the file cannot be read, is no TOML, has an
    unknown key or a value that is not accepted, or a point does not fit together.
    """
    content = read_toml(path)
    _check_names(content, TABLES, str(path))
    for key in ("name", "description"):
        if not isinstance(content.get(key, ""), str):
            raise ValueError(f"{path}: {key}={content[key]!r} is not accepted; accepted: a string")
    origins = {
        "model": _origins(content, "model", path, models),
        "text": _origins(content, "text", path, texts),
    }
    defaults = content.get("defaults", {})
    points: dict[tuple[Any, ...], Point] = {}
    for where, values in _tables(content, defaults, path):
        model = _named(origins["model"], values, "model", where)
        text = _named(origins["text"], values, "text", where)
        try:
            point = make_point(model, text, values, device, dtype)
            point.settings.prefill_tokens(text.tokens or 10**9)
        except ValueError as error:
            shown = ", ".join(f"{k}={v}" for k, v in values.items() if k not in ("model", "text"))
            raise ValueError(f"{where}: a point does not fit ({shown}): {error}") from error
        points.setdefault((point.name, repr(point)), point)
    if not points:
        raise ValueError(f"{path}: no points; accepted: at least one [[grid]] or [[point]]")
    return Matrix(content.get("name", path.stem), path, _ordered(list(points.values())))


def _ordered(points: list[Point]) -> list[Point]:
    """By model, so that each is loaded once, baselines first, else in the order of the file.

    What transformers times comes before the engine packs the weights, and what is compared after what it is compared
    with.
    """
    models = list(dict.fromkeys(point.model for point in points))

    def key(point: Point) -> tuple[int, int]:
        method, options = point.settings.method, point.settings.options
        first = 0 if method in BASELINES else 1 if method == "strict" and options.keys() <= {"sink", "window"} else 2
        return models.index(point.model), first

    return sorted(points, key=key)


def _rank(other: Point, point: Point, name: str) -> tuple[int, int, int] | None:
    """How well another point serves as the baseline `name`, smaller is better; None if it does not."""
    run, cap = other.settings, point.settings.cap or 0
    plain = run.options.keys() <= {"sink", "window"} and run.positions == "cache"
    if run.method != name or not plain or (run.cap or 0) > cap:
        return None
    return cap - (run.cap or 0), int("sink" in run.options and run.options["sink"] != 4), len(run.options)


def _check_names(table: Mapping[str, Any], accepted: Sequence[str], where: str) -> None:
    for key in table:
        if key not in accepted:
            meant = did_you_mean(key, accepted)
            raise ValueError(f"{where}: unknown key {key!r}{meant}; accepted: {', '.join(accepted)}")


def _origins(content: Mapping[str, Any], kind: str, path: Path, given: Sequence[str]) -> dict[str, Origin]:
    """Name -> origin of the models or the texts, with those of the command line in place."""
    table = content.get(f"{kind}s", {})
    if not isinstance(table, Mapping) or not table:
        raise ValueError(f"{path}: [{kind}s] is missing; accepted: a table of NAME = PLACE")
    found = {}
    for name, value in table.items():
        entry = {"source": value} if isinstance(value, str) else value
        where = f"{path}: [{kind}s] {name}"
        if not isinstance(entry, Mapping) or not isinstance(entry.get("source"), str):
            raise ValueError(f"{where}={value!r} is not accepted; accepted: a string, or a table with source")
        _check_names(entry, ("source", "tokens") if kind == "text" else ("source",), where)
        tokens = entry.get("tokens")
        if tokens is not None and (isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 2):
            raise ValueError(f"{where}: tokens={tokens!r} is not accepted; accepted: a whole number of at least 2")
        found[name] = Origin(kind, name, entry["source"], tokens)
    for one in given:
        key, equals, spec = one.partition("=")
        name = key
        if not equals or key not in found:
            if len(found) > 1 or (equals and not Path(one).exists()):
                raise ValueError(f"--{kind} {one}: accepted: NAME=PLACE with NAME one of {', '.join(found)}")
            key, spec, name = next(iter(found)), one, _name_of(one)
        found[key] = Origin(kind, name, spec, found[key].tokens)
    return found


def _name_of(place: str) -> str:
    """What a model or text is called whose name nobody typed: points of another model must not bear the file's name."""
    path = Path(place)
    return path.stem if path.suffix in (".gguf", ".json", ".jsonl", ".txt") else path.name


def _named(origins: Mapping[str, Origin], values: Mapping[str, Any], kind: str, where: str) -> Origin:
    name = values.get(kind)
    if name is None and len(origins) == 1:
        return next(iter(origins.values()))
    if name is None or name not in origins:
        raise ValueError(f"{where}: {kind}={name!r} is not in [{kind}s]; accepted: {', '.join(origins)}")
    return origins[name]


def _tables(content: Mapping[str, Any], defaults: Any, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, values) of every point: the products of the grids, then the single points."""
    options = policy_keys()
    checked = _checked(defaults, options, f"{path}: [defaults]", several=False)
    for kind, several in (("grid", True), ("point", False)):
        tables = content.get(kind, [])
        if not isinstance(tables, list):
            raise ValueError(f"{path}: [{kind}] is not accepted; accepted: [[{kind}]]")
        for number, table in enumerate(tables, 1):
            where = f"{path}: [[{kind}]] {number}"
            own = _checked(table, options, where, several=several)
            lists = {name: [value] for name, value in checked.items()}
            lists |= own if several else {name: [value] for name, value in own.items()}
            for chosen in itertools.product(*lists.values()):
                yield where, _with_policy(dict(zip(lists, chosen)), options, where)


def _checked(table: Any, options: Mapping[str, type], where: str, *, several: bool) -> dict[str, Any]:
    """The keys of a table with values of the right type; lists of them where `several`."""
    if not isinstance(table, Mapping):
        raise ValueError(f"{where} is not accepted; accepted: a table")
    _check_names(table, [*KEYS, *options], where)
    found: dict[str, Any] = {}
    for key, value in table.items():
        values = value if isinstance(value, list) and several else [value]
        if not values:
            raise ValueError(f"{where}: {key} is an empty list; accepted: one value, or several")
        checked = [_value(key, one, options, where) for one in values]
        found[key] = checked if several else checked[0]
    return found


def _value(key: str, value: Any, options: Mapping[str, type], where: str) -> Any:
    """One value: None for "none", a policy as a table of its name and options."""
    if key == "policy":
        return _policy(value, options, where)
    kind, names = KEYS.get(key, (options.get(key), None))
    if value == NONE and not (names and NONE in names):
        return None
    number = kind is float and isinstance(value, int)
    if kind is None or not (isinstance(value, kind) or number) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{where}: {key}={value!r} is not accepted; accepted: {WORDS[kind or str]}")
    if names is not None and value not in names:
        raise ValueError(f"{where}: {key}={value!r} is not accepted; accepted: {', '.join(names)}")
    return value


def _policy(value: Any, options: Mapping[str, type], where: str) -> dict[str, Any]:
    table = {"name": value} if isinstance(value, str) else value
    if not isinstance(table, Mapping) or table.get("name") not in method_names():
        name = table.get("name") if isinstance(table, Mapping) else table
        meant = did_you_mean(str(name), method_names())
        raise ValueError(f"{where}: policy={name!r} is not known{meant}; accepted: {', '.join(method_names())}")
    given = {key: one for key, one in table.items() if key != "name"}
    _check_names(given, list(options), f"{where}: policy {table['name']!r}")
    return {"name": table["name"], "options": {k: _value(k, v, options, where) for k, v in given.items()}}


def _with_policy(values: dict[str, Any], options: Mapping[str, type], where: str) -> dict[str, Any]:
    """The values with the policy options inside the policy; those of the policy's own table win."""
    if values.get("policy") is None:
        raise ValueError(f"{where}: policy is missing; accepted: {', '.join(method_names())}")
    if values.get("cap") is None:
        raise ValueError(f"{where}: cap is missing; accepted: the KV slots of the point (the prefill of a full cache)")
    shared = {key: value for key, value in values.items() if key in options}
    policy = values["policy"]
    merged = {k: v for k, v in (shared | policy["options"]).items() if v is not None}
    rest = {key: value for key, value in values.items() if key not in options}
    return rest | {"policy": {"name": policy["name"], "options": merged}}
