"""What ``bench --serve`` times: a model behind a server in this process, and the same model in an engine."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sinkstream.bench.serving.client import Plan
from sinkstream.bench.serving.hosting import hosted
from sinkstream.engine import Engine
from sinkstream.evaluation.runner import Request
from sinkstream.measure.memory import held_mb
from sinkstream.measure.timing import timed
from sinkstream.models import LoadedModel
from sinkstream.serve import ServeSettings, Service

SYSTEM = "w0 w4 w5 w6"  # words to a model of random weights, a text to others
TRIALS = 2  # of a rate
TURN_TEXT = "w7 w8 w9 w10 w11 w12 w13 w14"


@dataclass(frozen=True)
class Load:
    """How much is asked for.

    Attributes
    ----------
    turns : int
        Of the one long conversation.
    reply : int
        Tokens of each of its replies.
    tokens : int
        Of a reply that is timed beside the engine's.
    cap : int
        Slots of a session.
    pinned : int or None
        Most pinned tokens of a session; None: the server's default.
    seconds, users : float, int
        Of the soak.
    compare_seconds : float or None
        After so many no further turn of the soak is served again, alone; None: all are.
    talks : int
        Chats of the measurement of recall.
    """

    turns: int
    reply: int
    tokens: int
    cap: int
    seconds: float = 600
    users: int = 32
    talks: int = 6
    pinned: int | None = None
    compare_seconds: float | None = None


@dataclass
class ServedModel:
    """A model, its server and its engine.

    Attributes
    ----------
    loaded : LoadedModel
        With a tokenizer.
    backend : str
        The engine's.
    load : Load
    request : Request
    name : str
        The same in all records of one command.
    untrained : bool
        Whether a cap above the trained positions is accepted.
    """

    loaded: LoadedModel
    backend: str
    load: Load
    request: Request
    name: str
    untrained: bool = False

    def _service(self, resident: int, *, durable: bool = False, **more: Any) -> Service:
        given: dict[str, Any] = {"cap": self.load.cap, "resident": resident, "recall": "none"}
        settings = ServeSettings(pinned=self.load.pinned, **{**given, "queue": 8 * max(resident, 16), **more})
        untrained = self.untrained
        return Service(
            self.loaded, settings, backend=self.backend, allow_untrained_positions=untrained, durable=durable
        )

    @contextmanager
    def _hosted(self, resident: int, **more: Any) -> Iterator[str]:
        with hosted(self._service(resident, **more)) as address:
            yield address
        gc.collect()  # its streams give their memory back

    def _engine(self, streams: int) -> Engine:
        return Engine(
            self.loaded.model,
            cap=self.load.cap,
            sink=4,
            evict="turns",
            streams=streams,
            backend=self.backend,
            tokenizer=self.loaded.tokenizer,
            allow_untrained_positions=self.untrained,
        )

    def _engine_rate(self, streams: int) -> float:
        """Tokens a second of the engine's own streams, the second of two turns of the same text, the better of two."""
        engine, rates = self._engine(streams), []
        ids = self.loaded.tokenizer(TURN_TEXT, add_special_tokens=False)["input_ids"]  # type: ignore[misc]
        generate = partial(engine.generate_batch, [ids] * streams, max_new_tokens=self.load.tokens, stop_tokens=())
        try:
            for _ in range(TRIALS):
                for stream in range(streams):
                    engine.reset(stream=stream)
                generate()
                seconds = timed(generate, device=self.loaded.model.device)[1]
                rates.append(streams * self.load.tokens / seconds)
        finally:
            engine.close()
        return max(rates)

    def _plan(self, text: str, **more: Any) -> Callable[..., Plan]:
        """A plan that lacks the address of its server."""
        return lambda address, **given: Plan(
            address=address, model=self.loaded.name, text=text, system=SYSTEM, **more, **given
        )

    def _memory(self) -> tuple[float, float | None]:
        device = self.loaded.model.device
        return held_mb("cpu"), held_mb(device) if device.type == "cuda" else None

    def _command(self, folder: Path, resident: int) -> list[str]:
        """Arguments of ``sinkstream serve`` for a server like this one; random weights are written to a folder."""
        model = self.request.arguments.get("model") or self.loaded.name
        if self.loaded.source == "random":
            model = str(folder / "model")
            weights = {name: value.clone() for name, value in self.loaded.model.state_dict().items()}
            self.loaded.model.save_pretrained(model, state_dict=weights)  # the engine's are views of packed ones
            assert self.loaded.tokenizer is not None
            self.loaded.tokenizer.save_pretrained(model)
        given = {"model": model, "cap": self.load.cap, "resident": resident, "ram-mb": 1, "spill": folder / "spill"}
        given |= {"dtype": str(self.loaded.model.dtype).removeprefix("torch."), "backend": self.backend}
        given |= {"device": str(self.loaded.model.device)}
        given |= {} if self.load.pinned is None else {"pinned": self.load.pinned}
        return [*(f"--{name}={value}" for name, value in given.items()), "--allow-untrained-positions"]
