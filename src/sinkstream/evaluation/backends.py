"""Every way of decoding, in one registry: the backends of the evaluation and the rungs of the benchmark.

The slowest come first: the order of the ladder.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch

from sinkstream.cache.streaming import check_trained
from sinkstream.engine import STEPS, Engine, GraphedStep
from sinkstream.engine.recalling import check_recall_settings
from sinkstream.evaluation.cut import CutDecoder
from sinkstream.evaluation.decoders import Decoder, EngineDecoder, FullDecoder, RecomputeDecoder, StreamingDecoder
from sinkstream.evaluation.settings import BASELINES, RunSettings
from sinkstream.models import LoadedModel
from sinkstream.registry import Registry

BACKENDS: Registry[type["Backend"]] = Registry("backend")


class Backend(ABC):
    """One way of decoding, for one model, one run's settings and a number of streams."""

    baseline: ClassVar[str | None] = None  # the only method that runs; None: eviction policies, with "hf" every method
    attention: ClassVar[str | None] = None  # implementation in transformers, where the backend sets it
    grows: ClassVar[bool] = False  # the cache grows with every token, so that a run must end
    needs_gpu: ClassVar[bool] = False  # compiles, or captures graphs, for a GPU
    takes_streams: ClassVar[bool] = False  # steps several streams together
    evaluates: ClassVar[bool] = False  # a choice of the evaluation; the benchmark has all backends

    def __init__(self, loaded: LoadedModel, settings: RunSettings, streams: int = 1):
        self.loaded, self.settings, self.streams = loaded, settings, streams

    @abstractmethod
    def open(self) -> Decoder:
        """A decoder, ready to be fed. Raises ValueError if settings and model do not fit together."""

    def check(self) -> None:
        """Raise ValueError as `open` would."""
        self.open().close()

    @classmethod
    def check_device(cls, device: torch.device) -> None:
        """Raise ValueError if the backend does not run on `device`, whatever the model."""
        if cls.needs_gpu and device.type != "cuda":
            raise ValueError(f"this backend compiles or captures for a GPU and the device is {device}; accepted: cuda")

    @classmethod
    def check_settings(cls, settings: RunSettings, streams: int = 1) -> None:
        """Raise ValueError if the backend does not run settings with so many streams, whatever model and device."""
        if streams > 1 and not cls.takes_streams:
            raise ValueError("this backend runs one stream; accepted: --streams 1, or a backend of the engine")
        if cls.baseline not in (None, settings.method):
            raise ValueError(
                f"this backend runs the baseline {cls.baseline!r} only, and not {settings.method!r};"
                " accepted: --backend hf"
            )


class HfBackend(Backend):
    """The transformers module itself, with the cache that the method asks for."""

    def open(self) -> Decoder:
        loaded, settings = self.loaded, self.settings
        self.check_settings(settings, self.streams)
        check_positions(settings, loaded.trained_positions, loaded.name)
        if settings.method == "full":
            return FullDecoder(loaded.model, settings)
        if settings.method == "recompute":
            return RecomputeDecoder(loaded.model, settings, self.attention)
        return StreamingDecoder(loaded.model, settings, loaded.tokenizer)


@BACKENDS.register("hf-recompute-eager")
class RecomputeEagerBackend(HfBackend):
    """transformers, the last cap tokens forwarded anew for every token, eager attention."""

    baseline, attention = "recompute", "eager"


@BACKENDS.register("hf-recompute-sdpa")
class RecomputeSdpaBackend(HfBackend):
    """transformers, the last cap tokens forwarded anew for every token, SDPA."""

    baseline, attention = "recompute", "sdpa"


@BACKENDS.register("hf-cut")
class CutBackend(HfBackend):
    """transformers' DynamicCache, cut and re-rotated at every prune: streaming as published, without the soft ring."""

    @classmethod
    def check_settings(cls, settings: RunSettings, streams: int = 1) -> None:
        super().check_settings(settings, streams)
        if settings.recall:
            raise ValueError("cut and re-rotate has no recall; accepted: --backend hf, or one of the engine's")

    def open(self) -> Decoder:
        self.check_settings(self.settings, self.streams)
        check_positions(self.settings, self.loaded.trained_positions, self.loaded.name)
        return CutDecoder(self.loaded.model, self.settings)


@BACKENDS.register("hf-full")
class FullBackend(HfBackend):
    """transformers' DynamicCache, nothing evicted; it sees cap tokens in the middle of the run."""

    baseline, grows = "full", True


@BACKENDS.register("hf")
class StreamingBackend(HfBackend):
    """transformers with StreamingCache, the soft ring.

    In the evaluation also the baselines, which have the full cache or none.
    """

    evaluates = True


@BACKENDS.register("hf-static")
class StaticBackend(HfBackend):
    """transformers' generate(cache_implementation="static"), compiled by itself; it ends when its slots are full."""

    baseline, grows, needs_gpu = "full", True, True

    def open(self) -> Decoder:
        raise ValueError(
            "generate() with a static cache runs its own loop, which only the benchmark times; accepted: --backend hf"
        )

    def check(self) -> None:
        """Nothing beyond the settings: generate() serves every model."""
        self.check_settings(self.settings, self.streams)


class EngineBackend(Backend):
    """The engine, its decode step done as the entry `step` of `STEPS` says; no baselines."""

    step: ClassVar[str]
    takes_streams = evaluates = True

    @classmethod
    def check_settings(cls, settings: RunSettings, streams: int = 1) -> None:
        check_method(settings.method, cls.step)
        recall = settings.recall_settings()
        if recall is not None:
            check_recall_settings(recall, settings.eviction_policy, streams)

    def open(self) -> Decoder:
        self.check_settings(self.settings, self.streams)
        return EngineDecoder(self.loaded.model, self.settings, **self._options())

    def check(self) -> None:
        self.check_settings(self.settings, self.streams)
        Engine.check(self.loaded.model, **self._options())

    def _options(self) -> dict[str, Any]:
        settings = self.settings
        return {
            "policy": settings.policy(),
            "backend": self.step,
            "streams": self.streams,
            "positions": settings.positions,
            "allow_untrained_positions": settings.allow_untrained_positions,
            "tokenizer": self.loaded.tokenizer,
            **settings.recall,
        }


def check_method(method: str, backend: str) -> None:
    """Raise ValueError if a method is a baseline, and the backend a step of the engine, which evicts."""
    if method in BASELINES and backend in STEPS:
        raise ValueError(
            f"policy {method!r} is a baseline, which --backend {backend} does not run; accepted: --backend hf, or an"
            " eviction policy"
        )


def _engine_backend(name: str) -> type[EngineBackend]:
    """The backend of an entry of `STEPS`."""

    class OfStep(EngineBackend):
        __doc__ = STEPS[name].__doc__
        step, needs_gpu = name, issubclass(STEPS[name], GraphedStep)

    return OfStep


for _name in STEPS:
    BACKENDS.register(_name)(_engine_backend(_name))


def evaluation_backends() -> list[str]:
    """Names of the backends that run an evaluation."""
    return [name for name, backend in BACKENDS.items() if backend.evaluates]


def open_decoder(loaded: LoadedModel, settings: RunSettings) -> Decoder:
    """A decoder of the settings' backend. Raises ValueError as `Backend.open`."""
    return BACKENDS[settings.backend](loaded, settings).open()


def check_positions(settings: RunSettings, trained: int | None, model: str, tokens: int | None = None) -> None:
    """Raise ValueError if a run sees more positions than its model was trained on, unless it asks for them.

    Parameters
    ----------
    trained : int or None
        None: the model does not say, and nothing is refused.
    model : str
        Its name.
    tokens : int or None
        Of the text, all of which a full cache sees; None: somebody else bounds it.
    """
    if trained is None or settings.allow_untrained_positions:
        return
    policy = settings.policy()
    if policy is not None:
        check_trained(policy, trained, allowed=False)
    elif settings.method == "recompute" and settings.given_cap > trained:
        raise ValueError(
            f"cap={settings.cap} is above the {trained} positions that {model} was trained on;"
            f" accepted: at most {trained}, or --allow-untrained-positions"
        )
    elif settings.method == "full" and tokens is not None and tokens > trained:
        raise ValueError(
            f"the full cache of {tokens} tokens goes past the {trained} positions that {model} was trained on;"
            f" accepted: --tokens of at most {trained}, or --allow-untrained-positions"
        )
