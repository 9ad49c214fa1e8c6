"""A server in this process, on a free port of this machine, and the client beside it in a process of its own."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sinkstream.bench.serving.client import Plan
from sinkstream.models import LoadedModel
from sinkstream.serve import Service

CLIENT = Path(__file__).with_name("client.py")
START_SECONDS = 120
#: Of a model without a tokenizer of its own: every token is a word.
WORDS_TEMPLATE = (
    "{% for m in messages %}{{ {'system': 'w0 ', 'user': 'w1 ', 'assistant': 'w2 '}[m['role']] }}"
    "{{ m['content'] + ' w3 ' }}{% endfor %}{% if add_generation_prompt %}{{ 'w2 ' }}{% endif %}"
)


def with_tokenizer(loaded: LoadedModel) -> LoadedModel:
    """The same model; random weights get a tokenizer of words, w0, w1 …, and a chat template."""
    if loaded.tokenizer is not None:
        return loaded
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
        If the client fails.
    """
    process = subprocess.Popen(
        [sys.executable, str(CLIENT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    turns = []
    try:
        process.stdin.write(json.dumps(asdict(plan)))
        process.stdin.close()
        for line in process.stdout:
            turns.append(json.loads(line))
            heard(turns[-1])
        error = process.stderr.read()
        if process.wait():
            raise OSError(f"the client of the server failed: {error.strip().splitlines()[-1:]}")
    finally:
        process.kill()
        process.wait()
    return turns
