"""The command line: ``sinkstream COMMAND``, with the commands of `COMMANDS`.

A user's mistake ends with one message on stderr and exit code 2, an interrupt with 130, a failed run with 1.
"""

import argparse
import math
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NoReturn

from sinkstream import __version__
from sinkstream.records.files import WriteError
from sinkstream.registry import did_you_mean

#: Name of every command -> what the command does. The module of the same name in this folder has its `add_arguments`
#: and `run`. A module is imported when its command is used: importing torch takes seconds.
COMMANDS = {
    "demo": "Compare all kinds of policy on a small real model, offline, in three minutes",
    "eval": "Stream a text through a model under one or several policies and record quality and speed",
    "bench": "Time the rungs of decoding against the bytes that a step must read",
    "diagnose": "Show why a policy's quality differs from strict streaming's: spikes, drift, attribution, verdict",
    "recall": "Measure what each policy recalls of a passage, by how far back it was seen",
    "probe-heads": "Find the retrieval heads of a model, for recall by heads",
    "streameval": "Ask a stream of facts about itself: right answers by how many lines ago the fact was said",
    "cliff": (
        "Split the loss of perplexity at a large R into hard eviction and visible length past the trained positions"
    ),
    "serve": "Serve a model behind the OpenAI API, in sessions that never overflow",
    "chat": "Chat in the terminal, with a local model or any server that speaks the OpenAI API",
    "env": "Print versions and hardware, for bug reports",
    "matrix": "Measure a file of points (model, text, policy, cap), one resumable record each",
    "verdict": "Judge the criteria from the records and write the ledger of verdicts",
    "report": "Compute the headline figures from the records and write the generated tables of the documents",
}
EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


#: Kind of a number on the command line -> what is accepted.
NUMBERS = {int: "a whole number", float: "a finite number"}


def read_number(kind: type[int] | type[float], text: str) -> int | float:
    """A number as typed. Raises ValueError for anything else; NaN and infinity are no numbers of an option."""
    number = kind(text)
    if isinstance(number, float) and not math.isfinite(number):
        raise ValueError(f"{text!r} is not finite")
    return number


def _number(kind: type[int] | type[float]) -> Callable[[str], int | float]:
    """A parser of one number, for an option's ``type``."""

    def parse(text: str) -> int | float:
        try:
            return read_number(kind, text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not accepted; accepted: {NUMBERS[kind]}") from None

    return parse


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, with what is accepted."""

    def __init__(self, **options: Any):
        super().__init__(**options)
        for kind in NUMBERS:
            self.register("type", kind, _number(kind))

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"{self.prog}: error: {message}; see {self.prog} --help\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """As argparse; an argument that is not known is an error, with the option that is nearest to its name."""
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            near = did_you_mean(unknown[0].partition("=")[0], self._option_string_actions)
            message = f"unknown argument {unknown[0]!r}{near}; accepted: see {self.prog} --help"
            self.exit(EXIT_USAGE, f"{self.prog}: error: {message}\n")
        return parsed, unknown


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Names stay in one piece, so that they can be copied, and only defaults that say something are shown, as typed."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return [part for line in text.splitlines() for part in textwrap.wrap(line, width, break_on_hyphens=False)]

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.default == []:
            return action.help
        if isinstance(action.default, list):
            typed = ",".join(map(str, action.default))
            return f"{action.help} (default: {typed})".replace("%", "%%")
        return super()._get_help_string(action)


class CommandParser(Parser):
    """The parser of one command: imports its module and adds its options when it is first asked to parse."""

    def __init__(self, *, command: str, **options: Any):
        super().__init__(**options)
        self.command = command

    def load(self) -> "CommandParser":
        """Import the command and add its options, once; returns itself."""
        if self.get_default("run") is None:
            module = import_module(f"{__name__}.{self.command.replace('-', '_')}")
            module.add_arguments(self)
            self.set_defaults(run=module.run)
        return self

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        self.load()
        return super().parse_known_args(args, namespace)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each command module adds its own options once it is needed."""
    parser = Parser(
        prog="sinkstream",
        description="Language models that stream for ever in a fixed amount of memory.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"sinkstream {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=CommandParser)
    for name, summary in COMMANDS.items():
        commands.add_parser(
            name,
            command=name,
            help=summary,
            description=f"{summary}.",
            allow_abbrev=False,
            usage=f"sinkstream {name} [options]",
            formatter_class=HelpFormatter,
        )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    given = list(sys.argv[1:] if argv is None else argv)
    name = f"sinkstream {given[0]}" if given and given[0] in COMMANDS else "sinkstream"
    try:  # parsing imports the command, which takes seconds
        args = build_parser().parse_args(given)
        args.argv = ["sinkstream", *given]
        code = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of the output closed its end of the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (ValueError, OSError, ImportError) as error:
        message = error.strerror if isinstance(error, WriteError) else error
        print(f"{name}: error: {message}", file=sys.stderr)
        return EXIT_USAGE
