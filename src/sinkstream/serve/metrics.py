"""Figures for Prometheus: how many, how fast, how much memory. Without the package nothing is counted."""

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from sinkstream.serve.events import Done, Emit, Event, Failed, TextPiece
from sinkstream.serve.heartbeats import Heartbeats

if TYPE_CHECKING:
    from sinkstream.serve.service import Service

try:
    import prometheus_client as prometheus
except ImportError:  # the chat in the terminal needs no metrics
    prometheus = None  # type: ignore[assignment]

ENDING = "prom"  # of the files in which servers of one folder tell each other their figures
SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class Metrics:
    """Counters and histograms of one service.

    Parameters
    ----------
    service : Service
        Asked for its gauges when the figures are read.
    """

    def __init__(self, service: "Service"):
        self.registry: Any = None
        if prometheus is None:
            return
        self.registry = registry = prometheus.CollectorRegistry()
        make = prometheus.Counter
        self._tokens = make("sinkstream_tokens", "Tokens by kind", ["kind"], registry=registry)
        self._requests = make("sinkstream_requests", "Requests by result", ["result"], registry=registry)
        self._captures = make("sinkstream_graph_captures", "CUDA graphs by moment", ["when"], registry=registry)
        self._capture_seconds = make(
            "sinkstream_graph_capture_seconds", "Time to capture them", ["when"], registry=registry
        )
        for counter in (self._captures, self._capture_seconds):
            counter.labels("traffic")  # 0 until a request waits for a capture
        histogram = prometheus.Histogram
        self._ttft = histogram("sinkstream_ttft_seconds", "Time to first text", buckets=SECONDS, registry=registry)
        self._tpot = histogram(
            "sinkstream_tpot_seconds", "Time per output token after it", buckets=SECONDS, registry=registry
        )
        self._gauge("jobs_running", "Requests that run", lambda: service.scheduler.counts()["running"])
        self._gauge("jobs_waiting", "Requests that wait for memory", lambda: service.scheduler.counts()["waiting"])
        self._gauge("sessions", "Sessions", lambda: len(service.store.sessions))
        self._gauge("sessions_resident", "Sessions ready to decode", lambda: service.residence.resident)
        self._gauge("sessions_ram", "Sessions spilled to RAM", lambda: service.store.spill.counts().ram)
        self._gauge("sessions_disk", "Sessions spilled to disk", lambda: service.store.spill.counts().disk)
        self._gauge("stream_bytes", "Memory of resident streams", lambda: service.residence.bytes)
        self._gauge("ram_spill_bytes", "Spilled streams in RAM", lambda: service.store.spill.counts().ram_bytes)
        self._gauge("disk_spill_bytes", "Spilled streams on disk", lambda: service.store.spill.counts().disk_bytes)
        self._gauge(
            "tokens_kept",
            "Tokens in the caches of all sessions",
            lambda: sum(s.counts["kept"] for s in list(service.store.sessions.values())),
        )

    def _gauge(self, name: str, help: str, read) -> None:
        prometheus.Gauge(f"sinkstream_{name}", help, registry=self.registry).set_function(read)

    def evicted(self, tokens: int) -> None:
        """Count evicted tokens."""
        if self.registry is not None and tokens:
            self._tokens.labels("evicted").inc(tokens)

    def captured(self, when: str, graphs: int, seconds: float) -> None:
        """Count captured CUDA graphs: "start", before the server answers, or "traffic", for which a request waits."""
        if self.registry is not None:
            self._captures.labels(when).inc(graphs)
            self._capture_seconds.labels(when).inc(seconds)

    def timed(self, emit: Emit) -> Emit:
        """The same `emit`, with everything that goes through it counted and timed."""
        if self.registry is None:
            return emit
        begin, first = time.perf_counter(), None

        def counting(event: Event) -> None:
            nonlocal first
            if isinstance(event, TextPiece) and first is None:
                first = time.perf_counter()
                self._ttft.observe(first - begin)
            if isinstance(event, Done):
                self._requests.labels("ok").inc()
                self._tokens.labels("prompt").inc(event.prompt_tokens - event.reused_tokens)
                self._tokens.labels("reused").inc(event.reused_tokens)
                self._tokens.labels("completion").inc(event.completion_tokens)
                self._tokens.labels("recalled").inc(sum(turn["tokens"] for turn in event.context.recalled))
                if first is not None and event.completion_tokens > 1:
                    self._tpot.observe((time.perf_counter() - first) / (event.completion_tokens - 1))
            if isinstance(event, Failed):
                self._requests.labels(event.error.code).inc()
            emit(event)

        return counting

    def text(self) -> bytes:
        """The figures of this server in Prometheus' text format."""
        assert self.registry is not None, "the server has prometheus-client"
        return prometheus.generate_latest(self.registry)

    def labelled(self, name: str) -> str:
        """The same, with the name of this server as a label; empty without the package."""
        return "" if self.registry is None else prometheus.generate_latest(_Labelled(self.registry, name)).decode()


def text_of_all(beats: Heartbeats) -> bytes:
    """Figures of all servers of a folder in Prometheus' text format, each with the name of its server as a label."""
    blocks: dict[str, list[str]] = {}
    for beat in beats.read(ENDING):
        for name, lines in () if beat.gone else _blocks(beat.text):
            head = blocks.setdefault(name, [line for line in lines if line.startswith("#")])
            head += [line for line in lines if not line.startswith("#")]
    return "\n".join([line for lines in blocks.values() for line in lines] + [""]).encode()


class _Labelled:
    """A registry whose samples have one more label."""

    def __init__(self, registry: Any, name: str):
        self._registry, self._name = registry, name

    def collect(self) -> Iterator[Any]:
        """The families of the registry."""
        for family in self._registry.collect():
            family.samples = [s._replace(labels={**s.labels, "replica": self._name}) for s in family.samples]
            yield family


def _blocks(text: str) -> Iterator[tuple[str, Sequence[str]]]:
    """Families of a text: each begins with its line ``# HELP NAME …``."""
    name, lines = "", list[str]()
    for line in text.splitlines():
        if line.startswith("# HELP "):
            if lines:
                yield name, lines
            name, lines = line.split()[2], []
        lines.append(line)
    if lines:
        yield name, lines
