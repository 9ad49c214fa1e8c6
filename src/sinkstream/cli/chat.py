"""``sinkstream chat``."""

import argparse
import os

from rich.console import Console

from sinkstream.cli.options import add_model_options, unused_option
from sinkstream.cli.serve import KEY_VARIABLE, add_serve_settings, make_service
from sinkstream.models.gguf_file import cache_dir

BESIDE_URL = ("--url", "--remote-model", "--system", "--temperature")
SYSTEM = "You are a helpful assistant. Answer briefly."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_model_options(parser)
    add_serve_settings(parser, ("cap", "evict", "recall", "recall_slots", "max_tokens", "ram_mb", "disk_mb"))
    group = parser.add_argument_group("conversation")
    group.add_argument("--system", default=SYSTEM, help="system prompt, which stays pinned; '' for none")
    group.add_argument("--url", help="talk to this server instead, as in http://127.0.0.1:8000/v1")
    group.add_argument("--remote-model", help="model of the server at --url (default: the first it lists)")
    group.add_argument("--temperature", type=float, help="temperature (default: greedy; at --url the server's)")


def run(args: argparse.Namespace) -> int:
    """Talk until the input ends."""
    _check(args)
    try:
        from sinkstream.serve.talk import LocalTalk, RemoteTalk, Talk, TalkError
        from sinkstream.serve.terminal import Terminal, typed_lines
    except ImportError as error:
        raise ImportError(f"sinkstream chat needs {error.name}: pip install 'sinkstream[serve]'") from None
    console, folder = Console(), cache_dir() / "chats"
    talk: Talk | None = None
    try:
        if args.url is not None:
            key = os.environ.get(KEY_VARIABLE) or os.environ.get("OPENAI_API_KEY", "none")
            talk = remote = RemoteTalk(args.url, args.remote_model, key, args.system, folder)
            name: str = remote.model
        else:
            service = make_service(args, folder, durable=False, resident=1)
            talk, name = LocalTalk(service, args.system), service.loaded.name
        if args.temperature is not None:
            talk.options["temperature"] = args.temperature
        console.print(f"{name}: /help for commands, Ctrl-D to end", style="dim", markup=False)
        Terminal(talk, console).run(typed_lines())
    except TalkError as error:
        raise ValueError(str(error)) from None
    finally:
        if talk is not None:
            talk.close()
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raise ValueError for options that are wrong or do not go together."""
    if args.url is not None and not args.url.startswith(("http://", "https://")):
        raise ValueError(f"--url {args.url!r} is not accepted; accepted: an address as in http://127.0.0.1:8000/v1")
    unused = None if args.url is None else unused_option(args, BESIDE_URL)
    if unused is not None:
        raise ValueError(
            f"{unused} changes nothing about the server at --url; accepted together with --url:"
            f" {', '.join(BESIDE_URL[1:])}"
        )
    if args.remote_model is not None and args.url is None:
        raise ValueError(f"--remote-model {args.remote_model} goes with --url, which is not given")
    if args.temperature is not None and args.temperature < 0:
        raise ValueError(f"--temperature {args.temperature} is not accepted; accepted: a number of at least 0")
