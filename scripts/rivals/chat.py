"""A chat of twice the context, at llama.cpp's server and at `sinkstream serve`: what each does, turn by turn.

    python scripts/rivals/environments.py llamacpp-server
    python scripts/rivals/chat.py --cap 1024 --turns 50

The client sends the whole conversation at every turn, as most clients do, with the `openai` package; it keeps what it
was answered, and after an error it goes on with its next message. Then one reply of twice the context is asked for, and
the turn after it. Each server has a record.
"""

import argparse
import importlib.metadata
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
from jobs import HERE, gguf_file

from sinkstream.bench.serving.restart import Server
from sinkstream.cli import HelpFormatter, options
from sinkstream.evaluation.record import numeric_protocol
from sinkstream.measure.environment import environment, utc_now
from sinkstream.models import LoadedModel
from sinkstream.records.plain import new_record_id
from sinkstream.studies.rivals.chat import SERVERS, TURN_COLUMNS, ChatRecord

ENVIRONMENT = "llamacpp-server"
SYSTEM = "You are a helpful assistant. The name of the user is Ada. Answer in one short sentence."
MESSAGE = "Day {turn}: I walked {steps} miles through the hills."
LAST = "What is my name?"
STORY = "Tell me a very long story about a ship and its captain."
SECONDS = 600


def main() -> int:
    """Talk to every server; returns the exit code."""
    args = arguments()
    loaded = options.load_given_model(args)
    if (gguf := gguf_file(args.model)) is None:
        raise SystemExit(
            f"--model {args.model} is no GGUF file, which llama.cpp needs; accepted: builtin, or a .gguf file"
        )
    for name in args.servers:
        with served(name, gguf, args) as (address, version):
            client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", timeout=SECONDS, max_retries=0)
            model = client.models.list().data[0].id
            turns = conversed(client, model, args)
            story = told(client, model, args)
        record = built(name, version, turns, story, args, loaded)
        path = ChatRecord.write(record, args.out)
        refused = sum(status != 200 for status in turns["status"])
        print(f"{name}: {refused} of {args.turns} turns refused; {turns['reply'][-1] or turns['error'][-1]!r}: {path}")
    return 0


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=HelpFormatter)
    options.add_model_options(parser)
    parser.add_argument("--cap", type=int, default=1024, help="context of a server, in tokens")
    parser.add_argument("--turns", type=int, default=50, help="turns of the chat")
    parser.add_argument("--max-tokens", type=int, default=24, help="most tokens of the reply to a turn")
    parser.add_argument(
        "--servers", type=options.names_of(SERVERS, "server"), default=list(SERVERS), help="names, comma-separated"
    )
    parser.add_argument("--environments", type=Path, default=Path(".rivals"), help="folder of environments.py")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a server")
    parser.add_argument("--out", type=Path, default=Path("results/rivals"), help="folder of the records")
    args = parser.parse_args()
    if args.turns < 2:
        parser.error(f"--turns {args.turns} is no conversation; accepted: at least 2")
    return args


@contextmanager
def served(name: str, gguf: str, args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Address and release of a server while it runs."""
    if name == "sinkstream":
        given = ["--model", args.model, "--cap", str(args.cap), "--resident", "1", "--no-spill"]
        server = Server([*given, "--device", "cpu"])
        try:
            yield server.address, importlib.metadata.version("sinkstream")
        finally:
            server.end()
        return
    python = args.environments / ENVIRONMENT / "bin" / "python"
    if not python.exists():
        raise SystemExit(f"{python} is missing; make it: python scripts/rivals/environments.py {ENVIRONMENT}")
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / "job.json"
        shift = SERVERS[name].options["shift"]
        job.write_text(json.dumps({"gguf": gguf, "cap": args.cap, "shift": shift, "threads": args.threads}))
        command = [str(python), str(HERE / "llamacpp_server.py"), str(job)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, text=True, **pipes)
        try:
            line = process.stdout.readline()
            if not line.startswith("{"):
                raise SystemExit(f"llama.cpp's server did not start; see: {' '.join(command)}")
            said = json.loads(line)
            yield said["address"], said["version"]
        finally:
            process.kill()
            process.wait()


def conversed(client: openai.OpenAI, model: str, args: argparse.Namespace) -> dict[str, list]:
    """The turns of a conversation, a column a figure."""
    messages: list[dict[str, str]] = [{"role": "system", "content": SYSTEM}]
    turns: dict[str, list] = {}
    for turn in range(1, args.turns + 1):
        text = LAST if turn == args.turns else MESSAGE.format(turn=turn, steps=3 + turn % 9)
        messages.append({"role": "user", "content": text})
        found = asked(client, model, messages, max_tokens=args.max_tokens)
        if found["reply"] is not None:
            messages.append({"role": "assistant", "content": found["reply"]})
        for figure, value in found.items():
            turns.setdefault(figure, []).append(value)
    return turns


def told(client: openai.OpenAI, model: str, args: argparse.Namespace) -> dict[str, Any]:
    """One reply of twice the context, and the turn after it."""
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": STORY}]
    story = asked(client, model, messages, max_tokens=2 * args.cap, extra_body={"ignore_eos": True})
    found = {"asked": 2 * args.cap, **{name: story[name] for name in ("status", "completion_tokens", "finish_reason")}}
    messages += [{"role": "assistant", "content": story["reply"] or ""}, {"role": "user", "content": LAST}]
    after = asked(client, model, messages, max_tokens=args.max_tokens)
    return found | {"next_status": after["status"], "next_error": after["error"], "next_reply": after["reply"]}


def asked(client: openai.OpenAI, model: str, messages: list[dict], **given: Any) -> dict[str, Any]:
    """A streamed, greedy reply: status, error, text, tokens, milliseconds to the first text, seconds."""
    begin, first, pieces, usage, reason = time.perf_counter(), None, [], None, None
    figures = dict.fromkeys(TURN_COLUMNS[3:])
    try:
        stream = client.chat.completions.create(
            model=model,
            messages=messages,  # type: ignore[arg-type]
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            **given,
        )
        for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                if choice.delta.content:
                    first = first or time.perf_counter()
                    pieces.append(choice.delta.content)
                reason = choice.finish_reason or reason
    except openai.APIStatusError as error:
        body = error.body if isinstance(error.body, dict) else {}
        return {"status": error.status_code, "error": body.get("type"), "reply": None, **figures}
    details = usage.prompt_tokens_details
    return {
        "status": 200,
        "error": None,
        "reply": "".join(pieces),
        "prompt_tokens": usage.prompt_tokens,
        "cached_tokens": details.cached_tokens if details else None,
        "completion_tokens": usage.completion_tokens,
        "finish_reason": reason,
        "ttft_ms": 1e3 * ((first or time.perf_counter()) - begin),
        "seconds": time.perf_counter() - begin,
    }


def built(
    name: str,
    version: str,
    turns: dict[str, list],
    story: dict[str, Any],
    args: argparse.Namespace,
    loaded: LoadedModel,
) -> dict[str, Any]:
    """The content of a record."""
    server = SERVERS[name]
    return {
        "id": new_record_id("rival-chat", loaded.name, server.label),
        "status": "complete",
        "status_reason": None,
        "created": utc_now(),
        "command": sys.argv,
        "arguments": vars(args),
        "environment": environment("cpu"),
        "model": loaded.record(),
        "server": {"name": name, "label": server.label, "options": server.options, "version": version},
        "protocol": {
            **numeric_protocol(loaded),
            "dtype": "float32" if name == "sinkstream" else "GGUF",
            "device": "cpu",
            "seed": args.seed,
            "cap": args.cap,
            "turns": args.turns,
            "max_tokens": args.max_tokens,
            "threads": args.threads,
            "client": f"openai {openai.__version__}",
        },
        "turns": turns,
        "long_reply": story,
    }


if __name__ == "__main__":
    raise SystemExit(main())
