"""One point of a matrix: what is scored and what is timed, with an id that is the hash of all of it."""

from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from sinkstream.bench.rungs import default_rung
from sinkstream.bench.settings import STEADY_TOKENS, BenchConfig, Protocol
from sinkstream.data import load_text
from sinkstream.data.text import TEXTS
from sinkstream.evaluation.backends import BACKENDS, EngineBackend
from sinkstream.evaluation.settings import BASELINES, BLOCK_TOKENS, RunSettings
from sinkstream.measure.timing import WARMUP_TOKENS
from sinkstream.models import check_seed, resolve_device, resolve_dtype, source_name
from sinkstream.models.checkpoint import weight_files
from sinkstream.models.hashing import sha256_of_files, sha256_of_json
from sinkstream.policies.options import check_whole
from sinkstream.records.plain import scrub_paths

CONFIGURATION = 1  # version of what the id is the hash of
AUTO, NONE = "auto", "none"
#: Baseline -> the rung that times it; eviction policies take the engine's fastest rung of the device.
BASELINE_RUNGS = {"full": "hf-full", "recompute": "hf-recompute-sdpa"}


@dataclass(frozen=True)
class Origin:
    """A model or a text of a matrix: the name in the file, and where it comes from."""

    kind: str  # {"model", "text"}
    name: str
    spec: str  # as for ``--model`` or ``--text``; empty: to be given on the command line
    tokens: int | None = None  # of a text: how many of its tokens a point takes; None: the text's own number

    @cached_property
    def sha256(self) -> str | None:
        """Hash of the weights or of the text where they are files; None for what a name alone identifies."""
        return weights_sha256(self.spec) if self.kind == "model" else text_sha256(self.spec)

    def check_given(self) -> None:
        """Raise ValueError if the file leaves the place open and the command line does not give one."""
        if not self.spec:
            raise ValueError(f"{self.kind} {self.name!r} has no place; give --{self.kind} {self.name}=PATH")

    def record(self) -> dict[str, Any]:
        """JSON-able; a path is reduced to its last component."""
        tokens = {"tokens": self.tokens} if self.kind == "text" else {}
        return {"name": self.name, "source": scrub_paths(self.spec), "sha256": self.sha256, **tokens}


@dataclass(frozen=True)
class Speed:
    """How the speed of a point is measured: as ``sinkstream bench`` does."""

    backend: str = AUTO  # a rung; "auto": the baseline's own, or the engine's fastest of the device
    steady_tokens: int = STEADY_TOKENS
    warmup_tokens: int = WARMUP_TOKENS
    repeats: int = 1  # measurements; the figure is their median

    def __post_init__(self) -> None:
        for name, least in (("repeats", 1), ("steady_tokens", 2), ("warmup_tokens", 1)):
            check_whole(name, getattr(self, name), least)
        Protocol(self.steady_tokens, self.warmup_tokens)

    def rung(self, method: str, device: str) -> str:
        """The rung that times a method on a kind of device."""
        if self.backend != AUTO:
            return self.backend
        return BASELINE_RUNGS.get(method) or default_rung(resolve_device(device))


@dataclass(frozen=True)
class Point:
    """One point. Raises ValueError, naming the value and what is accepted, if its parts do not fit together."""

    model: Origin
    text: Origin
    settings: RunSettings  # of the quality run, block size included
    scored: bool = True  # whether quality is measured
    speed: Speed | None = field(default_factory=Speed)  # None: no speed is measured
    device: str = "cpu"  # as for ``--device``
    dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.scored and self.speed is None:
            raise ValueError("quality_backend and speed_backend are both none: the point measures nothing")
        check_seed(self.seed)
        self.settings.policy()
        if self.speed and self.speed.backend != AUTO:
            baseline = BACKENDS[self.speed.backend].baseline
            engine = issubclass(BACKENDS[self.speed.backend], EngineBackend)
            method = self.settings.method
            if (baseline is not None and baseline != method) or (engine and method in BASELINES):
                raise ValueError(f"speed_backend={self.speed.backend!r} does not run policy {method!r}; accepted: auto")

    @cached_property
    def name(self) -> str:
        """For people: model, text, cap and policy."""
        return f"{self.model.name} {self.text.name} cap {self.settings.cap} {self.settings.label()}"

    @property
    def rung(self) -> str | None:
        """The rung that times the point; None without a speed."""
        return self.speed.rung(self.settings.method, self.device) if self.speed else None

    @property
    def timed_settings(self) -> RunSettings:
        """The settings as the benchmark takes them: without what only an evaluation has."""
        names = ("cap", "options", "cap_accounting", "positions", "allow_untrained_positions")
        return RunSettings(self.settings.method, **{name: getattr(self.settings, name) for name in names})

    def bench_config(self, untrained: bool = False) -> BenchConfig:
        """What the benchmark times; `untrained`: the weights are random and were trained on no positions."""
        run, rung = self.timed_settings, self.rung
        assert rung is not None, "a point without a speed is not timed"
        if untrained:
            run = RunSettings(**{**run.record(), "allow_untrained_positions": True})
        return BenchConfig(rung, run)

    @cached_property
    def configuration(self) -> dict[str, Any]:
        """Everything that the figures depend on, but for versions and hardware; JSON-able."""
        run = self.settings
        scoring = {"backend": run.backend, "evaluate": run.evaluate, "sample_every": run.sample_every}
        scoring |= {"block_tokens": run.block_tokens, "timed_tokens": run.timed_tokens, "prefill": run.prefill}
        speed = self.speed and {
            **{"backend": self.rung, "steady_tokens": self.speed.steady_tokens},
            **{"warmup_tokens": self.speed.warmup_tokens, "repeats": self.speed.repeats},
        }
        return {
            "version": CONFIGURATION,
            "model": self.model.record(),
            "text": self.text.record(),
            "policy": {"name": run.method, "options": dict(sorted(run.options.items()))},
            "cap": run.cap,
            "cap_accounting": run.cap_accounting,
            "positions": run.positions,
            "allow_untrained_positions": run.allow_untrained_positions,
            "quality": scoring if self.scored else None,
            "speed": speed,
            "dtype": self.dtype,
            "device": self.device.partition(":")[0],
            "seed": self.seed,
        }

    @cached_property
    def id(self) -> str:
        """The name of the point's record."""
        return f"point-{sha256_of_json(self.configuration)[:16]}"

    @property
    def timing(self) -> str:
        """Equal for points that share a timing: they differ in their text, or in how quality is scored."""
        return repr((self.model, self.timed_settings, self.speed, self.device, self.dtype, self.seed))

    @property
    def group(self) -> tuple[Any, ...]:
        """What a point shares with the baselines that it can be paired with, the cap left out."""
        run = self.settings
        prefill = run.cap if run.prefill is None else run.prefill
        return (self.model, self.text, prefill, self.dtype, self.device, self.seed)


def make_point(model: Origin, text: Origin, values: dict[str, Any], device: str | None, dtype: str | None) -> Point:
    """A point from the flat keys of a matrix file (`matrix.file.KEYS`), checked; `device` and `dtype` as typed.

    Raises ValueError as `Point`, `RunSettings` and `Speed` do.
    """
    place = resolve_device(device)
    precision = str(resolve_dtype(values.get("dtype") or dtype, place)).removeprefix("torch.")
    given = {name: value for name, value in values.items() if value is not None}
    names = ("cap", "cap_accounting", "positions", "allow_untrained_positions", "prefill", "evaluate")
    run: dict[str, Any] = {name: given[name] for name in names if name in given}
    method = values["policy"]["name"]
    if method == "recompute":
        run["sample_every"] = given.get("sample_every", 1)
    scoring = values.get("quality_backend", "hf")
    block_tokens = given.get("block_tokens", BLOCK_TOKENS.get(place.type, RunSettings.block_tokens))
    settings = RunSettings(
        method,
        options=values["policy"]["options"],
        backend="hf" if scoring == NONE else scoring,
        block_tokens=block_tokens,
        **({"evaluate": "blocks"} | run),
    )
    timed = {name: given[name] for name in ("steady_tokens", "warmup_tokens", "repeats") if name in given}
    backend = values.get("speed_backend", AUTO)
    speed = None if backend == NONE else Speed(backend, **timed)
    return Point(model, text, settings, scoring != NONE, speed, str(place), precision, given.get("seed", 0))


@lru_cache(maxsize=64)
def weights_sha256(spec: str) -> str | None:
    """Hash of the weight files of a directory or a .gguf file; None for a name. Raises ValueError if they lack."""
    source, path = source_name(spec), Path(spec).expanduser()
    if source == "gguf" and path.is_file():
        return sha256_of_files([path])
    if source == "directory" and path.is_dir():
        return sha256_of_files(weight_files(path, spec))
    if source in ("gguf", "directory"):
        raise ValueError(f"model {spec!r} does not exist; accepted: a directory, a .gguf file, builtin, a hub id")
    return None


@lru_cache(maxsize=64)
def text_sha256(spec: str) -> str | None:
    """Hash of a text that is a file; None for a text that has a name. Raises ValueError as `load_text`."""
    return None if spec in (*TEXTS, "random") else load_text(spec).sha256
