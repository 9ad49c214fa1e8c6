"""A server of a tiny model on a free loopback port, and the same conversation by the engine alone."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import tiny_model
import uvicorn
from openai import OpenAI

from sinkstream.engine import Engine
from sinkstream.models import LoadedModel
from sinkstream.serve import ServeSettings, Service
from sinkstream.serve.app import create_app

TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'][0] + '>' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<a>' }}{% endif %}"
)
SYSTEM = {"role": "system", "content": "Be brief."}
CAP = 96
BIAS = {0: -100.0}  # a reply has no unknown token, which has no text


def user(text: str) -> dict:
    """A user message."""
    return {"role": "user", "content": text}


def loaded(family: str = "llama", *, template: str | None = TEMPLATE) -> LoadedModel:
    """A tiny model whose tokenizer has a chat template."""
    found = tiny_model.loaded(family)
    found.tokenizer.chat_template = template
    return found


def make_service(model: LoadedModel | None = None, **settings) -> Service:
    """A service of a tiny model, not started."""
    given = {"cap": CAP, "max_tokens": 12} | settings
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
