"""What the benchmark asks of a rung, which is a backend: the methods it runs, its length, its set-up time."""

import gc
from collections.abc import Sequence
from dataclasses import replace

import torch

from sinkstream.bench.settings import BenchConfig, Protocol
from sinkstream.engine import STEPS
from sinkstream.evaluation.backends import BACKENDS, EngineBackend, StaticBackend
from sinkstream.evaluation.decoders import Decoder
from sinkstream.evaluation.settings import RunSettings
from sinkstream.measure.timing import timed
from sinkstream.models import LoadedModel


def rung_names() -> list[str]:
    """All rungs, the slowest first."""
    return list(BACKENDS)


def default_rung(device: torch.device) -> str:
    """The engine's last rung on a GPU, its first on a CPU."""
    return STEPS.names()[-1 if device.type == "cuda" else 0]


def rung_runs(rung: str, policies: Sequence[RunSettings]) -> list[RunSettings]:
    """What a rung runs where `policies` are asked for: these, or the baseline that is the rung's own."""
    baseline = BACKENDS[rung].baseline
    return list(policies) if baseline is None else [replace(policies[0], method=baseline, options={}, recall={})]


def fitted(protocol: Protocol, config: BenchConfig) -> Protocol:
    """The protocol with as many tokens as the rung of a configuration can decode."""
    if not BACKENDS[config.rung].grows:
        return protocol
    most = max(2, config.run.given_cap // 2)
    return replace(protocol, tokens=min(protocol.tokens, most), warmup=min(protocol.warmup, max(1, most // 2)))


def prompt_tokens(protocol: Protocol, config: BenchConfig) -> int:
    """Tokens of the prompt: a cap, or several; where the cache grows, it has the cap in the middle or at the end."""
    rung = BACKENDS[config.rung]
    if not rung.grows:
        return protocol.prompt_caps * config.run.given_cap
    within = protocol.tokens if rung is StaticBackend else protocol.tokens // 2
    return max(1, config.run.given_cap - protocol.warmup - within)


def check_rung(loaded: LoadedModel, config: BenchConfig) -> None:
    """Raise ValueError if the rung does not serve the device, the model or the configuration."""
    rung = BACKENDS[config.rung]
    rung.check_device(loaded.model.device)
    rung(loaded, config.run, config.streams).check()


def open_timed(loaded: LoadedModel, config: BenchConfig) -> tuple[Decoder, float, float]:
    """Open a configuration's decoder; returns (decoder, prepare_sec, capture_sec).

    The seconds are those of the first set-up (packing, buffers, compilation, graph capture) and, of an engine, of a
    second set-up with packed weights and compiled kernels; else 0.
    """
    backend, device = BACKENDS[config.rung](loaded, config.run, config.streams), loaded.model.device
    decoder, first = timed(backend.open, device=device)
    if not isinstance(backend, EngineBackend):
        return decoder, first, 0.0
    decoder.close()
    del decoder
    gc.collect()
    decoder, again = timed(backend.open, device=device)
    return decoder, first, again
