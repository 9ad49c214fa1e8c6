"""A server of a tiny model on a free loopback port, and the same conversation by the engine alone."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tiny_model
import uvicorn
from openai import OpenAI

from sinkstream.engine import Engine
from sinkstream.models import LoadedModel
from sinkstream.serve import ServeSettings, Service
from sinkstream.serve.app import create_app
from sinkstream.serve.files import SessionFiles

TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'][0] + '>' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<a>' }}{% endif %}"
)
SYSTEM = {"role": "system", "content": "Be brief."}
CAP = 96
TEXTS = ["Hello you", "And then what?", "x", "Tell me about 12 foxes", "Why?", "a longer message, of some words"]
BIAS = {0: -100.0}  # a reply has no unknown token, which has no text


def user(text: str) -> dict:
    """A user message."""
    return {"role": "user", "content": text}


def loaded(family: str = "llama", *, template: str | None = TEMPLATE) -> LoadedModel:
    """A tiny model whose tokenizer has a chat template."""
    found = tiny_model.loaded(family)
    found.tokenizer.chat_template = template
    return found


def save_chat_model(folder: Path) -> Path:
    """The tiny model on disk, with a chat template."""
    path = tiny_model.save_model(folder, "llama") / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": TEMPLATE}))
    return folder


def make_service(model: LoadedModel | None = None, **settings) -> Service:
    """A service of a tiny model, not started."""
    given = {"cap": CAP, "max_tokens": 12, "recall": "none"} | settings
    return Service(model or loaded(), ServeSettings(**given), backend="ring")


@contextmanager
def served(service: Service, keys: tuple[str, ...] = ()) -> Iterator[str]:
    """The address of a running server."""
    config = uvicorn.Config(create_app(service, keys), port=0, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def client_of(address: str, key: str = "none") -> OpenAI:
    """The official client."""
    return OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0)


def opened(client, system: str = SYSTEM["content"]) -> str:
    """The id of a new session."""
    return client.post("/sessions", body={"messages": [{"role": "system", "content": system}]}, cast_to=object)["id"]


def say(client, session: str, text: str, tokens: int = 12) -> str:
    """The reply to a message in a session."""
    answer = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[user(text)],
        temperature=0,
        max_tokens=tokens,
        logit_bias=BIAS,
        extra_body={"session_id": session},
    )
    return answer.choices[0].message.content


def slow_disk(monkeypatch, files: SessionFiles) -> threading.Event:
    """A disk that writes nothing until the event is set."""
    go, store = threading.Event(), files.store

    def held(*given):
        go.wait()
        store(*given)

    monkeypatch.setattr(files, "store", held)
    return go


class Alone:
    """A conversation by the engine alone, greedy: what every server must say.

    The pieces of text that are fed are written down here by hand; they are those of `TEMPLATE`.
    """

    bias = BIAS

    def __init__(self, model: LoadedModel, system: str | None = SYSTEM["content"], cap: int = CAP):
        self.tokenizer = model.tokenizer
        head = f"<s>{system}\n" if system is not None else ""
        sink = max(4, len(head))
        self.engine = Engine(model.model, cap=cap, sink=sink, evict="turns", tokenizer=model.tokenizer)
        if head:
            self._feed(head)
        self._left = ""
        self.starts: list[int] = []

    def say(self, text: str, tokens: int = 12) -> str:
        """The reply to a message."""
        if self._left:
            self._feed(self._left)
        self.starts.append(self.engine.stats()["seen"])
        self.engine.begin_turn()
        self._feed(f"<u>{text}\n<a>")
        self._left = "\n"
        return self.engine.generate([], max_new_tokens=tokens, logit_bias=self.bias).text

    @property
    def evicted_turns(self) -> int:
        """Turns that the cache does not hold from their beginning on."""
        stats = self.engine.stats()
        oldest = stats["seen"] - stats["kept"] + self.engine.policy.sink
        return sum(start < oldest for start in self.starts)

    def _feed(self, text: str) -> None:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        for first in range(0, len(ids), 128):
            self.engine.prefill(ids[first : first + 128])
