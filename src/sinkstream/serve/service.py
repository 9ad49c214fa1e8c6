"""`Service`: a model, its sessions and the scheduler; everything that a server does, without HTTP."""

import hashlib
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from sinkstream.models import LoadedModel
from sinkstream.serve import health, metrics
from sinkstream.serve.conversation import Conversations
from sinkstream.serve.errors import INTERNAL, APIError, busy, invalid, not_found
from sinkstream.serve.events import Done, Emit, Event, Failed
from sinkstream.serve.files import SessionFiles, SpillFull
from sinkstream.serve.heartbeats import Heartbeats
from sinkstream.serve.lanes import make_lanes
from sinkstream.serve.planning import Call, Planner
from sinkstream.serve.post import Post
from sinkstream.serve.residence import Residence
from sinkstream.serve.scheduler import RETRY_SECONDS, Job, Scheduler, Work
from sinkstream.serve.sessions import Session
from sinkstream.serve.settings import ServeSettings
from sinkstream.serve.spill import Spill
from sinkstream.serve.store import SessionStore
from sinkstream.serve.template import ChatTemplate
from sinkstream.serve.tools import tool_format

MB = 2**20
CANCELLED = APIError(503, "the request was cancelled", code="cancelled")
log = logging.getLogger(__name__)


class Service:
    """Sessions of one model.

    Parameters
    ----------
    loaded : LoadedModel
        With a fast tokenizer.
    settings : ServeSettings
    backend : str
        The engine's: "ring" on a CPU, "fused" on a GPU.
    allow_untrained_positions : bool
        As for the engine.
    durable : bool
        Whether sessions are written to disk as `settings.write` says, for a server that is killed; else only where they
        are spilled.

    Raises
    ------
    ValueError
        If the model, its tokenizer, the cap or the backend does not fit; nothing runs then.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        settings: ServeSettings,
        *,
        backend: str,
        allow_untrained_positions: bool = False,
        durable: bool = True,
    ):
        if getattr(loaded.tokenizer, "backend_tokenizer", None) is None:
            raise ValueError(f"model {loaded.name!r} has no fast tokenizer, and a server reads and writes text")
        self.loaded, self.settings, self.backend = loaded, settings, backend
        self.template = ChatTemplate(loaded.tokenizer)
        self.tools = tool_format(getattr(loaded.tokenizer, "chat_template", None))
        self.metrics = metrics.Metrics(self)
        files = SessionFiles(settings.spill, settings.disk_mb * MB, settings.shared)
        spill = Spill(files, settings.ram_mb * MB, lambda: self.scheduler.wake())
        self.store = SessionStore(
            settings.sessions,
            settings.idle_seconds,
            spill,
            lambda *found: self.residence.replaced(*found),
        )
        each_turn = durable and settings.write == "turn" and settings.spill is not None
        self.lanes = make_lanes(loaded, settings, backend, self.metrics.captured, untrained=allow_untrained_positions)
        self.residence = Residence(self.lanes, spill, self._give_up, each_turn)
        self.planner = Planner(self.template, settings, self.store, self.residence, self.metrics.evicted)
        self.post = Post()
        self.conversations = Conversations(loaded, self.planner, self.tools, self.post)
        idle = self.residence.write_one if durable else lambda: False
        self.scheduler = Scheduler(settings.queue, idle, step=self._step)
        self.started = int(time.time())
        self._beats = Heartbeats(settings.spill, self._tell_others) if settings.shared and settings.spill else None

    def start(self) -> None:
        """Begin to serve."""
        self.scheduler.start()
        if self._beats is not None:
            self._beats.start()

    def stop(self) -> None:
        """Cancel what runs, spill every session and end."""
        if self._beats is not None:
            self._beats.stop()
        self.scheduler.stop(self._spill_all)

    # ---- figures ----

    def figures(self) -> bytes:
        """Figures in Prometheus' text format; in a shared folder those of all servers."""
        return self.metrics.text() if self._beats is None else metrics.text_of_all(self._beats)

    def health(self) -> health.Health:
        """Whether requests are answered; in a shared folder also by the other servers."""
        if self._beats is None:
            return health.health_of_one(self.scheduler.alive, self.scheduler.counts())
        return health.health_of_all(self._beats, self.settings.replicas)

    def _tell_others(self, name: str) -> dict[str, str]:
        state = health.told(self.scheduler.alive, self.scheduler.counts())
        return {metrics.ENDING: self.metrics.labelled(name), health.ENDING: state}

    @property
    def vocab(self) -> int:
        """Token ids are below it."""
        return self.loaded.model.config.vocab_size

    # ---- requests ----

    def submit(self, call: Call, emit: Emit) -> Job:
        """Serve a call; events are told to `emit` from another thread, `Done` or `Failed` last. Raises APIError 429."""
        if call.reply is not None and call.reply.max_tokens > self.settings.max_tokens_limit:
            raise invalid(
                f"max_tokens={call.reply.max_tokens} is not accepted; accepted: 1 to {self.settings.max_tokens_limit}",
                "max_tokens",
            )
        timed = self.metrics.timed(emit)
        if self.settings.log_text:
            timed = _logged(call, timed)
        return self.scheduler.submit(self._work(call, timed), lambda: timed(Failed(CANCELLED)))

    def _work(self, call: Call, emit: Emit) -> Work:
        try:
            yield from self.conversations.run(call, emit)
        except APIError as error:
            emit(Failed(error))
        except GeneratorExit:
            emit(Failed(CANCELLED))
            raise
        except ValueError as error:  # the engine's own refusals name the option
            emit(Failed(invalid(str(error))))
        except Exception:
            log.exception("a request failed")
            emit(Failed(APIError(500, INTERNAL, code="internal_error")))
        for session in self.store.expired(self.residence.busy):
            self.planner.forget(session)

    # ---- sessions ----

    def open_session(self, owner: str, head: list[dict], tools: list | None) -> "Future[dict]":
        """A session of the client's own, empty but for its system prompt. Raises APIError for tools that none reads."""
        self.template.check_tools(tools)

        def work() -> dict:
            session = Session(owner, found_by="id", head=head, tools=tools)
            self.store.add(session, self.residence.busy, self.planner.forget)
            self.residence.keep_known(session)
            return self.view(session)

        return self.scheduler.call(work)

    def abandon(self, session_id: str) -> None:
        """Delete a session whose client was not told its id; one that is in use, once its request has ended."""

        def work() -> None:
            session = self.store.sessions.pop(session_id, None)
            if session is not None and session.id not in self.residence.busy:
                self.planner.forget(session)

        with suppress(APIError):  # a server that is stopping
            self.scheduler.call(work)

    def with_session(self, owner: str, session_id: str, work: Callable[[Session], Any]) -> "Future[Any]":
        """Do something with an idle session. The future raises APIError 404, or 409 for a session that is in use."""

        def checked() -> Any:
            session = self.store.get(owner, session_id)
            if session.id in self.residence.busy or not self.store.claimed(session):
                raise APIError(409, f"session {session_id!r} is in use by a request", code="session_busy")
            try:
                return work(session)
            finally:
                self.residence.free(session)

        return self.scheduler.call(checked)

    def fork(self, session: Session) -> dict:
        """A copy of a session that goes on by itself."""
        copy = session.copy(found_by="id")
        self._add_copy(copy, self.residence.dump(session))
        return self.view(copy)

    def save(self, session: Session, name: str) -> dict:
        """Write a copy of a session to disk under a name."""
        data = self.residence.dump(session)
        if data is None:
            raise invalid("the session has no tokens yet; accepted: a session that has begun")
        key = self.store.saved_key(session.owner, name)
        try:
            self.store.spill.files.write(session, data, key)
        except SpillFull:
            raise APIError(
                507, "the session cannot be saved: there is no room on disk, or no folder", code="disk_full"
            ) from None
        return {"name": name, "object": "saved_session", "bytes": len(data)}

    def load(self, owner: str, name: str) -> "Future[dict]":
        """A new session from a saved copy."""

        def work() -> dict:
            saved, data = self.store.load(owner, name)
            copy = saved.copy(found_by="id")
            self._add_copy(copy, data)
            return self.view(copy)

        return self.scheduler.call(work)

    def undo(self, session: Session) -> dict:
        """Take back the last turn."""
        if not session.turns:
            raise APIError(409, "the session holds no whole turn that could be taken back", code="nothing_to_undo")
        lane = self.residence.acquire(session, wait=True)
        if lane is None:
            raise busy("all memory for sessions is in use by requests", RETRY_SECONDS)
        try:
            turn = session.turns[-1]
            self.planner.rewind(session, lane, turn)
        finally:
            self.residence.release(session)
        return self.view(session)

    def delete(self, session: Session) -> dict:
        """Delete a session and its files."""
        self.planner.forget(session)
        return deleted(session.id)

    def view(self, session: Session) -> dict[str, Any]:
        """What the owner of a session is told."""
        return session.view(self.residence.where(session.id), self.settings.cap)

    # ---- parts ----

    def _add_copy(self, copy: Session, data: bytes | None) -> None:
        self.store.add(copy, self.residence.busy, self.planner.forget)
        if data is None:
            self.residence.keep_known(copy)
            return
        try:
            self.store.spill.put(copy, data)
            if self.settings.shared:  # the other servers must know it
                self.store.spill.write_soon(copy, data)
                self.store.spill.wait()
        except SpillFull:
            self.planner.forget(copy)
            raise APIError(429, "there is no room for one more session", code="server_busy", retry_after=30) from None

    def _step(self) -> None:
        """The end of a round: what it has told is handed over while the device computes the step."""
        self.lanes.step(self.post.deliver)
        self.post.deliver()  # of a round without a step
        self.store.spill.forget_unasked()

    def _give_up(self, busy_ids: set[str]) -> bool:
        least = self.store.least(busy_ids)
        if least is None:
            return False
        self.planner.forget(least)
        return True

    def _spill_all(self) -> None:
        self.post.deliver()
        left = self.residence.spill_all()
        if self.settings.spill is None:  # asked for: nothing is lost that was to be kept
            log.info("%d sessions end with the server, which has no spill folder", len(left))
            return
        for session_id in left:
            log.warning("session %s… could not be spilled and is lost", session_id[:9])


def owner_of(key: str) -> str:
    """What stands for an API key in sessions and their files: its digest."""
    return hashlib.sha256(f"sinkstream {key}".encode()).hexdigest()[:32]


def model_name(loaded: LoadedModel) -> str:
    """The id of the model in the API."""
    return loaded.name


def check_model(service: Service, name: str) -> None:
    """Refuse another model's name. Raises APIError 404."""
    if name != model_name(service.loaded):
        raise not_found("model", name)


def deleted(session_id: str) -> dict:
    """What the client of a session that is deleted is told."""
    return {"id": session_id, "object": "session", "deleted": True}


def _logged(call: Call, emit: Emit) -> Emit:
    """The same `emit`, with what is asked and said written to the log."""
    log.info("%s asks: %s", call.response, call.messages or call.prompt)

    def logging_emit(event: Event) -> None:
        if isinstance(event, Done):
            log.info("%s says: %s", call.response, event.texts)
        emit(event)

    return logging_emit
