"""Measuring one point: quality by the code of ``sinkstream eval``, speed by that of ``sinkstream bench``."""

import errno
import statistics
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from sinkstream.bench.record import BenchRecord
from sinkstream.bench.session import BenchSession
from sinkstream.bench.settings import LEAST_PROMPT, Protocol
from sinkstream.data import TokenStream, load_text, random_tokens, tokenize
from sinkstream.evaluation.batch import Batch
from sinkstream.evaluation.record import numeric_protocol
from sinkstream.evaluation.runner import FolderError, Request
from sinkstream.matrix.point import Origin, Point
from sinkstream.matrix.record import LATENCY
from sinkstream.measure.bandwidth import Bandwidth, memory_bandwidth
from sinkstream.measure.environment import environment, utc_now
from sinkstream.measure.numerics import set_numerics
from sinkstream.measure.timing import timed
from sinkstream.models import LoadedModel, load_model, resolve_device, resolve_dtype
from sinkstream.records.blocks import Blocks
from sinkstream.records.files import WriteError
from sinkstream.records.pairing import common_tokens
from sinkstream.records.records import Record, load_record
from sinkstream.records.schema import REQUIRED
from sinkstream.statistics import event_curve, suitable_block_tokens
from sinkstream.studies.diagnosis.spikes import event_positions

RUNS = "runs"  # folder, below that of the points, of what they are made of
LEAST_EVENTS = 2
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class PointFailed(RuntimeError):
    """A point ended without its figures; the message is the reason that its record keeps."""


class DeviceLost(OSError):
    """The device refuses all further work of this process; `content` is the record of the point that found it so."""

    def __init__(self, reason: str, content: dict[str, Any]):
        super().__init__(reason)
        self.content = content


class Workbench:
    """Measures points one after the other; the latest model and the texts are kept between them.

    Parameters
    ----------
    out : Path
        Folder of the point records.
    experiment : str
        Name of the matrix.
    arguments, command
        Of the command, as records keep them.
    console : Console
        Shows the progress of the runs.
    """

    def __init__(self, out: Path, experiment: str, arguments: dict[str, Any], command: list[str], console: Console):
        self.out, self.experiment, self.console = out, experiment, console
        self.arguments, self.command = arguments, command
        self._key: tuple[Any, ...] | None = None
        self._loaded: tuple[LoadedModel, float] | None = None
        self._streams: dict[Origin, TokenStream] = {}
        self._ceilings: dict[str, Bandwidth] = {}

    def measure(self, point: Point, baselines: Mapping[str, Point | None]) -> dict[str, Any]:
        """The content of a point's record, failed points included.

        Raises KeyboardInterrupt after Ctrl-C, WriteError if a run cannot be written or the disk is full (the point is
        not to blame), and DeviceLost if nothing else can be measured in this process.
        """
        here = environment(resolve_device(point.device))
        parts: dict[str, Any] = dict.fromkeys(("quality", "speed", "spike"))
        seconds: dict[str, float | None] = dict.fromkeys(("quality", "speed"))
        loaded, stream, reason = None, None, None
        try:
            set_numerics(tf32=False, cudnn_attention=False)
            loaded, load_sec = self._model(point)
            stream = self._stream(point.text, loaded)
            if point.scored:
                run, seconds["quality"] = timed(self._score, point, loaded, stream, device=loaded.model.device)
                parts["quality"] = quality_part(run, sampling(baselines))
                parts["spike"] = self._spike(run, baselines["strict"])
            if point.speed:
                timings, seconds["speed"] = timed(self._time, point, loaded, load_sec, device=loaded.model.device)
                parts["speed"] = speed_part(timings)
        except (WriteError, KeyboardInterrupt):
            raise
        except PointFailed as error:
            reason = str(error)
        except FolderError as error:
            raise WriteError(None, str(error)) from error
        except Exception as error:  # of a model, a kernel, a driver: the other points are still measured
            if isinstance(error, OSError) and error.errno in DISK_FULL:
                raise WriteError(error.errno, f"{point.name}: {error}") from error
            first_line = next(iter(str(error).strip().splitlines()), "")
            reason = f"{type(error).__name__}: {first_line}".rstrip(": ")
            if not device_works(point.device):
                content = self._content(point, baselines, loaded, stream, parts, seconds, reason, here)
                message = f"{point.name}: {reason}; {point.device} refuses all further work of this process"
                raise DeviceLost(message, content) from error
        return self._content(point, baselines, loaded, stream, parts, seconds, reason)

    def failed(self, point: Point, baselines: Mapping[str, Point | None], reason: str) -> dict[str, Any]:
        """The content of the record of a point that nothing could be measured of."""
        parts, seconds = dict.fromkeys(("quality", "speed", "spike")), dict.fromkeys(("quality", "speed"))
        return self._content(point, baselines, None, None, parts, seconds, reason)

    # ---- what a point needs ----

    def _model(self, point: Point) -> tuple[LoadedModel, float]:
        key = (point.model, point.device, point.dtype, point.seed)
        if self._key != key or self._loaded is None:
            self._key, self._loaded = None, None  # frees the memory of the previous model first
            device = resolve_device(point.device)
            load = partial(load_model, point.model.spec, dtype=resolve_dtype(point.dtype, device), seed=point.seed)
            self._streams, self._loaded = {}, timed(partial(load, device=device), device=device)
            self._key = key
        return self._loaded

    def _stream(self, text: Origin, loaded: LoadedModel) -> TokenStream:
        if text not in self._streams:
            if text.spec == "random":
                if text.tokens is None:
                    raise ValueError(f"text {text.name!r}: random has no length of its own; give tokens")
                self._streams[text] = random_tokens(loaded.model.config.vocab_size, text.tokens, 0)
            else:
                self._streams[text] = tokenize(load_text(text.spec), loaded.tokenizer, text.tokens)
        return self._streams[text]

    def _ceiling(self, device: str) -> Bandwidth:
        if device not in self._ceilings:
            self._ceilings[device] = memory_bandwidth(device)
        return self._ceilings[device]

    def _request(self, folder: str, seed: int) -> Request:
        return Request(self.out / RUNS / folder, self.arguments, self.command, seed, resume=True)

    # ---- quality and speed ----

    def _score(self, point: Point, loaded: LoadedModel, stream: TokenStream) -> Record:
        batch = Batch(loaded, stream, self._request(point.id, point.seed))
        run = batch.run([point.settings], self.console)[-1]
        if run.status == "partial":
            raise KeyboardInterrupt
        if run.status != "complete":
            raise PointFailed(f"quality: {run.status_reason}")
        return run

    def _time(self, point: Point, loaded: LoadedModel, load_sec: float) -> list[BenchRecord]:
        assert point.speed is not None, "points without a speed are not timed"
        ceiling, cap = self._ceiling(point.device), point.settings.cap or 0
        text = random_tokens(loaded.model.config.vocab_size, max(LEAST_PROMPT, cap), point.seed)
        protocol = Protocol(point.speed.steady_tokens, point.speed.warmup_tokens)
        config = point.bench_config(untrained=loaded.source == "random")
        found = []
        for repeat in range(1, point.speed.repeats + 1):
            request = self._request(f"speed-{repeat}", point.seed)
            session = BenchSession(loaded, text, protocol, ceiling, load_sec, request, self.experiment, lenient=True)
            outcome = session.run([[config]], self.console)
            if outcome.interrupted:
                raise KeyboardInterrupt
            for what, why in (*outcome.refused, *outcome.failed):
                raise PointFailed(f"speed: {what}: {why}")
            found += outcome.records
        return found

    def _spike(self, run: Record, strict: Point | None) -> dict[str, Any] | None:
        """The spike after prune events against strict streaming, where its run and its arrays lie beside this one."""
        events = event_positions(run)
        paths = sorted((self.out / RUNS / strict.id).glob("*.json")) if strict else []
        controls = [r for r in map(load_record, paths) if r.status == "complete" and r.has_arrays]
        if strict is None or not controls or events.size < LEAST_EVENTS or run.policy["options"].get("growth") == 0:
            return None
        index, nll, control = common_tokens(run, controls[-1])
        block = suitable_block_tokens(int(index[-1] - index[0]) + 1)
        curve = event_curve(nll - control, index, events, block_tokens=block)
        parts = {name: asdict(getattr(curve, name)) for name in ("peak", "width", "area", "level")}
        return {
            "baseline": strict.id,
            "events": curve.n_events,
            **parts,
            "peak_lag": curve.peak_lag,
            "found": curve.found,
        }

    # ---- the record ----

    def _content(
        self,
        point: Point,
        baselines: Mapping[str, Point | None],
        loaded: LoadedModel | None,
        stream: TokenStream | None,
        parts: Mapping[str, Any],
        seconds: Mapping[str, float | None],
        reason: str | None,
        here: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """All fields of a record; `here` is the environment where the device can no longer be asked."""
        run, policy, configuration = point.settings, point.settings.policy(), point.configuration
        unknown = dict.fromkeys(REQUIRED["model"]) | {"name": point.model.name}
        numeric = numeric_protocol(loaded) if loaded else {"dtype": point.dtype, "device": point.device, "tf32": False}
        return {
            "id": point.id,
            "name": point.name,
            "experiment": self.experiment,
            "status": "complete" if reason is None else "failed",
            "status_reason": reason,
            "created": utc_now(),
            "command": self.command,
            "arguments": self.arguments,
            "environment": here or environment(resolve_device(point.device)),
            "model": (loaded.record() if loaded else unknown) | {"key": point.model.name},
            "data": (stream.record() if stream else {"name": point.text.name, "sha256": None, "tokens": None})
            | {"key": point.text.name},
            "policy": {
                "name": run.method,
                "label": run.label(),
                "options": {} if policy is None else {**policy.record(), "positions": run.positions},
            },
            "protocol": {
                **numeric,
                "seed": point.seed,
                "cap": run.cap,
                "cap_accounting": run.cap_accounting,
                "prefill_tokens": None if stream is None else run.prefill or run.cap,
            },
            "configuration": configuration,
            "baselines": {name: other and other.id for name, other in baselines.items()},
            **parts,
            "seconds": seconds,
        }


def device_works(device: str) -> bool:
    """Whether a device still answers: after some errors a GPU refuses all further work of the process."""
    if not device.startswith("cuda"):
        return True
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


def sampling(baselines: Mapping[str, Point | None]) -> int:
    """Every how many tokens the recompute baseline scores; 1 without one."""
    recompute = baselines.get("recompute")
    return 1 if recompute is None else recompute.settings.sample_every


def quality_part(run: Record, every: int) -> dict[str, Any]:
    """The field `quality` of a point's record; `every`: the sampling of the baseline that it will be paired with."""
    sampled = None
    if every > 1 and run.protocol["sample_every"] == 1:
        arrays = run.arrays
        index, nll = arrays["index"], arrays["nll"].astype(np.float64)
        kept = np.where((index - index[0]) % every == 0, nll, np.nan)
        blocks = Blocks.of(index, kept, arrays["kv_length"])
        sampled = {"every": every, "blocks": blocks and blocks.record()}
    return {
        "backend": run.protocol["backend"],
        "evaluate": run.protocol["evaluate"],
        "record": run.id,
        "created": run.created,
        "sample_every": run.protocol["sample_every"],
        "summary": run.summary,
        "blocks": run.block_sums,
        "sampled": sampled,
    }


def speed_part(timings: list[BenchRecord]) -> dict[str, Any]:
    """The field `speed` of a point's record, from the timings of all repeats."""
    first, tpots = timings[0], [record.steady["tpot_ms"] for record in timings]
    tails = {
        name: [r.latency_ms["all"][name] for r in timings if r.latency_ms["all"][name] is not None] for name in LATENCY
    }
    peaks = [record.memory["peak_mb"] for record in timings if record.memory["peak_mb"] is not None]
    tpot = statistics.median(tpots)
    return {
        "backend": first.rung["name"],
        "feed": first.protocol["feed"],
        "text": first.protocol["text"],
        "warmup_tokens": first.protocol["warmup_tokens"],
        "steady_tokens": first.steady["tokens"],
        "tpot_ms": tpot,
        "tpot_ms_range": [min(tpots), max(tpots)],
        "latency_ms": {name: statistics.median(values) if values else None for name, values in tails.items()},
        "floor_ms": first.floor["ms"],
        "over_floor": tpot / first.floor["ms"],
        "peak_mb": max(peaks, default=None),
        "memory_kind": first.memory["kind"],
        "repeats": [
            {
                **{"record": record.id, "created": record.created, "tpot_ms": record.steady["tpot_ms"]},
                **{"latency_ms": record.latency_ms, "chunks": record.chunks, "setup": record.setup},
            }
            for record in timings
        ],
    }
