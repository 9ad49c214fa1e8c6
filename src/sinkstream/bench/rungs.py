"""The rungs: every way of decoding that the benchmark knows, the slowest first."""

import gc
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch

from sinkstream.bench.settings import BenchConfig, Protocol, step_weight_bytes
from sinkstream.compat import attention_implementation
from sinkstream.engine import STEPS, Engine, GraphedStep
from sinkstream.evaluation.sessions import BACKENDS, Session, engine_options
from sinkstream.evaluation.settings import RunSettings
from sinkstream.measure.timing import timed
from sinkstream.models import LoadedModel
from sinkstream.policies import Step
from sinkstream.registry import Registry

RUNGS: Registry = Registry("rung")


class Decoder(ABC):
    """One configuration, open and running.

    Attributes
    ----------
    prepare_sec, capture_sec : float
        Seconds to get ready the first time (packing, buffers, compiling, capturing) and again, all compiled and packed.
    weight_bytes : int
        Weights that one step reads.
    """

    prepare_sec: float = 0.0
    capture_sec: float = 0.0
    weight_bytes: int

    @abstractmethod
    def prefill(self, ids: torch.Tensor, stream: int) -> torch.Tensor:
        """Append a prompt (tokens,) to one stream; logits (1, vocab)."""

    def choose(self, logits: torch.Tensor) -> torch.Tensor | None:
        """The likeliest token of every stream, (streams,), by the latest logits; None where the step finds it."""
        return logits.argmax(-1)

    @abstractmethod
    def feed(self, tokens: torch.Tensor | None) -> torch.Tensor:
        """Append one token to every stream, (streams,), or what `choose` gave.

        Returns
        -------
        Tensor, (streams, vocab)
            Logits, which the next call may overwrite.
        """

    @abstractmethod
    def last_step(self) -> Step:
        """What the latest token did to the cache of the first stream."""

    @abstractmethod
    def close(self) -> None:
        """Leave the model as it was."""


class Rung(ABC):
    """One way of decoding one model."""

    evicts: ClassVar[bool] = True  # under every --policy; other rungs run a baseline of their own
    method: ClassVar[str] = ""  # that baseline
    attention: ClassVar[str | None] = None  # implementation in transformers, where the rung sets it
    needs_gpu: ClassVar[bool] = False

    def __init__(self, loaded: LoadedModel):
        self.loaded = loaded

    def runs(self, policies: Sequence[RunSettings]) -> list[RunSettings]:
        """What this rung runs where `policies` are asked for."""
        if self.evicts:
            return list(policies)
        return [replace(policies[0], method=self.method, options={})]

    def fitted(self, protocol: Protocol, config: BenchConfig) -> Protocol:
        """The protocol with as many tokens as this rung can decode."""
        return protocol

    def prefill_tokens(self, protocol: Protocol, config: BenchConfig) -> int:
        """Tokens of the prompt."""
        return config.run.cap

    @classmethod
    def check_device(cls, device: torch.device) -> None:
        """Raise ValueError if this rung does not run on `device`, whatever the model."""
        if cls.needs_gpu and device.type != "cuda":
            raise ValueError(f"this rung compiles or captures for a GPU and the device is {device}; accepted: cuda")

    def check(self, config: BenchConfig) -> None:
        """Raise ValueError if this rung does not serve the model, the device or the configuration."""
        self.check_device(self.loaded.model.device)

    @abstractmethod
    def open(self, config: BenchConfig) -> Decoder:
        """Get ready. Raises ValueError as `check`."""


class SessionDecoder(Decoder):
    """A session of the evaluation, one stream."""

    def __init__(self, session: Session, attention: str | None):
        self.session, self.model = session, session.model
        self.weight_bytes = step_weight_bytes(self.model)
        self._attention_before = attention_implementation(self.model.config)
        if attention:
            self.model.set_attn_implementation(attention)

    def prefill(self, ids: torch.Tensor, stream: int) -> torch.Tensor:
        return self.session.prefill(ids)

    def feed(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.session.feed(tokens, last_only=True)

    def last_step(self) -> Step:
        return self.session.steps()[-1]

    def close(self) -> None:
        self.session.close()
        if attention_implementation(self.model.config) != self._attention_before:
            self.model.set_attn_implementation(self._attention_before)


class HfRung(Rung):
    """A rung on the transformers module, driven as `eval --backend hf` drives it."""

    def check(self, config: BenchConfig) -> None:
        super().check(config)
        check_one_stream(config)
        BACKENDS["hf"](self.loaded, config.run).check()

    def open(self, config: BenchConfig) -> Decoder:
        session, seconds = timed(BACKENDS["hf"](self.loaded, config.run).session, device=self.loaded.model.device)
        decoder = SessionDecoder(session, self.attention)
        decoder.prepare_sec = seconds
        return decoder


@RUNGS.register("hf-recompute-eager")
class RecomputeEagerRung(HfRung):
    """transformers, the last cap tokens forwarded anew for every token, eager attention."""

    evicts, method, attention = False, "recompute", "eager"


@RUNGS.register("hf-recompute-sdpa")
class RecomputeSdpaRung(HfRung):
    """transformers, the last cap tokens forwarded anew for every token, SDPA."""

    evicts, method, attention = False, "recompute", "sdpa"


class GrowingRung(HfRung):
    """A rung whose cache grows with every token."""

    evicts, method = False, "full"

    def fitted(self, protocol: Protocol, config: BenchConfig) -> Protocol:
        most = max(2, config.run.cap // 2)
        return replace(protocol, tokens=min(protocol.tokens, most), warmup=min(protocol.warmup, max(1, most // 2)))


@RUNGS.register("hf-full")
class FullRung(GrowingRung):
    """transformers' DynamicCache, nothing evicted; it sees cap tokens in the middle of the run."""

    def prefill_tokens(self, protocol: Protocol, config: BenchConfig) -> int:
        return max(1, config.run.cap - protocol.warmup - protocol.tokens // 2)


@RUNGS.register("hf")
class StreamingRung(HfRung):
    """transformers with StreamingCache, the soft ring."""


@RUNGS.register("hf-static")
class StaticRung(GrowingRung):
    """transformers' generate(cache_implementation="static"), compiled by itself; it ends when its slots are full."""

    needs_gpu = True

    def prefill_tokens(self, protocol: Protocol, config: BenchConfig) -> int:
        return max(1, config.run.cap - protocol.warmup - protocol.tokens)

    def open(self, config: BenchConfig) -> Decoder:
        raise AssertionError("generate() runs its own loop: see decoding.generate_static")


class EngineDecoder(Decoder):
    """The engine, all its streams stepped together."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.weight_bytes = engine.weights.step_bytes
        self._streams = range(engine.state.streams)

    def prefill(self, ids: torch.Tensor, stream: int) -> torch.Tensor:
        return self.engine.prefill(ids, stream=stream)[None]

    def choose(self, logits: torch.Tensor) -> None:
        """Nothing: every step finds the likeliest token by itself."""

    def feed(self, tokens: torch.Tensor | None) -> torch.Tensor:
        self.engine.advance(tokens, self._streams)
        return self.engine.state.logits

    def last_step(self) -> Step:
        return self.engine.last_steps[0]

    def close(self) -> None:
        self.engine.close()


class EngineRung(Rung):
    """A rung of the engine: one entry of its registry of steps."""

    backend: ClassVar[str]

    def check(self, config: BenchConfig) -> None:
        super().check(config)
        Engine.check(self.loaded.model, **self._options(config))

    def open(self, config: BenchConfig) -> Decoder:
        device = self.loaded.model.device
        engine, first = timed(Engine, self.loaded.model, device=device, **self._options(config))
        engine.close()
        del engine
        gc.collect()
        engine, again = timed(Engine, self.loaded.model, device=device, **self._options(config))
        decoder = EngineDecoder(engine)
        decoder.prepare_sec, decoder.capture_sec = first, again
        return decoder

    def _options(self, config: BenchConfig) -> dict:
        shared = engine_options(config.run, self.loaded.tokenizer)
        return {"backend": self.backend, "streams": config.streams, **shared}


for _name, _step in STEPS.items():
    _of_step = {"backend": _name, "needs_gpu": issubclass(_step, GraphedStep), "__doc__": _step.__doc__}
    RUNGS.register(_name)(type(_step.__name__, (EngineRung,), _of_step))


def default_rung(device: torch.device) -> str:
    """The engine's last rung on a GPU, its first on a CPU."""
    return STEPS.names()[-1 if device.type == "cuda" else 0]


def check_one_stream(config: BenchConfig) -> None:
    """Raise ValueError unless one stream is asked for."""
    if config.streams > 1:
        raise ValueError(f"rung {config.rung!r} runs one stream; accepted: --streams 1, or a rung of the engine")
