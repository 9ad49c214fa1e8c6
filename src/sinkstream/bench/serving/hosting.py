"""A server in this process, on a free port of this machine, and the clients beside it in processes of their own."""

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers

from sinkstream.bench.serving.client import WAITING, Plan
from sinkstream.models import LoadedModel
from sinkstream.serve import Service

CLIENT = Path(__file__).with_name("client.py")
START_SECONDS = 120
SESSIONS_OF_A_CLIENT = 4
#: Of a model without a tokenizer of its own: every token is a word.
WORDS_TEMPLATE = (
    "{% for m in messages %}{{ {'system': 'w0 ', 'user': 'w1 ', 'assistant': 'w2 '}[m['role']] }}"
    "{{ m['content'] + ' w3 ' }}{% endfor %}{% if add_generation_prompt %}{{ 'w2 ' }}{% endif %}"
)


def with_tokenizer(loaded: LoadedModel) -> LoadedModel:
    """The same model; random weights get a tokenizer of words, w0, w1 …, and a chat template."""
    if loaded.tokenizer is not None:
        return loaded
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"w{i}": i for i in range(loaded.model.config.vocab_size)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")
    tokenizer.chat_template = WORDS_TEMPLATE
    return replace(loaded, tokenizer=tokenizer)


@contextmanager
def hosted(service: Service) -> Iterator[str]:
    """The address of a service while it is served. Raises ImportError if packages of a server are missing."""
    import uvicorn

    from sinkstream.serve.app import create_app

    config = uvicorn.Config(create_app(service), port=0, log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, name="server", daemon=True)
    thread.start()
    deadline = time.monotonic() + START_SECONDS
    while not server.started:
        if not thread.is_alive() or time.monotonic() > deadline:
            raise OSError("the server did not start")
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def converse(plan: Plan, heard: Callable[[dict[str, Any]], None] = lambda turn: None) -> list[dict[str, Any]]:
    """Carry out a plan; `heard` is told every turn as it ends.

    Raises
    ------
    OSError
        If a client fails.
    """
    told: queue.Queue[tuple[subprocess.Popen, dict[str, Any] | None]] = queue.Queue()
    clients = [_client(share, told) for share in shares(plan, os.cpu_count() or 1)]
    turns, waiting, running = [], 0, len(clients)
    try:
        while running:
            client, told_one = told.get()
            if told_one is None:
                running -= 1
                _check_ended(client)
            elif told_one == WAITING:
                waiting += 1
                if waiting == len(clients):
                    for one in clients:
                        _write(one, "")
            else:
                turns.append(told_one)
                heard(told_one)
    finally:
        for client in clients:
            client.kill()
            client.wait()
    return turns


def shares(plan: Plan, cores: int) -> list[Plan]:
    """The plan of each client: what a client takes to send many requests at once is no time of the server's.

    Parameters
    ----------
    cores : int
        Of this machine, a quarter of which are for clients.
    """
    clients = max(1, min(cores // 4, plan.sessions // SESSIONS_OF_A_CLIENT))
    edges = [plan.sessions * i // clients for i in range(clients + 1)]
    return [replace(plan, first=plan.first + a, sessions=b - a) for a, b in pairwise(edges)]


def _client(plan: Plan, told: queue.Queue) -> subprocess.Popen:
    """A client under way; what it tells is put into a queue, None last."""
    client = subprocess.Popen(
        [sys.executable, str(CLIENT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )

    def read() -> None:
        assert client.stdout is not None
        for line in client.stdout:
            told.put((client, json.loads(line)))
        told.put((client, None))

    threading.Thread(target=read, name="client", daemon=True).start()
    _write(client, json.dumps(asdict(plan)))
    return client


def _write(client: subprocess.Popen, line: str) -> None:
    assert client.stdin is not None
    with suppress(BrokenPipeError):  # a client that has failed says why when it is asked
        client.stdin.write(f"{line}\n")
        client.stdin.flush()


def _check_ended(client: subprocess.Popen) -> None:
    """Raise OSError if a client has failed."""
    assert client.stderr is not None
    error = client.stderr.read()
    if client.wait():
        raise OSError(f"the client of the server failed: {error.strip().splitlines()[-1:]}")
