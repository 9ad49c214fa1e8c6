"""One conversation as a chat sees it: with a local engine, or with any server that speaks the OpenAI API."""

import json
import queue
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2 as httpx

from sinkstream.records.files import write_atomically
from sinkstream.serve.errors import APIError
from sinkstream.serve.events import Done, Event, Failed, TextPiece
from sinkstream.serve.options import sampler_of
from sinkstream.serve.planning import Call
from sinkstream.serve.reply import ReplyOptions
from sinkstream.serve.service import Service, owner_of
from sinkstream.serve.sessions import new_id

OPTIONS: dict[str, type] = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "repetition_penalty": float,
    "presence_penalty": float,
    "frequency_penalty": float,
    "max_tokens": int,
    "seed": int,
}
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


class TalkError(Exception):
    """What a person is told instead of a reply."""


class Talk(ABC):
    """One conversation.

    Attributes
    ----------
    options : dict
        Those of `OPTIONS` that were set.
    context : dict or None
        What the stream holds after the latest reply; None where the server does not tell.
    tokens : int
        Tokens of the latest reply.
    """

    def __init__(self, system: str | None):
        self.system = system
        self.options: dict[str, Any] = {}
        self.context: dict[str, Any] | None = None
        self.tokens = 0
        self.last: str | None = None

    def say(self, text: str) -> Iterator[str]:
        """The reply to a message, as it comes. Raises TalkError."""
        self.last = text
        yield from self.reply(text)

    @abstractmethod
    def reply(self, text: str) -> Iterator[str]:
        """The reply to a message, as it comes. Raises TalkError."""

    @abstractmethod
    def undo(self) -> None:
        """Take back the last turn. Raises TalkError."""

    @abstractmethod
    def reset(self, system: str | None) -> None:
        """Begin anew."""

    @abstractmethod
    def pin(self, text: str) -> str:
        """Add a text to the system prompt, where it is never evicted; returns what was done. Raises TalkError.

        A pinned text is at the beginning of a stream, so the turns that are still there are fed again behind it.
        """

    @abstractmethod
    def save(self, name: str) -> str:
        """Keep the conversation under a name; returns what was done. Raises TalkError."""

    @abstractmethod
    def load(self, name: str) -> str:
        """Go on with a conversation that was saved. Raises TalkError."""

    @abstractmethod
    def stats(self) -> dict[str, Any]:
        """What is known of the conversation."""

    def close(self) -> None:  # noqa: B027  (a server of somebody else's is left alone)
        """Give back what is held."""


class LocalTalk(Talk):
    """With an engine in this process.

    Parameters
    ----------
    service : Service
        Started and stopped here.
    """

    def __init__(self, service: Service, system: str | None):
        super().__init__(system)
        self._service, self._owner, self._session = service, owner_of(""), ""
        service.start()
        self.reset(system)

    def reset(self, system: str | None) -> None:
        self._forget()
        self.system, self.last, self.context = system, None, None
        self._session = self._open(system)

    def _open(self, system: str | None) -> str:
        head = [{"role": "system", "content": system}] if system else []
        return self._service.open_session(self._owner, head, None).result()["id"]

    def reply(self, text: str) -> Iterator[str]:
        heard: queue.Queue[Event] = queue.Queue()
        given = {"temperature": 0.0, **self.options}
        try:
            options = ReplyOptions(
                sampler=sampler_of(given, self._service.vocab),
                max_tokens=given.get("max_tokens", self._service.settings.default_max_tokens),
                seed=given.get("seed", 0),
            )
            message = {"role": "user", "content": text}
            call = Call(self._owner, messages=(message,), session=self._session, response=new_id("c"), reply=options)
            job = self._service.submit(call, heard.put)
        except APIError as error:
            raise TalkError(error.message) from None
        try:
            while not isinstance(event := heard.get(), Done):
                if isinstance(event, TextPiece):
                    yield event.text
                elif isinstance(event, Failed):
                    raise TalkError(event.error.message)
            self.context, self.tokens = vars(event.context), event.completion_tokens
        finally:
            job.cancel()

    def undo(self) -> None:
        self._with_session(self._service.undo)

    def pin(self, text: str) -> str:
        system = pinned_system(self.system, text)
        heard: queue.Queue[Event] = queue.Queue()
        self._service.submit(Call(self._owner, session=self._session, pin=text), heard.put)
        while not isinstance(event := heard.get(), Done):
            if isinstance(event, Failed):
                raise TalkError(event.error.message)
        self.system = system
        view = self._with_session(self._service.view)
        turns = view["turns"]["seen"] - view["turns"]["evicted"]
        return (
            f"pinned; turns that are fed again behind it: {turns}, that can be recalled: {view['recallable']['turns']}"
        )

    def save(self, name: str) -> str:
        saved = self._with_session(lambda session: self._service.save(session, name))
        return f"saved as {name!r}, {saved['bytes']:,} bytes"

    def load(self, name: str) -> str:
        try:
            view = self._service.load(self._owner, name).result()
        except APIError as error:
            raise TalkError(error.message) from None
        self._forget()
        self._session, self.last = view["id"], None
        self.system = self._with_session(lambda session: "\n".join(m["content"] for m in session.head)) or None
        return f"{name!r}: {view['tokens']['seen']:,} tokens seen, {view['tokens']['kept']:,} kept"

    def stats(self) -> dict[str, Any]:
        view = self._with_session(self._service.view)
        return {**view["tokens"], "turns": view["turns"]["seen"], "evicted turns": view["turns"]["evicted"]}

    def close(self) -> None:
        self._forget()
        self._service.stop()

    def _forget(self) -> None:
        if self._session:
            self._with_session(self._service.delete)

    def _with_session(self, work, session: str | None = None) -> Any:
        try:
            return self._service.with_session(self._owner, session or self._session, work).result()
        except APIError as error:
            raise TalkError(error.message) from None


class RemoteTalk(Talk):
    """With a server that speaks the OpenAI API; the whole conversation is sent every time.

    Parameters
    ----------
    url : str
        As in http://127.0.0.1:8000/v1.
    model : str or None
        Default: the first one that the server lists.
    folder : Path
        Of saved conversations.

    Raises
    ------
    TalkError
        If the server does not answer.
    """

    def __init__(self, url: str, model: str | None, key: str, system: str | None, folder: Path):
        super().__init__(system)
        headers = {"Authorization": f"Bearer {key}", "x-session-id": new_id("talk")}  # to the same replica each time
        self._client = httpx.Client(base_url=url.rstrip("/"), headers=headers, timeout=httpx.Timeout(600, connect=10))
        self._folder = folder
        self.reset(system)
        self.model = model or self._first_model()

    def reset(self, system: str | None) -> None:
        self.system, self.last, self.context = system, None, None
        self._messages = [{"role": "system", "content": system}] if system else []

    def reply(self, text: str) -> Iterator[str]:
        self._messages.append({"role": "user", "content": text})
        body = {"model": self.model, "messages": self._messages, "stream": True, **self.options}
        body["stream_options"] = {"include_usage": True}
        reply = ""
        try:
            for piece in self._stream(body):
                reply += piece
                yield piece
        finally:  # what has come is a part of the conversation
            if reply:
                self._messages.append({"role": "assistant", "content": reply})
            else:
                self._messages.pop()

    def undo(self) -> None:
        places = [i for i, message in enumerate(self._messages) if message["role"] == "user"]
        if not places:
            raise TalkError("there is no turn that could be taken back")
        del self._messages[places[-1] :]

    def pin(self, text: str) -> str:
        turns = [message for message in self._messages if message["role"] != "system"]
        self.system = pinned_system(self.system, text)
        self._messages = [{"role": "system", "content": self.system}, *turns]
        return "pinned; the whole conversation is sent again behind it"

    def save(self, name: str) -> str:
        path = self._path(name)
        write_atomically(path, json.dumps(self._messages, ensure_ascii=False, indent=1))
        return f"saved in {path}"

    def load(self, name: str) -> str:
        try:
            messages = json.loads(self._path(name).read_text(encoding="utf-8"))
            system = "\n".join(m["content"] for m in messages if m["role"] == "system") or None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TalkError(f"{name!r} cannot be loaded: {error}") from None
        self._messages, self.system, self.last, self.context = messages, system, None, None
        count = len(messages)
        return f"{name!r}: {count} message{'' if count == 1 else 's'}"

    def stats(self) -> dict[str, Any]:
        return {"messages": len(self._messages), "model": self.model, **(self.context or {})}

    def close(self) -> None:
        self._client.close()

    def _path(self, name: str) -> Path:
        if not NAME.fullmatch(name):
            raise TalkError(f"name {name!r} is not accepted; accepted: letters, digits, - and _")
        return self._folder / f"{name}.json"

    def _first_model(self) -> str:
        try:
            return self._client.get("/models").raise_for_status().json()["data"][0]["id"]
        except (httpx.HTTPError, ValueError, LookupError) as error:
            raise TalkError(f"{self._client.base_url} lists no model: {error}") from None

    def _stream(self, body: dict[str, Any]) -> Iterator[str]:
        try:
            with self._client.stream("POST", "/chat/completions", json=body) as answer:
                if answer.status_code != 200:
                    raise TalkError(_message(answer.read(), answer.status_code))
                for line in answer.iter_lines():
                    if line.startswith("data:") and line[5:].strip() != "[DONE]":
                        yield from self._chunk(json.loads(line[5:]))
        except httpx.HTTPError as error:
            raise TalkError(f"the server does not answer: {error}") from None

    def _chunk(self, chunk: dict[str, Any]) -> Iterator[str]:
        if chunk.get("error"):
            raise TalkError(chunk["error"].get("message", "the server failed"))
        usage = chunk.get("usage") or {}
        self.context = chunk.get("context") or usage.get("context") or self.context
        self.tokens = usage.get("completion_tokens", self.tokens)
        for choice in chunk.get("choices", []):
            if text := (choice.get("delta") or {}).get("content"):
                yield text


def pinned_system(system: str | None, text: str) -> str:
    """A system prompt with one more text. Raises TalkError if there is none."""
    if not text:
        raise TalkError("nothing to pin; accepted: /pin TEXT")
    return f"{system}\n{text}" if system else text


def _message(body: bytes, status: int) -> str:
    with suppress(ValueError, LookupError, TypeError):
        return json.loads(body)["error"]["message"]
    return f"the server answers with status {status}"
