"""``sinkstream bench --serve``."""

import argparse

import torch
from rich.console import Console

from sinkstream.bench.serving.hosting import with_tokenizer
from sinkstream.bench.serving.records import PARTS
from sinkstream.bench.serving.served import Load
from sinkstream.bench.serving.session import ServingSession
from sinkstream.bench.serving.soak import check_locust
from sinkstream.bench.serving.tables import recall_table, serve_table, sessions_table
from sinkstream.cli import options
from sinkstream.cli.serve import INSTALL, default_backend
from sinkstream.evaluation.backends import BACKENDS
from sinkstream.evaluation.runner import check_writable
from sinkstream.models import load_model, resolve_device
from sinkstream.records.plain import new_record_id
from sinkstream.serve import ServeSettings
from sinkstream.show.progress import say

OF_SERVER = ("--turns", "--reply", "--pinned", "--soak-seconds", "--soak-users", "--soak-compare", "--talks")


def parts(text: str) -> list[str]:
    """Names of parts, as in turns,soak. Raises ArgumentTypeError for another name."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    wrong = next((name for name in names if name not in PARTS), None)
    if wrong is not None or not names:
        raise argparse.ArgumentTypeError(f"{wrong or text!r} is no part; accepted: {', '.join(PARTS)}")
    return names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``bench --serve``."""
    group = parser.add_argument_group("server")
    group.add_argument(
        "--serve",
        type=parts,
        metavar="PART[,PART…]",
        help=f"measure a server instead: {', '.join(PARTS)}; the conversation of turns has --turns turns, the one timed"
        " beside the engine replies of --tokens tokens",
    )
    group.add_argument("--turns", type=int, default=1000, help="turns of the one conversation of --serve turns")
    group.add_argument("--reply", type=int, default=8, help="tokens of each of its replies")
    group.add_argument("--pinned", type=int, help="--pinned of the server (default: its own)")
    group.add_argument("--soak-seconds", type=float, default=600, help="how long --serve soak lasts")
    group.add_argument("--soak-users", type=int, default=32, help="conversations side by side in it")
    group.add_argument(
        "--soak-compare",
        type=float,
        help="seconds in which its conversations are served again, alone (default: as many as all of them take)",
    )
    group.add_argument("--talks", type=int, default=6, help="chats of --serve recall, side by side, with all its texts")


def check_unused(args: argparse.Namespace) -> None:
    """Raise ValueError if an option of the server is given where none is measured."""
    options.refuse_options(args, OF_SERVER, "goes with --serve PART, which is not given")


def check(args: argparse.Namespace) -> None:
    """Raise ValueError if options do not go together, and ImportError if packages of a server are missing."""
    try:
        import httpx2  # noqa: F401  (of the clients)
        import uvicorn  # noqa: F401

        import sinkstream.serve.app  # noqa: F401
    except ImportError as error:
        raise ImportError(INSTALL.format(error.name)) from None
    if "soak" in args.serve:
        check_locust()
    if len(args.cap) > 1:
        raise ValueError(f"--cap {','.join(map(str, args.cap))} with --serve; accepted: one number of slots")
    least = {
        "turns": 4,
        "reply": 2,
        "tokens": 2,
        "soak_seconds": 1,
        "soak_users": 1,
        "talks": 1,
        "soak_compare": 1,
        "pinned": 4,
    }
    for name, value in least.items():
        given = getattr(args, name)
        if given is not None and given < value:
            raise ValueError(f"--{name.replace('_', '-')} {given} with --serve; accepted: at least {value}")
    ServeSettings(cap=args.cap[0], pinned=args.pinned, recall="none")
    BACKENDS[_backend(args)].check_device(resolve_device(args.device))


def _backend(args: argparse.Namespace) -> str:
    return (args.backend or [default_backend(args.device)])[0]


def measure(
    args: argparse.Namespace, models: list[str], console: Console, device: torch.device, dtype: torch.dtype
) -> int:
    """Measure every model; print the tables, write the records."""
    check_writable(args.out)
    backend = _backend(args)
    load = Load(
        args.turns,
        args.reply,
        args.tokens,
        args.cap[0],
        seconds=args.soak_seconds,
        users=args.soak_users,
        talks=args.talks,
        pinned=args.pinned,
        compare_seconds=args.soak_compare,
    )
    name = new_record_id("bench")
    for model in models:
        loaded = with_tokenizer(
            load_model(model, dtype=dtype, device=device, seed=args.seed, attn_implementation=args.attention)
        )
        untrained = args.allow_untrained_positions or loaded.source == "random"
        session = ServingSession(loaded, backend, load, options.request(args), name, untrained)
        records = session.run(args.serve, console)
        for table in (serve_table, sessions_table, recall_table):
            if table(records).rows:
                console.print(table(records, f"{loaded.name}: a server"))
        del loaded, session
    say(console, f"records: {args.out}")
    return 0
