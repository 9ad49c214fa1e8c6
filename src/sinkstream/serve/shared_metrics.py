"""Figures of all servers of one folder: each writes its own there, and each answers with those of all."""

import logging
import secrets
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import prometheus_client as prometheus

from sinkstream.records.files import WriteError, write_atomically

SECONDS = 2.0  # between two writes: so old the figures of other servers may be
GONE_SECONDS = 5 * SECONDS  # a server that has written nothing for so long is gone
log = logging.getLogger(__name__)


class SharedMetrics:
    """The figures of this server and of the others.

    Parameters
    ----------
    registry : prometheus_client.CollectorRegistry
        Of this server.
    folder : Path
        Shared with the other servers.

    Attributes
    ----------
    name : str
        Value of the label ``replica``.
    """

    def __init__(self, registry: Any, folder: Path):
        self._registry, self._folder = registry, folder
        self.name = secrets.token_hex(4)
        self._path = folder / f"{self.name}.prom"
        self._ends = threading.Event()
        self._writer: threading.Thread | None = None

    def start(self) -> None:
        """Write from now on."""
        self._writer = threading.Thread(target=self._write_on, name="sinkstream-metrics", daemon=True)
        self._writer.start()

    def stop(self) -> None:
        """Write no more; the figures of this server are gone."""
        self._ends.set()
        if self._writer is not None:
            self._writer.join()
        self._path.unlink(missing_ok=True)

    def text(self) -> bytes:
        """Figures of all servers in Prometheus' text format, each with the name of its server as a label."""
        own = self._write()
        blocks: dict[str, list[str]] = {}
        for text in [own, *self._others()]:
            for name, lines in _blocks(text):
                head = blocks.setdefault(name, [line for line in lines if line.startswith("#")])
                head += [line for line in lines if not line.startswith("#")]
        return "\n".join([line for lines in blocks.values() for line in lines] + [""]).encode()

    # ---- files ----

    def _write_on(self) -> None:
        while not self._ends.wait(SECONDS):
            self._write()

    def _write(self) -> str:
        """Write the figures of now; returns them."""
        text = prometheus.generate_latest(_Labelled(self._registry, self.name)).decode()
        try:
            write_atomically(self._path, text)
        except WriteError as error:
            log.warning("the figures of this server could not be written for the others: %s", error)
        return text

    def _others(self) -> Iterator[str]:
        """What the other servers have written of late, by the clock of the folder."""
        try:
            now = self._path.stat().st_mtime
        except OSError:  # nothing can be written there
            return
        for path in sorted(self._folder.glob("*.prom")):
            try:
                if path != self._path and now - path.stat().st_mtime < GONE_SECONDS:
                    yield path.read_text(encoding="utf-8")
            except OSError:  # it has ended meanwhile
                continue


class _Labelled:
    """A registry whose samples have one more label."""

    def __init__(self, registry: Any, name: str):
        self._registry, self._name = registry, name

    def collect(self) -> Iterator[Any]:
        """The families of the registry."""
        for family in self._registry.collect():
            family.samples = [s._replace(labels={**s.labels, "replica": self._name}) for s in family.samples]
            yield family


def _blocks(text: str) -> Iterator[tuple[str, list[str]]]:
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
